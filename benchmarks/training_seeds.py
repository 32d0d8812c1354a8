"""How far do the figures move with the training seed? Gathers the figures of trainings that differ in nothing else.

Each FOLDER holds metrics.json, as evaluate.py wrote it. The first one is reports/, of the shipped checkpoints. For another
seed of every recipe:

    python train_gan.py --seed 1 --out-dir runs/seed_1                  # with the flags of docs/results.md
    python train_cgan.py --seed 1 --out-dir runs/seed_1
    python train_diffusion.py --seed 1 --out-dir runs/seed_1            # the shipped DDPM: see the table for its flags
    python evaluate.py --models runs/seed_1/checkpoints/best_{GAN_G,CGAN_G,DIFF}.pt --out-dir runs/seed_1/reports
    python benchmarks/training_seeds.py reports runs/seed_1/reports

The table has a row for each model and seed. A seed that no folder holds has a row without figures. It names the command.
There, `--init` gives the first digits of a file's SHA-256.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_cgan
import train_diffusion
import train_gan
from checkpoint import file_sha256, load_generator
from cli import ArgumentParser, expanded_path, integer, run_script
from files import ExpectedError, cannot_read, check_outputs, expanded, read_text, write_csv

FIGURES = ("fid_ratio", "fid_ratio_std", "two_sample", "label_accuracy", "recall", "black")
PROTOCOL = ("n", "extractor", "reference", "repeats")
TRAINERS = {"dcgan": train_gan, "cdcgan": train_cgan, "ddpm": train_diffusion}
# Flags that two seeds of a recipe may differ in: where and how fast it ran
FREE = {"seed", "device", "precision", "compile", "deterministic", "eval_samples", "save_every"}


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("folders", nargs="+", type=expanded_path, metavar="FOLDER", help="folders of metrics.json, the shipped ones first")
    flag("--seeds", type=integer(1, 100), default=3, help="training seeds of a recipe, counted from 0")
    flag("--out", type=expanded, default=Path("reports/training_seeds.csv"), help="the table to write")
    args = parser.parse_args(argv)
    check_outputs(("--out", args.out, (".csv",)))
    rows = [row for folder in args.folders for row in read_rows(Path(folder) / "metrics.json")]
    write_csv(args.out, gathered(rows, args.seeds))
    print(f"wrote {args.out}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The models of a metrics.json, each with its training flags.

    Raises:
        ExpectedError: the file cannot be read, or a checkpoint is not the one that was scored.
    """
    try:
        scored = [row for row in json.loads(read_text(path))["rows"] if row.get("checkpoint")]
        wanted = ("model", "checkpoint", "sha256", *PROTOCOL, *FIGURES)
        rows = [{name: row[name] for name in wanted if row.get(name) is not None} for row in scored]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise cannot_read(path, error, "cannot be used ({reason}); run evaluate.py first") from error
    for row in rows:
        if file_sha256(row["checkpoint"]) != row["sha256"]:
            raise ExpectedError(f"{row['checkpoint']} is not the file that {path} scored; run evaluate.py again")
        generator = load_generator(row["checkpoint"])
        row["flags"] = generator.meta["flags"] | {"black": generator.config.black}  # older checkpoints have no such flag
    return rows


def gathered(rows: list[dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """The table: a row for each model and training seed.

    Raises:
        ExpectedError: two rows of a model that differ in more than the seed, or not even in that.
    """
    table = []
    for model in dict.fromkeys(row["model"] for row in rows):
        same = [row for row in rows if row["model"] == model]
        for row in same[1:]:
            _check_comparable(same[0], row)
        by_seed = {row["flags"]["seed"]: row for row in same}
        if len(by_seed) < len(same):
            raise ExpectedError(f"two trainings of {model} have the same seed; leave one out")
        for seed in sorted({*range(seeds), *by_seed}):
            figures = {name: by_seed.get(seed, {}).get(name, math.nan) for name in (*PROTOCOL, *FIGURES)}
            table.append({"model": model, "training_seed": seed, **figures, "command": command(same[0], seed)})
    return table


def _check_comparable(first: dict[str, Any], row: dict[str, Any]) -> None:
    """Raise `ExpectedError` for another recipe or another protocol."""
    flags = first["flags"].keys() | row["flags"].keys()
    other = [name for name in sorted(flags - FREE) if first["flags"].get(name) != row["flags"].get(name)]
    other += [name for name in PROTOCOL if first[name] != row[name]]
    if other:
        differs = f"{row['checkpoint']} differs from {first['checkpoint']} in {', '.join(other)}"
        raise ExpectedError(f"{differs}, not in the seed alone; leave it out")


def command(row: dict[str, Any], seed: int) -> str:
    """The command that trains the recipe of a row with another seed: what differs from its trainer's defaults."""
    trainer = TRAINERS[row["model"].partition(",")[0]]
    defaults = vars(trainer.parse_args([]))
    typed = []
    for name, value in row["flags"].items():
        if name in FREE or name not in defaults or value == defaults[name]:
            continue
        option = "--" + name.replace("_", "-")
        typed += [option if value else f"--no-{option[2:]}"] if isinstance(value, bool) else [option, str(value)]
    return shlex.join(["python", Path(str(trainer.__file__)).name, *typed, "--seed", str(seed)])


if __name__ == "__main__":
    run_script(main)
