"""The tables of report.py, in Markdown and for its page: every figure of every model, mistakes, damage, and the overview."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from figures.measured import ABLATION_TITLES, Measured, Row, label_of


class Figure(NamedTuple):
    """A line or column of a table: name in metrics.json, title, digits after the point, and factor."""

    name: str
    title: str
    digits: int
    factor: float = 1


class Cells(NamedTuple):
    """A table: the titles of its columns, and the cells of each line."""

    titles: list[str]
    lines: list[list[str]]


ALL_FIGURES = [
    Figure("fid", "FID", 3),
    Figure("fid_ratio", "FID ratio", 1),
    Figure("fid_ratio_reweighted", "FID ratio after re-weighting to the real shares of the digits", 1),
    Figure("two_sample", "two-sample accuracy, %", 1, 100),
    Figure("two_sample_plain", "of a network that sees the images as they are, %", 1, 100),
    Figure("two_sample_noisy", "of one that sees them with noise, %", 1, 100),
    Figure("black", "black pixels, %", 1, 100),
    Figure("kid", "KID", 3),
    Figure("is", "inception score", 3),
    Figure("is_splits", "its deviation over ten splits", 3),
    Figure("precision", "precision", 3),
    Figure("recall", "recall", 3),
    Figure("density", "density", 3),
    Figure("coverage", "coverage", 3),
    Figure("label_accuracy", "label accuracy, %", 2, 100),
    Figure("nearest_median_ratio", "median distance to the nearest training digit / that of test digits", 2),
    Figure("nearest_percentile_ratio", "first percentile of that distance / that of test digits", 2),
    Figure("nearest_share_close", "samples nearer to a training digit than the nearest 1 % of test digits, %", 1, 100),
    Figure("evaluations", "network evaluations of an image", 0),
    Figure("images_per_second", "images/s", 0),
    Figure("parameters", "parameters, million", 2, 1e-6),
]
PITFALL_FIGURES = [
    Figure("n", "samples", 0),
    Figure("fid", "FID", 2),
    Figure("fid_ratio", "FID ratio", 1),
    Figure("is", "inception score", 2),
    Figure("label_accuracy", "label accuracy, %", 1, 100),
]
SELF_CHECK_FIGURES = [
    Figure("level", "level", 0),
    Figure("fid", "FID", 2),
    Figure("kid", "KID", 2),
    Figure("is", "inception score", 2),
    Figure("precision", "precision", 3),
    Figure("recall", "recall", 3),
    Figure("density", "density", 3),
    Figure("coverage", "coverage", 3),
    Figure("two_sample", "two-sample accuracy", 3),
]
SEED_FIGURES = [
    Figure("fid_ratio", "FID ratio", 2),
    Figure("two_sample", "two-sample accuracy, %", 1, 100),
    Figure("label_accuracy", "label accuracy, %", 2, 100),
]
OVERVIEW_FIGURES = [
    Figure("fid_ratio", "FID ratio", 1),
    Figure("fid_ratio_reweighted", "re-weighted", 1),
    Figure("two_sample", "two-sample accuracy, %", 1, 100),
    Figure("black", "black pixels, %", 1, 100),
    Figure("recall", "recall", 3),
    Figure("label_accuracy", "label accuracy, %", 2, 100),
    Figure("evaluations", "network evaluations", 0),
    Figure("images_per_second", "images/s", 0),
]
PORTUGUESE = {
    "FID ratio": "razão FID",
    "re-weighted": "reponderada",
    "two-sample accuracy, %": "acurácia de duas amostras, %",
    "black pixels, %": "pixels pretos, %",
    "recall": "revocação (recall)",
    "label accuracy, %": "acurácia dos rótulos, %",
    "network evaluations": "avaliações da rede",
    "images/s": "imagens/s",
    "training": "treino",
    "real training digits": "dígitos reais de treino",
    "conditional DCGAN": "DCGAN condicional",
    "DDPM, unconditional": "DDPM, incondicional",
    "DDPM, class-conditional": "DDPM, condicional",
}


def all_figures(rows: list[Row]) -> Cells:
    """Every figure with its deviation: a line for each figure, a column for each row of metrics.json."""
    lines = [[figure.title, *(_cell(row, figure) for row in rows)] for figure in ALL_FIGURES]
    lines.append(["precision of the evaluations", *(row.get("dtype") or "" for row in rows)])
    return Cells(["", *(label_of(row["model"]) for row in rows)], lines)


def shares(measured: Measured) -> Cells:
    """The shares of the ten digits in percent: a line for the real digits, and for each model."""
    rows = [row for row in measured.metrics["rows"] if row.get("share_0") is not None]
    figures = [Figure(f"share_{digit}", f"{digit}", 1, 100) for digit in range(10)]
    lines = [[label_of(row["model"]), *_plain_cells(row, figures)] for row in rows]
    return Cells(["", *(figure.title for figure in figures)], lines)


def overview(measured: Measured) -> Cells:
    """The README's small table: a line for each model, under that of the real-data floor."""
    lines = []
    for row in [measured.rows["real training digits"], *measured.models]:
        minutes = measured.training_minutes(row["model"])
        floor = row["model"] == "real training digits"
        cells = ["1" if floor and figure.name.startswith("fid_ratio") else _cell(row, figure) for figure in OVERVIEW_FIGURES]
        lines.append([label_of(row["model"]), *cells, "" if minutes is None else f"{minutes:.1f} min"])
    return Cells(["", *(figure.title for figure in OVERVIEW_FIGURES), "training"], lines)


def pitfalls(rows: list[Row]) -> Cells:
    """Mistakes: a line for each, below the same model without one."""
    lines = [[row["model"], row["mistake"] or "none", *_plain_cells(row, PITFALL_FIGURES)] for row in rows]
    return Cells(["", "mistake", *(figure.title for figure in PITFALL_FIGURES)], lines)


def self_check(rows: list[Row]) -> Cells:
    """Damage to real digits: a line for each kind and level."""
    lines = [[row["damage"], *_plain_cells(row, SELF_CHECK_FIGURES)] for row in rows]
    return Cells(["digits", *(figure.title for figure in SELF_CHECK_FIGURES)], lines)


def ablation(rows: list[Row]) -> Cells:
    """The study of recipes: for each model and recipe, the FID ratio of each training seed and their mean."""
    recipes: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        recipes.setdefault((ABLATION_TITLES.get(str(row["model"]), str(row["model"])), row["recipe"]), []).append(row)
    lines = []
    for (title, recipe), same in sorted(recipes.items(), key=lambda item: (item[0][0], _mean(item[1], "fid_ratio"))):
        seeds = ", ".join(f"{row['fid_ratio']:.1f}" for row in same)
        two_ways = same[0]["fid_ratio_unconditional"] is not None
        unconditional = f"{_mean(same, 'fid_ratio_unconditional'):.1f}" if two_ways else ""
        lines.append([title, f"`{recipe}`", f"{_mean(same, 'fid_ratio'):.1f}", seeds, unconditional])
    return Cells(["model", "recipe", "FID ratio", "of each seed", "unconditional FID ratio"], lines)


def training_seeds(rows: list[Row]) -> Cells:
    """Mean and deviation over the training seeds: a line for each model, and the seeds that could not be trained."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        same = [row for row in rows if row["model"] == model]
        trained = [row for row in same if row["fid_ratio"] is not None]
        summary: Row = {}
        for figure in SEED_FIGURES:
            if values := [row[figure.name] for row in trained if row[figure.name] is not None]:
                summary[figure.name] = statistics.mean(values)
                summary[f"{figure.name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        missing = [row for row in same if row not in trained]
        seeds = (", ".join(f"{row['training_seed']:.0f}" for row in part) for part in (trained, missing))
        lines.append([label_of(model), *seeds, *(_cell(summary, figure) for figure in SEED_FIGURES)])
    return Cells(["", "training seeds", "not trained", *(figure.title for figure in SEED_FIGURES)], lines)


def _mean(rows: list[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def _cell(row: Row, figure: Figure) -> str:
    """A figure with its deviation. Empty: it was not measured."""
    value, deviation = row.get(figure.name), row.get(f"{figure.name}_std")
    if value is None:
        return ""
    spread = f" ± {deviation * figure.factor:,.{figure.digits}f}" if deviation and figure.digits else ""
    return f"{value * figure.factor:,.{figure.digits}f}{spread}"


def _plain_cells(row: Row, figures: list[Figure]) -> list[str]:
    """The figures without deviations."""
    return [_cell({figure.name: row.get(figure.name)}, figure) for figure in figures]


def in_portuguese(cells: Cells) -> Cells:
    """The overview with Portuguese titles, decimal commas, and points between thousands."""
    swap = str.maketrans({",": ".", ".": ","})

    def line(texts: list[str]) -> list[str]:
        first, *figures = texts
        return [PORTUGUESE.get(first, first), *(text.translate(swap) for text in figures)]

    return Cells([PORTUGUESE.get(title, title) for title in cells.titles], [line(texts) for texts in cells.lines])


def markdown(cells: Cells) -> str:
    """A table in Markdown, its figures aligned to the right."""
    align = ["---", *["---:"] * (len(cells.titles) - 1)]
    return "\n".join(f"| {' | '.join(texts)} |" for texts in [cells.titles, align, *cells.lines])
