"""Ways to sample the diffusion model: quality against cost, into reports/samplers.csv and samplers.png.

Any digit (the null class): DPM-Solver++ with several strengths of noise, and DDIM, over network evaluations; and ancestral
sampling. Digits on demand: guidance, and strengths of noise, with the default steps. Each is scored with several seeds by
the monitor's scorer against the training-set statistics (the test set is not used to choose anything): this is where the
defaults of `DDPM.sample` come from. A result is written at once, and what the file already holds is not measured again: an
interrupted run goes on where it was. Rows of another checkpoint, n, device or precision, and of samplers with other
constants, are dropped.

    python benchmarks/samplers.py
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tqdm import tqdm

import charts
import data
import flags
from checkpoint import file_sha256, load_generator
from diffusion import GUIDANCE_RANGE, NOISE_RANGE, RENEWED_BELOW, RHO, evaluations
from evaluation import FLOOR_SIZES, Extractor, training_scorer
from metrics import estimate
from models import DEFAULT_ETA, DEFAULT_STEPS, DIGIT_ETA
from utils import ExpectedError, choose_device, earlier_rows, run_script, write_csv

FIGURES = ("fid", "fid_ratio", "is", "label_accuracy")
SETTING = ("drawn", "sampler", "steps", "eta", "guidance")
PROTOCOL = ("checkpoint", "constants", "n", "device", "precision")  # one of them in a table
KEY = (*PROTOCOL, *SETTING, "seed")
CONSTANTS = "; ".join(
    (
        f"noise grid {NOISE_RANGE[0]:g}-{NOISE_RANGE[1]:g} rho {RHO}",
        f"renewed below {RENEWED_BELOW:g}, on demand everywhere",
        f"guidance at {GUIDANCE_RANGE[0]:g}-{GUIDANCE_RANGE[1]:g}",
    )
)


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--model", default="checkpoints/best_DIFF.pt", help="checkpoint of a diffusion model")
    flag("--n", type=int, choices=FLOOR_SIZES, default=1000, help="samples for each seed: a size whose floor is known")
    flag("--steps", type=flags.positive_int, nargs="+", default=[5, 10, 15, 20, 50], help="of the fast samplers")
    flag("--eta", type=flags.noise_strength, nargs="+", default=[0.0, DEFAULT_ETA], help="noise of DPM-Solver++")
    flag("--guidance", type=flags.guidance_weight, nargs="+", default=[1.0, 1.5, 2.0, 2.25, 3.0], help="of digits on demand")
    flag("--digit-eta", type=flags.noise_strength, nargs="+", default=[0.0, 0.5, 0.8, 1.0, 1.5, 2.5], help="their noise")
    flag("--seeds", type=flags.positive_int, default=3, help="seeds of the fast samplers and of 100 ancestral steps")
    flag("--full-seeds", type=flags.natural, default=1, help="seeds of ancestral sampling with every timestep")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    flag("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network's evaluations")
    flag("--out-dir", type=Path, default=Path("reports"), help="folder for samplers.csv and samplers.png")
    args = parser.parse_args()

    device = choose_device(args.device)
    model = load_generator(args.model, device)
    if "sampler" not in model.SAMPLE_OPTIONS or model.config.num_classes != data.NUM_CLASSES:
        raise ExpectedError(f"{args.model} holds no diffusion model of ten classes, whose samplers could be compared")
    digits = data.load_digits("mnist", "train", args.data_dir or data.default_data_dir(), device)
    extractor, table = Extractor(device), args.out_dir / "samplers.csv"
    head = {"checkpoint": file_sha256(args.model)[:16], "constants": CONSTANTS, "n": str(args.n), "device": str(device),
            "precision": args.precision}  # fmt: skip
    wanted = [head | job for job in all_jobs(args, model.config.timesteps)]
    rows = [row for row in earlier_rows(table, {*KEY, *FIGURES}) if all(row[name] == head[name] for name in PROTOCOL)]
    done = {identity(row) for row in rows}
    jobs = [job for job in wanted if identity(job) not in done]
    costs = [model.evaluations(job["sampler"], int(job["steps"]), float(job["guidance"])) for job in jobs]
    with tqdm(total=args.n * sum(costs), unit="eval", unit_scale=True, smoothing=0, disable=None) as bar:
        for job in jobs:
            figures = score(model, digits, extractor, args.n, job, bar)
            rows.append({**job, **{name: f"{figures[name]:.6g}" if name in figures else "" for name in FIGURES}})
            write_csv(table, rows)

    write_csv(table, rows)  # also where nothing was left to do but to drop rows
    asked_for = {identity(job) for job in wanted}
    report(args, [row for row in rows if identity(row) in asked_for])


def all_jobs(args, timesteps: int) -> list[dict[str, str]]:
    """Every measurement, the most expensive one last."""
    steps = [steps for steps in args.steps if steps <= timesteps]
    curves = [("any digit", "dpm-solver++", count, eta, 1.0) for count in steps for eta in args.eta]
    curves += [("any digit", "ddim", count, 0.0, 1.0) for count in steps]
    default = min(DEFAULT_STEPS, timesteps)
    choices = [(DIGIT_ETA, weight) for weight in args.guidance] + [(eta, flags.DIGIT_GUIDANCE) for eta in args.digit_eta]
    on_demand = [("on demand", "dpm-solver++", default, eta, weight) for eta, weight in choices]
    full = ("any digit", "ddpm", timesteps, 0.0, 1.0)
    plan = [(setting, args.seeds) for setting in dict.fromkeys([*curves, *on_demand])]
    plan += [(("any digit", "ddpm", 100, 0.0, 1.0), args.seeds)] if timesteps > 100 else []
    return [
        {name: f"{value:g}" if type(value) is float else str(value) for name, value in zip(SETTING, setting)}
        | {"seed": str(seed)}
        for setting, seeds in [*plan, (full, args.full_seeds)]
        for seed in range(seeds)
    ]


def identity(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def score(model, digits: data.Digits, extractor: Extractor, n: int, job: dict[str, str], bar) -> dict[str, float]:
    options = {"sampler": job["sampler"], "steps": int(job["steps"])}
    options |= {"precision": job["precision"], **{name: float(job[name]) for name in ("eta", "guidance")}}
    options["watch"] = lambda x, level: bar.update(len(x) * evaluations(level, options["guidance"]))
    scorer = training_scorer(digits, extractor, n, int(job["seed"]), job["drawn"] == "on demand", options)
    return scorer(model)


def report(args, rows: list[dict[str, str]]) -> None:
    """Print every setting with its spread over the seeds, and draw the curves."""
    curves: dict[str, dict[int, tuple]] = {}
    rows = sorted(rows, key=setting_of)
    for setting, same in itertools.groupby(rows, setting_of):
        same = list(same)
        ratio = estimate([float(row["fid_ratio"]) for row in same])
        spread = "(one seed)" if math.isnan(ratio.std) else f"+- {ratio.std:.2f}"
        line = f"{', '.join(f'{name} {value}' for name, value in zip(SETTING[1:], setting[1:]))}: FID ratio {ratio.mean:.2f}"
        accuracy = estimate([float(row["label_accuracy"]) for row in same if row["label_accuracy"]] or [math.nan]).mean
        print(f"{setting[0]}, {line} {spread}", "" if math.isnan(accuracy) else f"label accuracy {100 * accuracy:.2f} %")
        if setting[0] == "any digit":
            name = setting[1] + (f", eta {setting[3]:g}" if setting[1] == "dpm-solver++" else "")
            curves.setdefault(name, {})[setting[2]] = ratio
    charts.sampler_curve(args.out_dir / "samplers.png", curves, f"{args.n} samples a seed")
    print(f"wrote {args.out_dir / 'samplers.csv'} and samplers.png")


def setting_of(row: dict[str, str]) -> tuple[str, str, int, float, float]:
    return row["drawn"], row["sampler"], int(row["steps"]), float(row["eta"]), float(row["guidance"])


if __name__ == "__main__":
    run_script(main)
