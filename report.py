"""Draw the report from what was measured: charts, reports/report.html and the README's results.

Reads reports/metrics.json (of evaluate.py), the trainers' logs, reports/samplers.csv and pitfalls.csv (of benchmarks/), and
the shipped pictures; nothing is measured here, so it takes seconds.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import mimetypes
from pathlib import Path
from typing import Any

from flags import ArgumentParser
from utils import ExpectedError, atomic_path, run_script

TEMPLATE = Path(__file__).parent / "report.html.jinja"
README = Path(__file__).parent / "README.md"
LOGS = {"DCGAN": "gan", "conditional DCGAN": "cgan", "diffusion": "diffusion"}
BEGIN, END = "<!-- results: written by report.py -->", "<!-- end of results -->"
SAMPLE_COLUMNS = 10  # of a grid of ten rows
NEIGHBOURS, NEIGHBOUR_COLUMNS = 3, 10

# What stands in the tables: name in metrics.json, title, digits after the point, factor
FIGURES = [
    ("fid", "FID", 3, 1), ("fid_ratio", "FID / FID of real digits", 1, 1), ("kid", "KID", 3, 1),
    ("is", "inception score", 3, 1), ("precision", "precision", 3, 1), ("recall", "recall", 3, 1),
    ("density", "density", 3, 1), ("coverage", "coverage", 3, 1), ("label_accuracy", "label accuracy, %", 2, 100),
    ("nearest_median_ratio", "distance to training digits: ratio of medians", 2, 1),
    ("nearest_share_close", "closer than 1 % of test digits are, %", 1, 100),
    ("evaluations", "network evaluations per image", 0, 1), ("images_per_second", "images/s", 0, 1),
    ("parameters", "parameters, million", 2, 1e-6),
]  # fmt: skip
PITFALL_FIGURES = [
    ("n", "samples", 0, 1), ("fid", "FID", 2, 1), ("fid_ratio", "FID / floor", 1, 1), ("is", "inception score", 2, 1),
    ("label_accuracy", "label accuracy, %", 1, 100),
]  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--reports", type=Path, default=Path("reports"), help="folder of the figures, and of what is drawn from them")
    flag("--samples", type=Path, default=Path("samples"), help="folder of the pictures and GIFs")
    flag("--readme", type=Path, default=README, help="the file whose results section is rewritten")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...: draws the samples")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # Read
    metrics = read_metrics(args.reports / "metrics.json")
    logs = {name: read_csv(args.reports / f"{title}_training_log.csv") for name, title in LOGS.items()}
    pitfalls = read_csv(args.reports / "pitfalls.csv")
    curves = sampler_curves(read_csv(args.reports / "samplers.csv"))
    rows = {row["model"]: row for row in metrics["rows"]}
    models = [row for row in metrics["rows"] if row.get("checkpoint")]

    # Draw
    import charts

    charts.compare(args.reports / "fid_comparison.png", models, "fid", "FID (mnist extractor)", rows["real training digits"])
    charts.compare(args.reports / "is_comparison.png", models, "is", "inception score", rows["real test digits"])
    charts.training_curves(args.reports / "loss_comparison.png", logs)
    charts.quality_against_cost(args.reports / "quality_against_cost.png", models, curves)
    scored = [row for row in metrics["rows_by_digit"] if row.get("fid_ratio") is not None]
    charts.heat_map(args.reports / "fid_by_digit.png", scored)
    draw_samples(args, models)

    # Write
    write_page(args, metrics, models, rows, pitfalls)
    write_readme(args.readme, metrics, pitfalls)
    print(f"wrote {args.reports / 'report.html'}, its figures, and the results in {args.readme}")


def read_metrics(path: Path) -> dict[str, Any]:
    """The content of metrics.json.

    Raises:
        ExpectedError: it is missing, or not of this version.
    """
    try:
        metrics = json.loads(path.read_text())
        if not all(name in metrics for name in ("command", "versions", "rows", "rows_by_digit")):
            raise ValueError("it lacks some of its entries")
        if missing := {"real training digits", "real test digits"} - {row["model"] for row in metrics["rows"]}:
            raise ValueError(f"it has no {missing.pop()}")
    except (OSError, ValueError) as error:
        raise ExpectedError(f"{path} cannot be read ({error}); run evaluate.py first") from error
    return metrics


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file; numbers as floats, empty cells as None."""
    try:
        with path.open() as file:
            return [{name: _number(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    except OSError as error:
        raise ExpectedError(f"{path} cannot be read ({error.strerror}); the README says which command writes it") from error


def _number(cell: str) -> float | str | None:
    try:
        return float(cell)
    except ValueError:
        return cell or None


def sampler_curves(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """samplers.csv averaged over its seeds: sampler -> points of growing cost."""
    from metrics import estimate

    curves: dict[str, list[dict[str, Any]]] = {}
    for sampler, steps in dict.fromkeys((row["sampler"], row["steps"]) for row in rows):
        same = [row for row in rows if (row["sampler"], row["steps"]) == (sampler, steps)]
        ratio = estimate([row["fid_ratio"] for row in same])
        rate = estimate([row["images_per_second"] for row in same])
        point = {"evaluations": steps, "images_per_second": rate.mean, "fid_ratio": ratio.mean, "fid_ratio_std": ratio.std}
        curves.setdefault(sampler, []).append(point)
    return {sampler: sorted(points, key=lambda point: point["evaluations"]) for sampler, points in curves.items()}


def draw_samples(args: argparse.Namespace, models: list[dict[str, Any]]) -> None:
    """A grid of samples of each model, and some of them above their closest training digits."""
    import torch

    import charts
    import data
    import plots
    from checkpoint import load_generator
    from utils import choose_device, keyed_generator

    device = choose_device(args.device)
    train = data.load_digits("mnist", "train", args.data_dir or data.default_data_dir(), device).images
    panels = []
    for row in models:
        generator = load_generator(row["checkpoint"], device)
        labels = torch.arange(data.NUM_CLASSES).repeat_interleave(SAMPLE_COLUMNS) if by_digit(row) else None
        options = {name: row[name] for name in ("sampler", "steps", "guidance") if row.get(name) is not None}
        rng = keyed_generator("cpu", 0, "report")
        samples = data.to_uint8(generator.sample(data.NUM_CLASSES * SAMPLE_COLUMNS, labels, rng, **options))
        plots.write_png(args.reports / sample_file(row), plots.image_grid(samples, SAMPLE_COLUMNS))
        shown = samples[:: SAMPLE_COLUMNS * data.NUM_CLASSES // NEIGHBOUR_COLUMNS][:NEIGHBOUR_COLUMNS]
        distances = torch.cdist(shown.flatten(1).float(), train.flatten(1).float())
        nearest = train[distances.topk(NEIGHBOURS, largest=False).indices]  # [columns, neighbours, 1, 28, 28]
        panels.append((charts.label_of(row["model"]), shown[:, 0].cpu().numpy(), nearest[:, :, 0].cpu().numpy()))
    charts.neighbours(args.reports / "nearest_neighbours.png", panels)


def by_digit(row: dict[str, Any]) -> bool:
    """Whether digits were asked for in this row."""
    return row.get("label_accuracy") is not None


def sample_file(row: dict[str, Any]) -> str:
    """The file of a model's grid, such as samples_ddpm_by_digit.png."""
    return f"samples_{row['model'].replace(', ', '_').replace(' ', '_')}.png"


def table_of(rows: list[dict[str, Any]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Titles of the columns, and (title, cells) of each line: every figure with its deviation."""
    import charts

    lines = []
    for name, title, digits, factor in FIGURES:
        cells = []
        for row in rows:
            value, deviation = row.get(name), row.get(f"{name}_std")
            cell = "" if value is None else f"{value * factor:,.{digits}f}"
            spread = f" ± {deviation * factor:,.{digits}f}" if deviation and digits else ""
            cells.append(cell + spread)
        lines.append((title, cells))
    return [charts.label_of(row["model"]) for row in rows], lines


def pitfall_table(pitfalls: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns, and the cells of each line: a mistake below the same model without it."""
    lines = []
    for row in pitfalls:
        figures = [
            "" if row.get(name) is None else f"{row[name] * factor:,.{digits}f}"
            for name, _, digits, factor in PITFALL_FIGURES
        ]
        lines.append([row["model"], row["mistake"] or "none", *figures])
    return ["", "mistake", *(title for _, title, _, _ in PITFALL_FIGURES)], lines


def write_page(
    args: argparse.Namespace, metrics: dict[str, Any], models: list[dict], rows: dict[str, dict], pitfalls: list[dict]
) -> None:
    """Write report.html, with every picture inside."""
    import jinja2

    import charts

    files = sorted([*args.reports.iterdir(), *args.samples.iterdir()])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    columns, lines = table_of([rows["real training digits"], rows["real test digits"], *models])
    page = environment.from_string(TEMPLATE.read_text()).render(
        metrics=metrics,
        rows=rows,
        columns=columns,
        lines=lines,
        pitfalls=pitfall_table(pitfalls),
        models=[(charts.label_of(row["model"]), sample_file(row), by_digit(row)) for row in models],
        images={path.name: inline(path) for path in files if path.suffix in (".png", ".gif")},
    )
    with atomic_path(args.reports / "report.html") as temporary:
        temporary.write_text(page)


def inline(path: Path) -> str:
    """The file as a data URL."""
    kind, _ = mimetypes.guess_type(path.name)
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def write_readme(path: Path, metrics: dict[str, Any], pitfalls: list[dict[str, Any]]) -> None:
    """Put the tables between the README's two marks.

    Raises:
        ExpectedError: the marks are not there.
    """
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ExpectedError(f"{path} has no results section between {BEGIN} and {END}")
    with atomic_path(path) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{results(metrics, pitfalls)}\n{END}{after}")


def results(metrics: dict[str, Any], pitfalls: list[dict[str, Any]]) -> str:
    """The README's tables, in Markdown: the results, and what mistakes do to them."""
    columns, lines = table_of([row for row in metrics["rows"] if row["model"] != "real test digits"])
    mistakes = markdown(*pitfall_table(pitfalls))
    return (
        f"{markdown(['', *columns], [[title, *cells] for title, cells in lines])}\n\n"
        f"What known mistakes do to such figures (`benchmarks/pitfalls.py`; against the training set):\n\n{mistakes}"
    )


def markdown(titles: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, ["---"] * len(titles), *lines])


if __name__ == "__main__":
    run_script(main)
