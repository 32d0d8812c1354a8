"""Quality against cost of the diffusion samplers: FID over network evaluations, into reports/samplers.csv and .png.

Every sampler and number of steps is scored with several seeds by the monitor's scorer: n samples, asked for the training
set's own labels, against the training-set statistics (the test set is not used to choose anything). Each result is
written at once, and what the file already holds for the same checkpoint, n and device is not measured again, so an
interrupted run goes on where it was; rows of other checkpoints are dropped. "even in log-SNR" is DPM-Solver++ on another
grid than ours, which is even in time: times at equal steps of the logarithm of the signal-to-noise ratio.

    python benchmarks/samplers.py
"""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

from tqdm import tqdm

import charts
import data
import diffusion
import flags
from checkpoint import file_sha256, load_generator
from evaluation import FLOOR_SIZES, Extractor, training_scorer
from metrics import estimate
from utils import ExpectedError, choose_device, run_script, write_csv

KEY = ("checkpoint", "n", "device", "sampler", "steps", "seed")
LOG_SNR = "even in log-SNR"


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--model", default="checkpoints/best_DIFF.pt", help="checkpoint of a diffusion model")
    flag("--n", type=int, choices=FLOOR_SIZES, default=1000, help="samples for each seed: a size whose floor is known")
    flag("--steps", type=flags.positive_int, nargs="+", default=[5, 7, 10, 15, 20, 30, 50], help="of the fast samplers")
    flag("--seeds", type=flags.positive_int, default=3, help="seeds of the fast samplers and of 100 ancestral steps")
    flag("--full-seeds", type=flags.natural, default=1, help="seeds of ancestral sampling with every timestep")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    flag("--out-dir", type=Path, default=Path("reports"), help="folder for samplers.csv and samplers.png")
    args = parser.parse_args()

    device = choose_device(args.device)
    model = load_generator(args.model, device)
    if "sampler" not in model.SAMPLE_OPTIONS or model.config.num_classes != data.NUM_CLASSES:
        raise ExpectedError(f"{args.model} holds no diffusion model of ten classes, whose samplers could be compared")
    digits = data.load_digits("mnist", "train", args.data_dir or data.default_data_dir(), device)
    extractor, table = Extractor(device), args.out_dir / "samplers.csv"
    wanted = all_jobs(args, model.config.timesteps, str(device))
    rows = [row for row in read_rows(table) if row["checkpoint"] == wanted[0]["checkpoint"]]
    jobs = [job for job in wanted if not any(identity(row) == identity(job) for row in rows)]
    total = sum(args.n * int(job["steps"]) for job in jobs)
    with tqdm(total=total, unit="eval", unit_scale=True, smoothing=0, disable=None) as bar:
        for job in jobs:
            options = {"sampler": job["sampler"], "steps": int(job["steps"]), "watch": lambda x, level: bar.update(len(x))}
            sampled = model
            if job["sampler"] == LOG_SNR:
                sampled, options["sampler"] = OnAnotherGrid(model), "dpm-solver++"
            scorer = training_scorer(digits, extractor, args.n, int(job["seed"]), conditional=True, options=options)
            figures = scorer(sampled)
            rows.append({**job, **{name: f"{figures[name]:.6g}" for name in ("fid", "fid_ratio", "is", "label_accuracy")}})
            write_csv(table, rows)

    write_csv(table, rows)  # also where nothing was left to do but to drop rows
    summary = summarise([row for row in rows if (row["n"], row["device"]) == (str(args.n), str(device))])
    charts.sampler_curve(args.out_dir / "samplers.png", summary, f"{args.n} samples a seed")
    for name, points in summary.items():
        for steps, fid_ratio in points.items():
            spread = "(one seed)" if math.isnan(fid_ratio.std) else f"+- {fid_ratio.std:.2f}"
            print(f"{name:24s} {steps:5d} evaluations   FID ratio {fid_ratio.mean:.2f} {spread}")
    print(f"wrote {table} and samplers.png")


class OnAnotherGrid:
    """A diffusion model whose samplers evaluate at even steps of log-SNR."""

    def __init__(self, model):
        self.model = model

    def sample(self, *args, **options):
        with mock.patch.object(diffusion, "time_grid", log_snr_grid):
            return self.model.sample(*args, **options)


def log_snr_grid(levels: list[diffusion.Level], steps: int) -> list[diffusion.Level]:
    """`steps` levels nearest to even steps of log-SNR, from the last time to the first, and the clean image."""
    first, last = levels[-1].half_log_snr, levels[0].half_log_snr
    aims = [first + (last - first) * i / max(1, steps - 1) for i in range(steps)]
    nearest = {min(range(len(levels)), key=lambda t: abs(levels[t].half_log_snr - aim)) for aim in aims}
    return [levels[t] for t in sorted(nearest, reverse=True)] + [diffusion.CLEAN]


def all_jobs(args, timesteps: int, device: str) -> list[dict[str, str]]:
    """Every measurement, the cheap ones first; ancestral sampling also with every timestep."""
    plan = [(sampler, steps, args.seeds) for steps in args.steps for sampler in ("dpm-solver++", "ddim")]
    plan += [(LOG_SNR, steps, args.seeds) for steps in args.steps if 10 <= steps <= 15]
    plan += [("ddpm", 100, args.seeds), ("ddpm", timesteps, args.full_seeds)]
    head = {"checkpoint": file_sha256(args.model)[:16], "n": str(args.n), "device": device}
    return [
        {**head, "sampler": sampler, "steps": str(steps), "seed": str(seed)}
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
