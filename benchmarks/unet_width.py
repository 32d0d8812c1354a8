"""Which width of the U-Net gives most in a given time? Each width is trained for the same minutes, then scored.

The number of steps that fit into the time is estimated from a few timed ones, and the learning rate follows
train_diffusion.py's schedule over them. Scored is the EMA, as the monitor does. Results go to reports/unet_width.csv, each
as soon as it is known; do nothing else on the machine meanwhile.

    python benchmarks/unet_width.py --minutes 10
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
from denoising import DiffusionStep, make_optimizers
from evaluation import FLOOR_SIZES, Extractor, training_scorer
from models import build
from training import TrainState
from utils import choose_device, resolve_precision, run_script, write_csv

BATCH_SIZE, LEARNING_RATE, MUON_RATE, WARMUP = (
    64,
    2e-3,
    3e-3,
    500,
)  # train_diffusion.py's; short trainings warm up less
TIMED_STEPS = 15


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--widths", type=flags.positive_int, nargs="+", default=[8, 16, 24], help="widths to compare")
    flag("--minutes", type=flags.positive_float, default=10.0, help="of training for each width")
    flag("--seeds", type=flags.positive_int, default=1, help="training seeds of each width")
    flag("--n", type=int, choices=FLOOR_SIZES, default=2000, help="samples in the scoring: a size whose floor is known")
    flag("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: as in train_diffusion.py")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    flag("--out", type=Path, default=Path("reports/unet_width.csv"), help="the table to write")
    args = parser.parse_args()

    device = choose_device(args.device)
    args.precision = resolve_precision(args.precision, device)
    digits = data.load_digits("mnist", "train", args.data_dir or data.default_data_dir(), device)
    extractor, rows = Extractor(device), []
    for width, seed in itertools.product(args.widths, range(args.seeds)):
        state, network = train(args, digits, width, seed)
        scorer = training_scorer(digits, extractor, args.n, 0, conditional=True, options={"steps": 10})
        parameters, gflop = size_of(network, device)
        start = time.perf_counter()
        figures = scorer(network)
        rows.append({
            "width": width, "seed": seed, "minutes": state.seconds / 60, "device": str(device), "precision": args.precision,
            "parameters_m": parameters, "gflop": gflop, "steps": state.step,
            "images_per_second": state.images / state.seconds,
            "samples_per_second": args.n / (time.perf_counter() - start), "n": args.n,
            **{name: figures[name] for name in ("fid", "fid_ratio", "is", "label_accuracy")},
        })  # fmt: skip
        write_csv(args.out, rows)
        print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in rows[-1].items()), flush=True)  # fmt: skip
    print(f"wrote {args.out}")


def train(args, digits: data.Digits, width: int, seed: int):
    """Train for the given minutes; returns the state and the averaged network."""
    torch.manual_seed(seed)
    network = build("ddpm", width=width).to(digits.images.device)
    timed = build("ddpm", width=width).to(digits.images.device)
    seconds = [run_steps(args, digits, timed, seed, steps)[0].seconds for steps in (TIMED_STEPS, TIMED_STEPS)]
    return run_steps(args, digits, network, seed, max(1, round(TIMED_STEPS / seconds[-1] * 60 * args.minutes)))


def run_steps(args, digits: data.Digits, network, seed: int, steps: int):
    optimizers = make_optimizers(network, LEARNING_RATE, MUON_RATE)
    ema, state = EMA(network, 0.999), TrainState()
    schedule = ScheduledLR(list(optimizers.values()), min(WARMUP, steps // 10), steps)
    step = DiffusionStep(network, optimizers, state, seed, args.precision, grad_clip=1.0, label_dropout=0.1, time_power=0.75)
    schedule.on_start(state)
    batches = (batch for epoch in itertools.count() for batch in data.epoch_batches(digits, BATCH_SIZE, seed, epoch))
    for images, labels in itertools.islice(batches, steps):
        state.count(step(images, labels), len(images))
        ema.after_step(state)
        schedule.after_step(state)
    if digits.images.is_cuda:
        torch.cuda.synchronize()
    state.tick()
    return state, ema.model


if __name__ == "__main__":
    run_script(main)
