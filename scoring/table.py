"""The score table of evaluate.py: the rows to score, their samples, and metrics.csv with the ratios to the floor."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import file_sha256
from data import NUM_CLASSES
from engine import distributed
from files import ExpectedError, say, write_csv, write_json
from scoring.metrics import estimate

Scores = tuple[dict[str, float], list[dict[str, float]]]  # of `FullScorer.score`: figures, and those of each digit


@dataclasses.dataclass(frozen=True)
class Job:
    """A row to score: a generator, with labels or without, and its options of `sample`."""

    name: str
    path: str
    sha256: str  # of the file, when it was loaded
    generator: Any
    with_labels: bool
    options: dict[str, Any]

    @property
    def sampling(self) -> dict[str, Any]:
        """The options in full, for the table. `precision` is called `dtype` there: it is also the name of a metric."""
        if not self.generator.SAMPLE_OPTIONS:
            return {"dtype": "fp32"}
        options = self.generator.sample_options(with_labels=self.with_labels, **self.options)
        if not self.with_labels:
            options.pop("guidance", None)
        return {"dtype": options.pop("precision", "fp32"), **options}

    @property
    def description(self) -> dict[str, Any]:
        """The columns behind the figures: options of sampling, size of the network, its file and the file's hash."""
        parameters = sum(parameter.numel() for parameter in self.generator.parameters())
        return {**self.sampling, "parameters": parameters, "checkpoint": self.path, "sha256": self.sha256}

    @property
    def evaluations(self) -> int:
        """Network evaluations of one image."""
        options = {name: value for name, value in self.sampling.items() if name != "dtype"}
        return self.generator.evaluations(**options) if options else 1

    def draw(self, n: int, labels: Tensor | None, rng: torch.Generator, bar: tqdm) -> tuple[Tensor, dict[str, float]]:
        """Samples [n, 1, 28, 28], and their cost: network evaluations of an image, counted, and images/s."""
        sizes: list[int] = []
        start = time.perf_counter()

        def count(_module: object, _inputs: object, output: Tensor) -> None:
            sizes.append(len(output))
            bar.update(len(output) * distributed.count())

        hook = self.generator.register_forward_hook(count)
        try:
            samples = distributed.sample(self.generator, n, labels, rng, **self.options).cpu()  # waits for the device
        finally:
            hook.remove()
        seconds = time.perf_counter() - start
        return samples, {"evaluations": distributed.total(sum(sizes)) / n, "images_per_second": n / seconds}


def plan(generators: dict[str, Any], options: dict[str, dict[str, Any]]) -> list[Job]:
    """The rows to score. A class-conditional diffusion model has two: without labels, and with them.

    Args:
        generators: by the path of their file; `options`: those of `sample`, by the same path.

    Raises:
        ExpectedError: a model of other classes than the ten digits.
    """
    jobs = []
    for path, generator in generators.items():
        name, classes, sha256 = generator.model_name, generator.config.num_classes, file_sha256(path)
        if classes not in (0, NUM_CLASSES):
            raise ExpectedError(f"{path} has {classes} classes, and the test set {NUM_CLASSES}; leave it out")
        if generator.SAMPLE_OPTIONS and classes:
            jobs.append(Job(name, path, sha256, generator, False, options[path]))
            name += ", by digit"
        jobs.append(Job(name, path, sha256, generator, classes > 0, options[path]))
    return sorted(jobs, key=lambda job: job.with_labels)


class Table:
    """The rows of metrics.csv and metrics_by_digit.csv. Rows that are added after the floor have their ratio to it.

    `protocol` holds the columns that all rows share, such as n, extractor and reference.
    """

    def __init__(self, protocol: dict[str, Any]):
        self.protocol = protocol
        self.rows: list[dict[str, Any]] = []
        self.digit_rows: list[dict[str, Any]] = []
        self.floor: dict[str, Any] | None = None
        self.digit_floors: list[dict[str, Any] | None] = [None] * NUM_CLASSES

    def add(
        self,
        model: str,
        scores: list[Scores],
        description: dict[str, Any] | None = None,
        together: dict[str, float] | None = None,
        is_floor: bool = False,
    ) -> None:
        """Add and print a row, given the scores of each repetition, and the figures of all repetitions `together`."""
        figures, by_digit = zip(*scores)
        together = together or {}
        head = {"model": model, **self.protocol, "repeats": len(scores)}
        row = {**head, **_with_ratios(summarise(figures), self.floor), **together, **(description or {})}
        digit_rows = [
            {**head, "digit": digit, **_with_ratios(summarise(repeated), self.digit_floors[digit])}
            for digit, repeated in enumerate(zip(*by_digit))
        ]
        if is_floor:
            self.floor = row
            self.digit_floors = [*digit_rows]
        self.rows.append(row)
        self.digit_rows += digit_rows
        _show(row, together)
        _show_digits(digit_rows)

    def write(self, folder: Path, origin: dict[str, Any]) -> None:
        """Write the tables. metrics.json holds both, and `origin`: the command and the versions that they come from."""
        write_csv(folder / "metrics.csv", self.rows)
        write_csv(folder / "metrics_by_digit.csv", self.digit_rows)
        write_json(folder / "metrics.json", {**origin, "rows": self.rows, "rows_by_digit": self.digit_rows})
        say(f"\nwrote {folder}/metrics.csv, metrics_by_digit.csv and metrics.json")


def summarise(scores: tuple[dict[str, float], ...]) -> dict[str, float]:
    """Mean and standard deviation over repetitions: {name: mean, name_std: deviation}."""
    summary = {}
    for name in scores[0]:
        summary[name], summary[f"{name}_std"] = estimate([score[name] for score in scores])
    return summary


def _with_ratios(summary: dict[str, float], floor: dict[str, Any] | None) -> dict[str, float]:
    """The summary, after the ratios of its FIDs to those of the floor, where both are known."""
    ratios = {}
    for name, title in (("fid", "fid_ratio"), ("fid_reweighted", "fid_ratio_reweighted")):
        if floor is not None and name in floor and name in summary:
            ratios[title] = summary[name] / floor[name]
            ratios[f"{title}_std"] = summary[f"{name}_std"] / floor[name]
    return {**ratios, **summary}


def _show(row: dict[str, Any], together: dict[str, float]) -> None:
    """Print a row, one figure a line, with its deviation."""
    lines = [f"\n{row['model']}  (n = {row['n']}, {row['repeats']} repeats)"]
    for name, value in row.items():
        if f"{name}_std" in row:
            deviation = f" +- {row[f'{name}_std']:.4f}" if row["repeats"] > 1 else ""
            lines.append(f"  {name:26s} {value:9.4f}{deviation}")
    lines += [f"  {name:26s} {value:9.4f}" for name, value in together.items()]
    say(*lines)


def _show_digits(rows: list[dict[str, Any]]) -> None:
    """Print the figures of each digit, one digit a line."""
    names = ("fid_ratio", "precision", "recall", "label_accuracy")
    for row in rows:
        figures = (f"{name} {row[name]:.3f}" for name in names if name in row)
        say(f"  digit {row['digit']}   " + "   ".join(figures))
