"""Draw the report from what was measured: charts, reports/report.html and the README's results.

Reads reports/metrics.json (of evaluate.py), the trainers' logs, reports/samplers.csv, pitfalls.csv and self_check.csv (of
benchmarks/), and the shipped pictures; nothing is measured here, so it takes seconds.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import math
import mimetypes
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from flags import ArgumentParser
from utils import ExpectedError, atomic_path, run_script

HERE = Path(__file__).parent
TEMPLATE, DISCUSSION, README = HERE / "report.html.jinja", HERE / "discussion.jinja", HERE / "README.md"
PORTUGUESE, PORTUGUESE_NAME = HERE / "results.pt-BR.jinja", "README.pt-BR.md"
LOGS = {"DCGAN": "gan_training_log.csv", "conditional DCGAN": "cgan_training_log.csv",
        "diffusion": "diffusion_training_log.csv"}  # fmt: skip
Row, Rows = dict[str, Any], list[dict[str, Any]]
BEGIN, END = "<!-- results: written by report.py -->", "<!-- end of results -->"
SAMPLE_COLUMNS = 10  # of a grid of ten rows
NEIGHBOURS, NEIGHBOUR_COLUMNS = 3, 10

# What stands in the tables: name in metrics.json, title, digits after the point, factor
FIGURES = [
    ("fid", "FID", 3, 1), ("fid_ratio", "FID / FID of real digits", 1, 1), ("kid", "KID", 3, 1),
    ("is", "inception score", 3, 1), ("is_splits", "its deviation over ten splits", 3, 1),
    ("precision", "precision", 3, 1), ("recall", "recall", 3, 1),
    ("density", "density", 3, 1), ("coverage", "coverage", 3, 1), ("label_accuracy", "label accuracy, %", 2, 100),
    ("nearest_median_ratio", "distance to training digits / that of test digits: medians", 2, 1),
    ("nearest_percentile_ratio", "the same: first percentiles", 2, 1),
    ("nearest_share_close", "closer than 1 % of test digits are, %", 1, 100),
    ("evaluations", "network evaluations per image", 0, 1), ("images_per_second", "images/s", 0, 1),
    ("parameters", "parameters, million", 2, 1e-6),
]  # fmt: skip
PITFALL_FIGURES = [
    ("n", "samples", 0, 1), ("fid", "FID", 2, 1), ("fid_ratio", "FID / floor", 1, 1), ("is", "inception score", 2, 1),
    ("label_accuracy", "label accuracy, %", 1, 100),
]  # fmt: skip


SAMPLER_SETTING, SAMPLER_PROTOCOL = ("drawn", "sampler", "steps", "eta", "guidance"), ("n", "device", "precision")
SELF_CHECK_FIGURES = [
    ("level", "level", 0, 1), ("fid", "FID", 2, 1), ("kid", "KID", 2, 1), ("is", "inception score", 2, 1),
    ("precision", "precision", 3, 1), ("recall", "recall", 3, 1), ("density", "density", 3, 1),
    ("coverage", "coverage", 3, 1),
]  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--reports", type=Path, default=Path("reports"), help="folder of the figures, and of what is drawn from them")
    flag("--samples", type=Path, default=Path("samples"), help="folder of the pictures and GIFs")
    flag("--readme", type=Path, default=None, help="the file whose results section is rewritten, with that of the "
         f"{PORTUGUESE_NAME} beside it (default: this project's, where --reports and --samples are its own)")  # fmt: skip
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...: draws the samples")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    args = parser.parse_args(argv)
    if args.reports.resolve() == HERE / "reports" and args.samples.resolve() == HERE / "samples":
        args.readme = args.readme or README
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # Read
    measured = read(args.reports)
    paragraphs = discussion(measured)

    # Draw
    draw_charts(args.reports, measured)
    draw_samples(args, measured.models)

    # Write
    write_page(args, measured, paragraphs)
    print(f"wrote {args.reports / 'report.html'} and its figures")
    if args.readme:
        write_readme(args.readme, results(measured, paragraphs))
        print(f"wrote the results in {args.readme}")
        if (translated := args.readme.with_name(PORTUGUESE_NAME)).exists():
            write_readme(translated, render(PORTUGUESE, measured))
            print(f"wrote the results in {translated}")


class Measured(NamedTuple):
    """What the report is drawn from: metrics.json, the logs by training, and the other tables."""

    metrics: dict[str, Any]
    logs: dict[str, Rows]
    pitfalls: Rows
    self_check: Rows
    samplers: Rows

    @property
    def rows(self) -> dict[str, Row]:
        """The rows of metrics.json by their model."""
        return {row["model"]: row for row in self.metrics["rows"]}

    @property
    def models(self) -> Rows:
        """Those that are of models, not of real digits."""
        return [row for row in self.metrics["rows"] if row.get("checkpoint")]


def read(reports: Path) -> Measured:
    """Everything that was measured, from the files in `reports`.

    Raises:
        ExpectedError: one is missing, lacks something, or is of another checkpoint than metrics.json.
    """
    measured = Measured(
        metrics=read_metrics(reports / "metrics.json"),
        logs={name: read_csv(reports / file, {"epoch", "fid", "seconds"}) for name, file in LOGS.items()},
        pitfalls=read_csv(reports / "pitfalls.csv", {"model", "mistake", "checkpoint", *_names(PITFALL_FIGURES)}),
        self_check=read_csv(reports / "self_check.csv", {"damage", "n", *_names(SELF_CHECK_FIGURES)}),
        samplers=read_csv(
            reports / "samplers.csv", {"checkpoint", "seed", "fid_ratio", *SAMPLER_PROTOCOL, *SAMPLER_SETTING}
        ),
    )
    hashes = {row["sha256"][:16] for row in measured.models}
    for table in ("pitfalls", "samplers"):
        if foreign := {row["checkpoint"] for row in getattr(measured, table)} - hashes - {None}:
            raise ExpectedError(f"{table}.csv is of another checkpoint, {foreign.pop()}; measure it again")
    if len({tuple(row[name] for name in SAMPLER_PROTOCOL) for row in measured.samplers}) > 1:
        raise ExpectedError("samplers.csv holds more than one protocol; remove it and measure it again")
    return measured


def _names(figures: list[tuple]) -> list[str]:
    return [name for name, *_ in figures]


def read_metrics(path: Path) -> dict[str, Any]:
    """The content of metrics.json.

    Raises:
        ExpectedError: it is missing, or not of this version.
    """
    try:
        metrics = json.loads(path.read_text())
        if not all(name in metrics for name in ("command", "versions", "rows", "rows_by_digit")):
            raise ValueError("it lacks some of its entries")
        if missing := {"real training digits", "real test digits", "dcgan"} - {row["model"] for row in metrics["rows"]}:
            raise ValueError(f"it has no {missing.pop()}")
        if any(row["extractor"] != "mnist" for row in metrics["rows"]):
            raise ValueError("it is of another extractor than mnist")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExpectedError(f"{path} cannot be read ({error}); run evaluate.py first") from error
    return metrics


def read_csv(path: Path, columns: set[str]) -> Rows:
    """The rows of a CSV file, numbers as floats, empty cells as None; `ExpectedError` where it lacks one of the columns."""
    try:
        with path.open() as file:
            rows = [{name: _number(name, cell) for name, cell in row.items()} for row in csv.DictReader(file)]
        if not rows or columns - set(rows[0]):
            raise ValueError(f"it lacks {', '.join(sorted(columns - set(rows[0]))) if rows else 'any row'}")
        return rows
    except (OSError, ValueError, TypeError) as error:
        raise ExpectedError(f"{path} cannot be read ({error}); the README says which command writes it") from error


def _number(name: str, cell: str) -> float | str | None:
    try:
        return cell if name == "checkpoint" and cell else float(cell)  # a hash may have digits alone
    except ValueError:
        return cell or None


def sampler_ratios(rows: Rows) -> dict[tuple, tuple[float, float, int]]:
    """samplers.csv over its seeds: (drawn, sampler, steps, eta, guidance) -> mean and deviation of the FID ratio, seeds."""
    from metrics import estimate

    ratios: dict[tuple, list[float]] = {}
    for row in rows:
        ratios.setdefault(tuple(row[name] for name in SAMPLER_SETTING), []).append(row["fid_ratio"])
    return {setting: (*estimate(values), len(values)) for setting, values in ratios.items()}


def draw_charts(folder: Path, measured: Measured) -> None:
    """The charts of metrics.json and of the logs."""
    import charts

    rows, models = measured.rows, measured.models
    charts.compare(folder / "fid_comparison.png", models, "fid", "FID (mnist extractor)", rows["real training digits"])
    charts.compare(folder / "is_comparison.png", models, "is", "inception score", rows["real test digits"])
    charts.training_curves(folder / "loss_comparison.png", measured.logs)
    charts.quality_against_cost(folder / "quality_against_cost.png", models)
    scored = [row for row in measured.metrics["rows_by_digit"] if row.get("fid_ratio") is not None]
    charts.heat_map(folder / "fid_by_digit.png", scored)


def draw_samples(args: argparse.Namespace, models: Rows) -> None:
    """A grid of samples of each model, and some of them above their closest training digits."""
    import torch

    import charts
    import data
    import plots
    from checkpoint import file_sha256, load_generator
    from utils import choose_device, has_bf16, keyed_generator

    device = choose_device(args.device)
    train = data.load_digits("mnist", "train", args.data_dir or data.default_data_dir(), device).images
    panels = []
    for row in models:
        if file_sha256(row["checkpoint"]) != row["sha256"]:
            raise ExpectedError(f"{row['checkpoint']} is not the file of metrics.json any more; run evaluate.py again")
        generator = load_generator(row["checkpoint"], device)
        labels = torch.arange(data.NUM_CLASSES).repeat_interleave(SAMPLE_COLUMNS) if by_digit(row) else None
        options = {name: row[name] for name in ("sampler", "steps", "eta", "guidance") if row.get(name) is not None}
        if options:
            options["precision"] = row["dtype"] if has_bf16(device) else "fp32"
        rng = keyed_generator("cpu", 0, "report")
        samples = data.to_uint8(generator.sample(data.NUM_CLASSES * SAMPLE_COLUMNS, labels, rng, **options))
        plots.write_png(args.reports / sample_file(row), plots.image_grid(samples, SAMPLE_COLUMNS))
        shown = samples[:: SAMPLE_COLUMNS * data.NUM_CLASSES // NEIGHBOUR_COLUMNS][:NEIGHBOUR_COLUMNS]
        distances = torch.cdist(shown.flatten(1).float(), train.flatten(1).float())
        nearest = train[distances.topk(NEIGHBOURS, largest=False).indices]  # [columns, neighbours, 1, 28, 28]
        panels.append((charts.label_of(row["model"]), shown[:, 0].cpu().numpy(), nearest[:, :, 0].cpu().numpy()))
    charts.neighbours(args.reports / "nearest_neighbours.png", panels)


def by_digit(row: Row) -> bool:
    """Whether digits were asked for in this row."""
    return row.get("label_accuracy") is not None


def sample_file(row: Row) -> str:
    """The file of a model's grid, such as samples_ddpm_by_digit.png."""
    return f"samples_{row['model'].replace(', ', '_').replace(' ', '_')}.png"


def table_of(rows: Rows) -> tuple[list[str], list[tuple[str, list[str]]]]:
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
    lines.append(("precision of the evaluations", [row.get("dtype") or "" for row in rows]))
    return [charts.label_of(row["model"]) for row in rows], lines


def pitfall_table(pitfalls: Rows) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns, and the cells of each line: a mistake below the same model without it."""
    lines = [[row["model"], row["mistake"] or "none", *cells_of(row, PITFALL_FIGURES)] for row in pitfalls]
    return ["", "mistake", *(title for _, title, _, _ in PITFALL_FIGURES)], lines


def self_check_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns, and the cells of each line: a damage to real digits at one level."""
    lines = [[row["damage"], *cells_of(row, SELF_CHECK_FIGURES)] for row in rows]
    return ["digits", *(title for _, title, _, _ in SELF_CHECK_FIGURES)], lines


def cells_of(row: Row, figures: list[tuple[str, str, int, float]]) -> list[str]:
    """The figures of a row as text; an empty cell where one is missing."""
    return ["" if row.get(name) is None else f"{row[name] * factor:,.{digits}f}" for name, _, digits, factor in figures]


def discussion(measured: Measured) -> list[tuple[str, str]]:
    """What the figures say: (title, text) of each paragraph; errors as of `render`."""
    parts = (" ".join(part.split()) for part in render(DISCUSSION, measured).split("\n\n"))
    return [(title, rest.strip()) for title, _, rest in (part.partition(": ") for part in parts if part)]


def render(template: Path, measured: Measured) -> str:
    """A text with the figures filled in from the files.

    Raises:
        ExpectedError: a model, mistake or sampler that the text speaks of was not measured.
    """
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    rows = measured.rows
    known = {
        "dcgan": rows.get("dcgan"),
        "cdcgan": rows.get("cdcgan"),
        "ddpm": rows.get("ddpm"),
        "by_digit": rows.get("ddpm, by digit"),
        "floor": rows["real training digits"],
        "test": rows["real test digits"],
        "minutes": {name: log[-1]["seconds"] / 60 for name, log in measured.logs.items()},
        "level": level,
        "weakest": {row["model"]: weakest_digit(measured.metrics["rows_by_digit"], row["model"]) for row in measured.models},
        "mistakes": {(row["model"], row["mistake"] or ""): row for row in measured.pitfalls},
        "samplers": sampler_ratios(measured.samplers),
        "sampler_n": int(measured.samplers[0]["n"]),
    }
    try:
        return environment.from_string(template.read_text()).render(known).strip()
    except (jinja2.UndefinedError, TypeError) as error:
        raise ExpectedError(
            f"{template.name} speaks of what was not measured ({error}); run the README's commands"
        ) from error


def level(ours: Row, theirs: Row) -> bool:
    """Whether two FID ratios are too close for their deviations to tell which is better."""
    gap, deviation = ours["fid_ratio"] - theirs["fid_ratio"], math.hypot(ours["fid_ratio_std"], theirs["fid_ratio_std"])
    return abs(gap) < 2 * deviation


def weakest_digit(rows_by_digit: Rows, model: str) -> Row | None:
    """The digit of a model whose FID is the most times its floor; None for a model that is not asked for digits."""
    rows = [row for row in rows_by_digit if row["model"] == model]
    return max(rows, key=lambda row: row["fid_ratio"], default=None)


def write_page(args: argparse.Namespace, measured: Measured, paragraphs: list[tuple[str, str]]) -> None:
    """Write report.html, with every picture inside."""
    import jinja2

    import charts

    files = sorted([*args.reports.iterdir(), *args.samples.iterdir()])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    rows, models = measured.rows, measured.models
    columns, lines = table_of([rows["real training digits"], rows["real test digits"], *models])
    try:
        page = environment.from_string(TEMPLATE.read_text()).render(
            metrics=measured.metrics,
            rows=rows,
            columns=columns,
            lines=lines,
            pitfalls=pitfall_table(measured.pitfalls),
            self_check=self_check_table(measured.self_check),
            check_n=int(measured.self_check[0]["n"]),
            discussion=paragraphs,
            models=[(charts.label_of(row["model"]), sample_file(row), by_digit(row)) for row in models],
            images={path.name: inline(path) for path in files if path.suffix in (".png", ".gif")},
        )
    except jinja2.UndefinedError as error:  # a picture that is missing
        raise ExpectedError(f"the page lacks something: {error}; the README says which command writes it") from error
    with atomic_path(args.reports / "report.html") as temporary:
        temporary.write_text(page)


def inline(path: Path) -> str:
    """The file as a data URL."""
    kind, _ = mimetypes.guess_type(path.name)
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def write_readme(path: Path, section: str) -> None:
    """Put `section` between the README's two marks.

    Raises:
        ExpectedError: the marks are not there.
    """
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ExpectedError(f"{path} has no results section between {BEGIN} and {END}")
    with atomic_path(path) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{section}\n{END}{after}")


def results(measured: Measured, paragraphs: list[tuple[str, str]]) -> str:
    """What report.py writes into the README, in Markdown: the results, what they say, and what mistakes do to them."""
    columns, lines = table_of([measured.rows["real training digits"], *measured.models])
    mistakes = markdown(*pitfall_table(measured.pitfalls))
    text = "\n\n".join(textwrap.fill(f"**{title}.** {rest}", 124, break_on_hyphens=False) for title, rest in paragraphs)
    return (
        f"{markdown(['', *columns], [[title, *cells] for title, cells in lines])}\n\n{text}\n\n"
        "What known mistakes do to such figures (`benchmarks/pitfalls.py`; against the training set; the diffusion model\n"
        f"on demand, by ancestral sampling):\n\n{mistakes}"
    )


def markdown(titles: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, ["---"] * len(titles), *lines])


if __name__ == "__main__":
    run_script(main)
