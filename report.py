"""Draw the report from what was measured: charts, reports/report.html, and the generated tables of README and docs.

It reads reports/metrics.json (of evaluate.py), the trainers' logs, reports/samplers.csv, pitfalls.csv, self_check.csv,
training_seeds.csv and ablation.csv (of benchmarks/), and the shipped pictures. It measures nothing, so it takes seconds.
"""

from __future__ import annotations

import argparse
import base64
import json
import mimetypes
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cli import DATA_DIR_HELP, DEVICE_HELP, ArgumentParser, expanded_path, run_script
from files import ExpectedError, check_writable, read_text, write_text

if TYPE_CHECKING:
    from figures.measured import Measured, Row

HERE = Path(__file__).parent
TEMPLATE = HERE / "figures" / "templates" / "report.html.jinja"
NOTEBOOK = "notebooks/gan_versus_diffusion.ipynb"
SAMPLE_COLUMNS = 10  # of a grid of ten rows
NEIGHBOURS, NEIGHBOUR_COLUMNS = 3, 10


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--reports", type=expanded_path, default="reports", help="folder of the figures, and of what is drawn from them")
    flag("--samples", type=expanded_path, default="samples", help="folder of the pictures and GIFs")
    flag(
        "--readme",
        type=expanded_path,
        default=None,
        help="README.md whose generated tables are rewritten, with those of README.pt-BR.md and docs/results.md beside it "
        "(default: this project's, if --reports and --samples are its own)",
    )
    flag("--device", default="auto", help=f"{DEVICE_HELP}: draws the samples")
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    args = parser.parse_args(argv)
    args.reports, args.samples = Path(args.reports), Path(args.samples)
    args.readme = Path(args.readme) if args.readme else None
    if args.reports.resolve() == HERE / "reports" and args.samples.resolve() == HERE / "samples":
        args.readme = args.readme or HERE / "README.md"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    from figures.measured import read_measured

    # Read
    measured = read_measured(args.reports)
    for folder in {args.reports, args.readme.parent if args.readme else args.reports}:
        check_writable(folder)

    # Draw
    draw_charts(args.reports, measured)
    draw_samples(args, measured.models)

    # Write
    write_page(args, measured)
    print(f"wrote {args.reports / 'report.html'} and its figures")
    if args.readme:
        for path in write_tables(args.readme, measured):
            print(f"wrote the generated parts of {path}")


def draw_charts(folder: Path, measured: Measured) -> None:
    """The charts of metrics.json and of the logs."""
    from figures import charts

    rows, models = measured.rows, measured.models
    charts.compare(folder / "fid_comparison.png", models, "fid", "FID (mnist extractor)", rows["real training digits"])
    charts.compare(folder / "is_comparison.png", models, "is", "inception score", rows["real test digits"])
    charts.training_curves(folder / "loss_comparison.png", measured.logs)
    charts.quality_against_cost(folder / "quality_against_cost.png", models)
    scored = [row for row in measured.metrics["rows_by_digit"] if row.get("fid_ratio") is not None]
    charts.heat_map(folder / "fid_by_digit.png", scored)


def draw_samples(args: argparse.Namespace, models: list[Row]) -> None:
    """A grid of samples of each model, and some samples above their nearest training digits."""
    import torch

    import data
    from checkpoint import file_sha256, load_generator
    from figures import charts, images
    from figures.measured import label_of
    from utils import choose_device, has_bf16, sampling_rng

    device = choose_device(args.device)
    train = data.load_digits("mnist", "train", args.data_dir or data.default_data_dir(), device).images
    panels = []
    for row in models:
        if file_sha256(row["checkpoint"]) != row["sha256"]:
            raise ExpectedError(f"{row['checkpoint']} is not the file of metrics.json any more; run evaluate.py again")
        generator = load_generator(row["checkpoint"], device)
        labels = torch.arange(data.NUM_CLASSES).repeat_interleave(SAMPLE_COLUMNS) if with_labels(row) else None
        options = {name: row[name] for name in ("sampler", "steps", "eta", "guidance") if row.get(name) is not None}
        if options:
            options["precision"] = row["dtype"] if has_bf16(device) else "fp32"
        samples = data.to_uint8(generator.sample(data.NUM_CLASSES * SAMPLE_COLUMNS, labels, sampling_rng(0), **options))
        images.write_png(args.reports / sample_file(row), images.image_grid(samples, SAMPLE_COLUMNS))
        shown = samples[:: SAMPLE_COLUMNS * data.NUM_CLASSES // NEIGHBOUR_COLUMNS][:NEIGHBOUR_COLUMNS]
        distances = torch.cdist(shown.flatten(1).float(), train.flatten(1).float())
        nearest = train[distances.topk(NEIGHBOURS, largest=False).indices]  # [columns, neighbours, 1, 28, 28]
        panels.append((label_of(row["model"]), shown[:, 0].cpu().numpy(), nearest[:, :, 0].cpu().numpy()))
    charts.neighbours(args.reports / "nearest_neighbours.png", panels)


def with_labels(row: Row) -> bool:
    """Whether the samples of this row were drawn with labels."""
    return row.get("label_accuracy") is not None


def sample_file(row: Row) -> str:
    """The file of a model's grid, such as samples_ddpm_by_digit.png."""
    return f"samples_{row['model'].replace(', ', '_').replace(' ', '_')}.png"


# --------------------------------------------------------------------------------------------------------------------
# The page


def write_page(args: argparse.Namespace, measured: Measured) -> None:
    """Write report.html, with every picture inside. The project's own page also has the conclusions of docs/results.md.

    Raises:
        ExpectedError: a picture is missing.
    """
    import jinja2

    from figures import tables
    from figures.measured import label_of

    files = sorted([*args.reports.iterdir(), *args.samples.iterdir()])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    rows, models = measured.rows, measured.models
    results = args.readme.parent / "docs" / "results.md" if args.readme else None
    try:
        page = environment.from_string(read_text(TEMPLATE)).render(
            metrics=measured.metrics,
            rows=rows,
            figures=tables.all_figures([rows["real training digits"], rows["real test digits"], *models]),
            shares=tables.shares(measured),
            training_seeds=tables.training_seeds(measured.training_seeds),
            pitfalls=tables.pitfalls(measured.pitfalls),
            self_check=tables.self_check(measured.self_check),
            check_n=int(measured.self_check[0]["n"]),
            conclusions=conclusions(results) if results else [],
            models=[(label_of(row["model"]), sample_file(row), with_labels(row)) for row in models],
            images={path.name: inline(path) for path in files if path.suffix in (".png", ".gif")},
        )
    except jinja2.UndefinedError as error:
        raise ExpectedError(f"the page lacks a picture: {error}; docs/results.md says which command draws it") from error
    write_text(args.reports / "report.html", page)


def inline(path: Path) -> str:
    """The file as a data URL."""
    kind, _ = mimetypes.guess_type(path.name)
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def conclusions(path: Path) -> list[tuple[str, str]]:
    """(title, text) of each paragraph of the section "What the figures say", written by hand in docs/results.md.

    Raises:
        ExpectedError: the section is missing.
    """
    _, heading, rest = read_text(path).partition("## What the figures say\n")
    if not heading:
        raise ExpectedError(f"{path} has no section 'What the figures say'")
    section = rest.partition("\n## ")[0]
    found = re.findall(r"^\*\*(.+?)\.\*\* (.+?)(?:\n\n|\Z)", section, re.MULTILINE | re.DOTALL)
    return [(title, " ".join(text.split())) for title, text in found]


# --------------------------------------------------------------------------------------------------------------------
# Generated parts of README and docs


def write_tables(readme: Path, measured: Measured) -> list[Path]:
    """Rewrite the generated parts of README.md and of the pages beside it. Returns the files that were written."""
    from figures import tables

    overview = tables.overview(measured)
    full = tables.all_figures([measured.rows["real training digits"], *measured.models])
    address = repository(readme.parent / "CITATION.cff")
    parts = {
        readme: {"overview": tables.markdown(overview), "colab": badge(address)},
        readme.with_name("README.pt-BR.md"): {
            "overview": tables.markdown(tables.in_portuguese(overview)),
            "colab": badge(address),
        },
        readme.parent / "docs" / "results.md": {
            "results": tables.markdown(full),
            "shares": tables.markdown(tables.shares(measured)),
            "pitfalls": tables.markdown(tables.pitfalls(measured.pitfalls)),
            "training seeds": tables.markdown(tables.training_seeds(measured.training_seeds)),
            "ablation": tables.markdown(tables.ablation(measured.ablation)),
            "self check": tables.markdown(tables.self_check(measured.self_check)),
        },
    }
    texts = {path: read_text(path) for path in parts}
    for path, sections in parts.items():
        for name, content in sections.items():
            texts[path] = replaced(texts[path], name, content, path)
    for path, text in texts.items():  # all or none: what is missing is known by now
        write_text(path, text)
    if (notebook := readme.parent / NOTEBOOK).exists():
        set_repository(notebook, address)
    return list(parts)


def replaced(text: str, name: str, content: str, path: Path) -> str:
    """The text, with `content` between the two marks of a generated part.

    Raises:
        ExpectedError: the marks are missing.
    """
    begin, end = f"<!-- {name}: written by report.py -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ExpectedError(f"{path} has no part between {begin} and {end}")
    return f"{before}{begin}\n{content}\n{end}{after}" if content else f"{before}{begin}\n{end}{after}"


def repository(citation: Path) -> str:
    """The address of the repository, of the one line that sets it: `repository-code` in CITATION.cff. Empty: not set."""
    found = re.search(r"^repository-code: *\"?(https://[^\s\"]+?)/?\"?$", read_text(citation), re.MULTILINE)
    return found[1] if found else ""


def badge(address: str) -> str:
    """A link in Markdown that opens the notebook in Colab. Empty: the repository's address is not set, or not on GitHub."""
    if not address.startswith("https://github.com/"):
        return ""
    place = address.removeprefix("https://github.com/")
    url = f"https://colab.research.google.com/github/{place}/blob/main/{NOTEBOOK}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"


def set_repository(notebook: Path, address: str) -> None:
    """Write the address that the notebook clones into its cell of parameters."""
    content = json.loads(read_text(notebook))
    for cell in content["cells"]:
        cell["source"] = [re.sub(r'^REPOSITORY = "[^"]*"', f'REPOSITORY = "{address}"', line) for line in cell["source"]]
    write_text(notebook, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_script(main)
