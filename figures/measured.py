"""Read what was measured: metrics.json, the trainers' logs, and the tables of the benchmarks."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from files import ExpectedError, cannot_read, read_text

Row = dict[str, Any]
LOGS = {
    "DCGAN": "gan_training_log.csv",
    "conditional DCGAN": "cgan_training_log.csv",
    "diffusion": "diffusion_training_log.csv",
}
LABELS = {  # model of metrics.json -> its printed name
    "dcgan": "DCGAN",
    "ddpm": "DDPM, unconditional",
    "cdcgan": "conditional DCGAN",
    "ddpm, by digit": "DDPM, class-conditional",
}
ABLATION_TITLES = {"gan": "DCGAN", "cgan": "conditional DCGAN", "diffusion": "DDPM"}
TRAINING_OF = {"dcgan": "DCGAN", "cdcgan": "conditional DCGAN", "ddpm": "diffusion", "ddpm, by digit": "diffusion"}
PITFALL_COLUMNS = {"model", "mistake", "checkpoint", "n", "fid", "fid_ratio", "is", "label_accuracy"}
SELF_CHECK_COLUMNS = {"damage", "level", "n", "fid", "kid", "is", "precision", "recall", "density", "coverage", "two_sample"}
SEED_COLUMNS = {"model", "training_seed", "fid_ratio", "two_sample", "label_accuracy", "command"}
SAMPLER_PROTOCOL = ("n", "device", "precision")
ABLATION_PROTOCOL = ("minutes", "n", "device", "precision")
ABLATION_COLUMNS = {"model", "recipe", "seed", "fid_ratio", "fid_ratio_unconditional", *ABLATION_PROTOCOL}
SAMPLER_COLUMNS = {"checkpoint", "seed", "fid_ratio", "drawn", "sampler", "steps", "eta", "guidance", *SAMPLER_PROTOCOL}


def label_of(model: str) -> str:
    """The printed name of a model of metrics.json."""
    return LABELS.get(model, model)


class Measured(NamedTuple):
    """Everything that the report is drawn from. Rows map columns to numbers, text or None."""

    metrics: dict[str, Any]  # metrics.json
    logs: dict[str, list[Row]]  # training -> its epochs
    pitfalls: list[Row]
    self_check: list[Row]
    samplers: list[Row]
    ablation: list[Row]
    training_seeds: list[Row]

    @property
    def rows(self) -> dict[str, Row]:
        """The rows of metrics.json by their model."""
        return {row["model"]: row for row in self.metrics["rows"]}

    @property
    def models(self) -> list[Row]:
        """The rows of models, without those of real digits."""
        return [row for row in self.metrics["rows"] if row.get("checkpoint")]

    def training_minutes(self, model: str) -> float | None:
        """Minutes of the training behind a row of metrics.json, with its scoring. None: there is no log."""
        training = TRAINING_OF.get(model)
        return self.logs[training][-1]["seconds"] / 60 if training else None


def read_measured(reports: Path) -> Measured:
    """Read the files in `reports`.

    Raises:
        ExpectedError: a file is missing, lacks a column, or was measured with another checkpoint than metrics.json.
    """
    measured = Measured(
        metrics=_read_metrics(reports / "metrics.json"),
        logs={name: _read_csv(reports / file, {"epoch", "fid", "seconds"}) for name, file in LOGS.items()},
        pitfalls=_read_csv(reports / "pitfalls.csv", PITFALL_COLUMNS),
        self_check=_read_csv(reports / "self_check.csv", SELF_CHECK_COLUMNS),
        samplers=_read_csv(reports / "samplers.csv", SAMPLER_COLUMNS),
        ablation=_read_csv(reports / "ablation.csv", ABLATION_COLUMNS),
        training_seeds=_read_csv(reports / "training_seeds.csv", SEED_COLUMNS),
    )
    hashes = {row["sha256"][:16] for row in measured.models}
    for name, rows in (("pitfalls", measured.pitfalls), ("samplers", measured.samplers)):
        if foreign := {row["checkpoint"] for row in rows} - hashes - {None}:
            raise ExpectedError(f"{name}.csv was measured with another checkpoint, {foreign.pop()}; measure it again")
    for name, rows, protocol in (
        ("samplers", measured.samplers, SAMPLER_PROTOCOL),
        ("ablation", measured.ablation, ABLATION_PROTOCOL),
    ):
        if len({tuple(row[column] for column in protocol) for row in rows}) > 1:
            raise ExpectedError(f"{name}.csv holds more than one protocol; remove it and measure it again")
    return measured


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(read_text(path))
        if not all(name in metrics for name in ("command", "versions", "rows", "rows_by_digit")):
            raise ValueError("it lacks some of its entries")
        if missing := {"real training digits", "real test digits", "dcgan"} - {row["model"] for row in metrics["rows"]}:
            raise ValueError(f"it has no {missing.pop()}")
        if any(row["extractor"] != "mnist" for row in metrics["rows"]):
            raise ValueError("it has another extractor than mnist")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise cannot_read(path, error, "cannot be used ({reason}); run evaluate.py first") from error
    return metrics


def _read_csv(path: Path, columns: set[str]) -> list[Row]:
    try:
        lines = csv.DictReader(io.StringIO(read_text(path), newline=""))
        rows = [{name: _value(name, cell) for name, cell in row.items()} for row in lines]
        if not rows or columns - set(rows[0]):
            raise ValueError(f"it lacks {', '.join(sorted(columns - set(rows[0]))) if rows else 'any row'}")
        return rows
    except (OSError, ValueError, TypeError) as error:
        raise cannot_read(path, error, "cannot be used ({reason}); docs/results.md says which command writes it") from error


def _value(name: str, cell: str) -> float | str | None:
    try:
        return cell if name == "checkpoint" and cell else float(cell)  # a hash may consist of digits
    except ValueError:
        return cell or None
