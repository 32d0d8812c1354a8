"""Which recipe makes most of a given time? Each is trained for the same minutes, then scored in both ways.

A recipe is what differs from the defaults of train_diffusion.py, as `name=value` pairs: width=24, or "muon_lr=0 lr=1e-3".
The number of steps that fit into the time is estimated from a few timed ones, and the learning rates follow the trainer's
schedule over them. Scored is the EMA, as the monitor does: without labels (`fid`), and asked for digits (`fid_asked`).
Results go to reports/ablation.csv, each as soon as it is known; do nothing else on the machine meanwhile.

    python benchmarks/ablation.py --minutes 10
    python benchmarks/ablation.py --minutes 5 --seeds 3 --recipes defaults "muon_lr=0 lr=1e-3" label_dropout=0.2
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from timing import size_of

import data
import flags
from callbacks import EMA, ScheduledLR
from denoising import assemble
from evaluation import FLOOR_SIZES, Extractor, training_scorer
from train_diffusion import parse_args
from training import TrainState
from utils import ExpectedError, choose_device, resolve_precision, run_script, write_csv

RECIPES = ["defaults", "muon_lr=0", "width=8", "width=24", "time_power=1", "label_dropout=0.5"]
FIGURES = ("fid", "fid_ratio", "is", "label_accuracy", "fid_asked", "fid_ratio_asked")
TIMED_STEPS = 15
# What a recipe may set: the rest of the trainer's flags has no effect here
KNOBS = {"width", "timesteps", "schedule", "prediction", "time_power", "stable_targets", "label_dropout", "lr", "muon_lr",
         "grad_clip", "batch_size", "warmup_steps", "ema_decay", "precision",
         "sampler", "steps", "eta", "guidance"}  # fmt: skip


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--recipes", nargs="+", default=RECIPES, help="what to compare, see above")
    flag("--minutes", type=flags.positive_float, default=10.0, help="of training for each recipe")
    flag("--seeds", type=flags.positive_int, default=1, help="training seeds of each recipe")
    flag("--n", type=int, choices=FLOOR_SIZES, default=2000, help="samples in a scoring: a size whose floor is known")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    flag("--out", type=Path, default=Path("reports/ablation.csv"), help="the table to write")
    args = parser.parse_args()

    device = choose_device(args.device)
    digits = data.load_digits("mnist", "train", args.data_dir or data.default_data_dir(), device)
    extractor, rows = Extractor(device), []
    for recipe, seed in itertools.product([(text, trainer_args(text)) for text in args.recipes], range(args.seeds)):
        text, trainer = recipe
        state, network, precision = train(trainer, digits, args.minutes, seed)
        options = {name: getattr(trainer, name) for name in ("sampler", "steps", "eta", "guidance")}
        options["precision"] = precision
        scorer = training_scorer(digits, extractor, args.n, 0, conditional=True, options=options, two_way=True)
        parameters, gflop = size_of(network, device)
        start = time.perf_counter()
        figures = scorer(network)
        rows.append({
            "recipe": text, "seed": seed, "minutes": state.seconds / 60, "device": str(device), "precision": precision,
            "parameters_m": parameters, "gflop": gflop, "steps": state.step,
            "images_per_second": state.images / state.seconds,
            "samples_per_second": 2 * args.n / (time.perf_counter() - start), "n": args.n,
            **{name: figures[name] for name in FIGURES},
        })  # fmt: skip
        write_csv(args.out, rows)
        print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in rows[-1].items()), flush=True)  # fmt: skip
    print(f"wrote {args.out}")


def trainer_args(recipe: str):
    """The trainer's flags for `name=value` pairs, or for "defaults"; `ExpectedError` for one that has no effect here."""
    pairs = [] if recipe == "defaults" else [pair.partition("=") for pair in recipe.split()]
    trainer = parse_args([text for name, _, value in pairs for text in ("--" + name.replace("_", "-"), value)])
    if idle := set(trainer.given) - KNOBS:
        raise ExpectedError(f"{', '.join(sorted(idle))} would have no effect in this comparison; leave it out")
    return trainer


def train(trainer, digits: data.Digits, minutes: float, seed: int):
    """Train for the given minutes; returns the state, the averaged network, and the precision."""
    seconds = [run_steps(trainer, digits, seed, steps)[0].seconds for steps in (TIMED_STEPS, TIMED_STEPS)]
    return run_steps(trainer, digits, seed, max(1, round(TIMED_STEPS / seconds[-1] * 60 * minutes)))


def run_steps(trainer, digits: data.Digits, seed: int, steps: int):
    torch.manual_seed(seed)
    trainer.seed, device = seed, digits.images.device
    precision, state = resolve_precision(trainer.precision, device), TrainState()
    network, optimizers, step = assemble(trainer, state, digits, precision)
    ema = EMA(network, trainer.ema_decay)
    warmup = min(trainer.warmup_steps, steps // 10)  # a short training warms up for less
    schedule = ScheduledLR(list(optimizers.values()), warmup, steps)
    schedule.on_start(state)
    batches = (batch for epoch in itertools.count() for batch in data.epoch_batches(digits, trainer.batch_size, seed, epoch))
    for images, labels in itertools.islice(batches, steps):
        state.count(step(images, labels), len(images))
        ema.after_step(state)
        schedule.after_step(state)
    if device.type == "cuda":
        torch.cuda.synchronize()
    state.tick()
    return state, ema.model, precision


if __name__ == "__main__":
    run_script(main)
