"""Quality against cost of the diffusion samplers: FID over network evaluations, into reports/samplers.csv and .png.

Every sampler and number of steps is scored with several seeds by the monitor's scorer: n samples, asked for the training
set's own labels, against the training-set statistics (the test set is not used to choose anything). Each result is
written at once, and what the file already holds for the same checkpoint and n is not measured again, so an interrupted
run goes on where it was.

    python benchmarks/samplers.py
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tqdm import tqdm

import data
import flags
import plots
from checkpoint import file_sha256, load_generator
from evaluation import FLOOR_SIZES, Extractor, training_scorer
from metrics import estimate
from utils import ExpectedError, choose_device, run_script, write_csv

STEPS = (5, 7, 10, 15, 20, 30, 50)
KEY = ("checkpoint", "n", "sampler", "steps", "seed")


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--model", default="checkpoints/best_DIFF.pt", help="checkpoint of a diffusion model")
    flag("--n", type=int, choices=FLOOR_SIZES, default=1000, help="samples for each seed: a size whose floor is known")
    flag("--seeds", type=flags.positive_int, default=3, help="seeds of the fast samplers and of 100 ancestral steps")
    flag("--full-seeds", type=flags.natural, default=1, help="seeds of ancestral sampling with every timestep")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    flag("--out-dir", type=Path, default=Path("reports"), help="folder for samplers.csv and samplers.png")
    args = parser.parse_args()

    device = choose_device(args.device)
    model = load_generator(args.model, device)
    if "sampler" not in model.SAMPLE_OPTIONS:
        raise ExpectedError(f"{args.model} holds a {model.model_name}, which has no samplers to compare")
    digits = data.load_digits("mnist", "train", args.data_dir or data.default_data_dir(), device)
    extractor, table = Extractor(device), args.out_dir / "samplers.csv"
    rows = read_rows(table)

    wanted = all_jobs(args, model.config.timesteps)
    jobs = [job for job in wanted if not any(identity(row) == identity(job) for row in rows)]
    with tqdm(total=sum(args.n * int(job["steps"]) for job in jobs), unit="eval", unit_scale=True, smoothing=0) as bar:
        for job in jobs:
            options = {"sampler": job["sampler"], "steps": int(job["steps"]), "watch": lambda x, level: bar.update(len(x))}
            scorer = training_scorer(digits, extractor, args.n, int(job["seed"]), conditional=True, options=options)
            start = time.perf_counter()
            figures = scorer(model)
            rate = args.n / (time.perf_counter() - start)
            kept = {name: f"{figures[name]:.6g}" for name in ("fid", "fid_ratio", "is", "label_accuracy")}
            rows.append({**job, **kept, "images_per_second": f"{rate:.1f}", "device": str(device)})
            write_csv(table, rows)

    shown = {identity(job) for job in wanted}
    summary = summarise([row for row in rows if identity(row) in shown])
    plots.write_sampler_curve(args.out_dir / "samplers.png", summary, f"{args.n} samples, {args.seeds} seeds")
    for name, points in summary.items():
        for steps, fid_ratio in points.items():
            print(f"{name:14s} {steps:5d} evaluations   FID ratio {fid_ratio.mean:.2f} +- {fid_ratio.std:.2f}")
    print(f"wrote {table} and samplers.png")


def all_jobs(args, timesteps: int) -> list[dict[str, str]]:
    """Every measurement, the cheap ones first; ancestral sampling also with every timestep."""
    plan = [(sampler, steps, args.seeds) for steps in STEPS for sampler in ("dpm-solver++", "ddim")]
    plan += [("ddpm", 100, args.seeds), ("ddpm", timesteps, args.full_seeds)]
    checkpoint = file_sha256(args.model)[:16]
    return [
        {"checkpoint": checkpoint, "n": str(args.n), "sampler": sampler, "steps": str(steps), "seed": str(seed)}
        for sampler, steps, seeds in plan for seed in range(seeds) if steps <= timesteps
    ]  # fmt: skip


def identity(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def summarise(rows: list[dict[str, str]]) -> dict:
    """sampler -> steps -> mean and deviation of the FID ratio over the seeds."""
    ratios: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        ratios.setdefault(row["sampler"], {}).setdefault(int(row["steps"]), []).append(float(row["fid_ratio"]))
    return {name: {steps: estimate(values) for steps, values in sorted(points.items())} for name, points in ratios.items()}


if __name__ == "__main__":
    run_script(main)
