"""Ways to sample the diffusion model: quality against cost. The defaults of `DDPM.sample` come from here.

Unconditional samples compare DPM-Solver++ with several values of eta, DDIM, and ancestral sampling, over several numbers of
steps. Class-conditional samples compare guidance scales, values of eta, and numbers of steps, with the other two at their
defaults. Each setting is scored with several seeds, by the monitor's scorer against the training set. The test set chooses
nothing.

The results are written to reports/samplers.csv, each at once, and drawn in reports/samplers.png. An interrupted run goes on
where it stopped: rows that are there already are not measured again. Rows of another checkpoint, n, device or precision are
dropped. So are rows of samplers with other constants.

    python benchmarks/samplers.py
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch import Tensor
from tqdm import tqdm

import data
from checkpoint import file_sha256, load_generator
from cli import CUDA_DEVICE_HELP, DATA_DIR_HELP, ETA, GUIDANCE, OUT_DIR, ArgumentParser, expanded_path, integer, run_script
from diffusion.options import CONDITIONAL_ETA, CONDITIONAL_STEPS, PRECISIONS, SCRIPT_GUIDANCE, UNCONDITIONAL_ETA
from diffusion.process import Level
from diffusion.samplers import GUIDANCE_RANGE, NOISE_RANGE, RENEWED_BELOW, RHO, evaluations
from figures import charts
from files import ExpectedError, check_writable, earlier_rows, expanded, find_default, write_csv
from scoring.extractor import Extractor
from scoring.metrics import Estimate, estimate
from scoring.reference import FLOOR_SIZES
from scoring.scorer import training_scorer
from utils import choose_device

UNCONDITIONAL = "unconditional"  # values of the column `drawn`
CONDITIONAL = "class-conditional"
FIGURES = ("fid", "fid_ratio", "is", "label_accuracy")
SETTING = ("drawn", "sampler", "steps", "eta", "guidance")
PROTOCOL = ("checkpoint", "constants", "n", "device", "precision")  # one of them in a table
KEY = (*PROTOCOL, *SETTING, "seed")
CONSTANTS = "; ".join(
    (
        f"noise grid {NOISE_RANGE[0]:g}-{NOISE_RANGE[1]:g} rho {RHO}",
        f"noise below {RENEWED_BELOW:g}, class-conditional everywhere",
        f"guidance at {GUIDANCE_RANGE[0]:g}-{GUIDANCE_RANGE[1]:g}",
    )
)

Row = dict[str, str]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--model", type=expanded_path, default=None, help="a diffusion model's checkpoint (default: the shipped one)")
    flag("--n", type=int, choices=FLOOR_SIZES, default=1000, help="samples for each seed: a size whose floor is known")
    flag("--steps", type=integer(1), nargs="+", default=[5, 10, 15, 20, 50], help="of DPM-Solver++ and DDIM")
    flag("--eta", type=ETA, nargs="+", default=[0.0, UNCONDITIONAL_ETA], help="of unconditional DPM-Solver++")
    flag("--guidance", type=GUIDANCE, nargs="+", default=[1.0, 1.5, 2.0, SCRIPT_GUIDANCE, 3.0], help="guidance scales")
    etas = [0.0, CONDITIONAL_ETA, 0.8, 1.5]
    flag("--digit-eta", type=ETA, nargs="+", default=etas, help="of class-conditional samples")
    flag("--seeds", type=integer(1), default=3, help="seeds of DPM-Solver++, of DDIM, and of 100 ancestral steps")
    flag("--full-seeds", type=integer(0), default=1, help="seeds of ancestral sampling with every timestep")
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    flag("--device", default="auto", help=CUDA_DEVICE_HELP)
    flag("--precision", choices=PRECISIONS, default="fp32", help="of the network's evaluations")
    flag(*OUT_DIR, type=expanded, default=Path("reports"), help="folder for samplers.csv and samplers.png")
    args = parser.parse_args(argv)
    check_writable(args.out_dir)
    args.model = args.model or find_default("checkpoints/best_DIFF.pt")

    device = choose_device(args.device, apple=False)
    model = load_generator(args.model, device)
    if "sampler" not in model.SAMPLE_OPTIONS or model.config.num_classes != data.NUM_CLASSES:
        raise ExpectedError(f"{args.model} holds no diffusion model of ten classes, whose samplers could be compared")
    digits = data.load_digits("mnist", "train", args.data_dir or data.default_data_dir(), device)
    extractor = Extractor(device)
    table = args.out_dir / "samplers.csv"
    head = {
        "checkpoint": file_sha256(args.model)[:16],
        "constants": CONSTANTS,
        "n": str(args.n),
        "device": str(device),
        "precision": args.precision,
    }
    wanted = [head | job for job in all_jobs(args, model.config.timesteps)]
    rows = [row for row in earlier_rows(table, {*KEY, *FIGURES}) if all(row[name] == head[name] for name in PROTOCOL)]
    done = {identity(row) for row in rows}
    jobs = [job for job in wanted if identity(job) not in done]
    costs = [
        model.evaluations(sampler=job["sampler"], steps=int(job["steps"]), guidance=float(job["guidance"])) for job in jobs
    ]
    with tqdm(total=args.n * sum(costs), unit="eval", unit_scale=True, smoothing=0, disable=None) as bar:
        for job in jobs:
            figures = score(model, digits, extractor, args.n, job, bar)
            rows.append({**job, **{name: f"{figures[name]:.6g}" if name in figures else "" for name in FIGURES}})
            write_csv(table, rows)

    write_csv(table, rows)  # with nothing left to measure, it may still drop rows
    chosen = {identity(job) for job in wanted}
    report(args, [row for row in rows if identity(row) in chosen])


def all_jobs(args: argparse.Namespace, timesteps: int) -> list[Row]:
    """Every measurement, the most expensive one last."""
    steps = [steps for steps in args.steps if steps <= timesteps]
    curves = [(UNCONDITIONAL, "dpm-solver++", count, eta, 1.0) for count in steps for eta in args.eta]
    curves += [(UNCONDITIONAL, "ddim", count, 0.0, 1.0) for count in steps]
    default = min(CONDITIONAL_STEPS, timesteps)
    choices = [(CONDITIONAL_ETA, scale) for scale in args.guidance] + [(eta, SCRIPT_GUIDANCE) for eta in args.digit_eta]
    conditional = [(CONDITIONAL, "dpm-solver++", default, eta, scale) for eta, scale in choices]
    conditional += [(CONDITIONAL, "dpm-solver++", count, CONDITIONAL_ETA, SCRIPT_GUIDANCE) for count in steps]
    full = (UNCONDITIONAL, "ddpm", timesteps, 0.0, 1.0)
    plan = [(setting, args.seeds) for setting in dict.fromkeys([*curves, *conditional])]
    plan += [((UNCONDITIONAL, "ddpm", 100, 0.0, 1.0), args.seeds)] if timesteps > 100 else []
    return [
        {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in zip(SETTING, setting)}
        | {"seed": str(seed)}
        for setting, seeds in [*plan, (full, args.full_seeds)]
        for seed in range(seeds)
    ]


def identity(row: Row) -> tuple[str, ...]:
    """What distinguishes a measurement from others."""
    return tuple(row[name] for name in KEY)


def score(model: Any, digits: data.Digits, extractor: Extractor, n: int, job: Row, bar: tqdm) -> dict[str, float]:
    """The figures of a measurement."""
    guidance = float(job["guidance"])

    def watch(x: Tensor, level: Level) -> None:
        bar.update(len(x) * evaluations(level, guidance))

    options = {
        "sampler": job["sampler"],
        "steps": int(job["steps"]),
        "eta": float(job["eta"]),
        "guidance": guidance,
        "precision": job["precision"],
        "watch": watch,
    }
    scorer = training_scorer(digits, extractor, n, int(job["seed"]), job["drawn"] == CONDITIONAL, options)
    return scorer(model)


def report(args: argparse.Namespace, rows: list[Row]) -> None:
    """Print every setting with its deviation over the seeds, and draw the curves."""
    curves: dict[str, dict[int, tuple[float, float]]] = {}
    for setting, group in itertools.groupby(sorted(rows, key=setting_of), setting_of):
        drawn, sampler, steps, eta, _ = setting
        same = list(group)
        ratio = estimate([float(row["fid_ratio"]) for row in same])
        accuracies = [float(row["label_accuracy"]) for row in same if row["label_accuracy"]]
        options = ", ".join(f"{name} {value}" for name, value in zip(SETTING[1:], setting[1:]))
        print(f"{drawn}, {options}: {summary(ratio, accuracies)}")
        if drawn == UNCONDITIONAL:
            name = sampler + (f", eta {eta:g}" if sampler == "dpm-solver++" else "")
            curves.setdefault(name, {})[steps] = ratio
    charts.sampler_curve(args.out_dir / "samplers.png", curves, f"{args.n} samples a seed")
    print(f"wrote {args.out_dir / 'samplers.csv'} and samplers.png")


def summary(ratio: Estimate, accuracies: list[float]) -> str:
    """A line's figures: the FID ratio with its deviation, and label accuracy if it was measured."""
    spread = "(one seed)" if math.isnan(ratio.std) else f"+- {ratio.std:.2f}"
    accuracy = f" label accuracy {100 * estimate(accuracies).mean:.2f} %" if accuracies else ""
    return f"FID ratio {ratio.mean:.2f} {spread}{accuracy}"


def setting_of(row: Row) -> tuple[str, str, int, float, float]:
    """The setting of a row, with numbers as numbers, so that it sorts by them."""
    return row["drawn"], row["sampler"], int(row["steps"]), float(row["eta"]), float(row["guidance"])


if __name__ == "__main__":
    run_script(main)
