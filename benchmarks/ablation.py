"""Which recipe makes most of a given time? Each is trained for the same minutes, then scored, with every seed.

A recipe is what differs from the defaults of the model's trainer, as `name=value` pairs: width=24, or "muon_lr=0 lr=1e-3";
`no_ema` is a switch; "defaults" differs in nothing. With preset=reference among the pairs, it differs from the classic table
instead. The number of steps that fit into the time is estimated from a few timed ones, and the learning rates follow the
trainer's schedule over them. Scored is the EMA, as the monitor does: the GANs with their own labels, a diffusion model
without labels (`fid`) and asked for digits (`fid_asked`).

Results go to reports/ablation.csv, each as soon as it is known; rows that are there already are not measured again. The
chart beside it, ablation.png, shows those of the same minutes, samples, device and precision. Do nothing else on the
machine meanwhile.

    python benchmarks/ablation.py --model gan --minutes 5
    python benchmarks/ablation.py --model diffusion --minutes 10 --recipes defaults "muon_lr=0 lr=1e-3" label_dropout=0.2
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from timing import wait_for_device
from torch import nn

import adversarial
import charts
import data
import denoising
import flags
import train_cgan
import train_diffusion
import train_gan
from callbacks import EMA, ScheduledLR
from evaluation import FLOOR_SIZES, Extractor, training_scorer
from graphs import ORDINARY_CALLS
from training import TrainState
from utils import ExpectedError, choose_device, earlier_rows, has_bf16, run_script, write_csv

# From the classic table one thing changed at a time; from the defaults one thing put back, or another choice
REFERENCE = "preset=reference"
GAN_CHANGES = ("loss=hinge", "loss=relativistic", "no_ema", "beta1=0", "lr=5e-4 d_lr=5e-4", "width=32", "batch_size=64")
GAN_RETURNS = ("loss=bce", "loss=relativistic", "no_ema", "beta1=0.5", "lr=1e-4 d_lr=1e-4", "width=64", "batch_size=64",
               "lr_schedule=constant")  # fmt: skip
DIFFUSION_CHANGES = ("schedule=cosine", "prediction=v", "label_dropout=0.5", "no_ema", "lr=1e-3", "lr_schedule=cosine",
                     "width=24", "muon_lr=3e-3")  # fmt: skip
DIFFUSION_RETURNS = ("schedule=linear", "prediction=eps", "label_dropout=0.1", "no_ema", "muon_lr=0", "width=8", "width=24",
                     "batch_size=128", "stable_targets=0", "time_power=1", "lr_schedule=constant")  # fmt: skip
GAN_RECIPES = [REFERENCE, *(f"{REFERENCE} {change}" for change in GAN_CHANGES), "defaults", *GAN_RETURNS]
DIFFUSION_RECIPES = [REFERENCE, *(f"{REFERENCE} {change}" for change in DIFFUSION_CHANGES), "defaults", *DIFFUSION_RETURNS]
RECIPES = {"gan": GAN_RECIPES, "cgan": GAN_RECIPES, "diffusion": DIFFUSION_RECIPES}
PARSERS = {"gan": train_gan.parse_args, "cgan": train_cgan.parse_args, "diffusion": train_diffusion.parse_args}
FIGURES = ("fid", "fid_ratio", "is", "label_accuracy", "fid_asked", "fid_ratio_asked")
COMPARED = ("minutes", "device", "precision", "n")  # what the rows of a chart have in common
KEY = ("model", "recipe", "seed", *COMPARED)  # of a row
UNTIMED_STEPS = adversarial.PENALTY_EVERY * ORDINARY_CALLS + 1  # until a GPU has recorded whatever it replays later
TIMED_STEPS = 15
# What a recipe may set: the rest of a trainer's flags has no effect here
SHARED_KNOBS = {"preset", "width", "lr", "lr_schedule", "warmup_steps", "ema", "ema_decay", "batch_size"}
GAN_KNOBS = SHARED_KNOBS | {"latent_dim", "loss", "beta1", "d_lr"}
DIFFUSION_KNOBS = SHARED_KNOBS | {"timesteps", "schedule", "prediction", "time_power", "stable_targets", "label_dropout",
                                  "muon_lr", "grad_clip", "sampler", "steps", "eta", "guidance"}  # fmt: skip


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--model", choices=PARSERS, default="diffusion", help="whose trainer's defaults to start from")
    flag("--recipes", nargs="+", default=None, help="what to compare, see above (default: a list for each model)")
    flag("--minutes", type=flags.positive_float, default=5.0, help="of training for each recipe")
    flag("--seeds", nargs="+", type=flags.seed_number, default=[0, 1], help="training seeds of each recipe")
    flag("--n", type=int, choices=FLOOR_SIZES, default=2000, help="samples in a scoring: a size whose floor is known")
    flag("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the device has it")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    flag("--out", type=Path, default=Path("reports/ablation.csv"), help="the table to write")
    args = parser.parse_args()

    device = choose_device(args.device)
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(device) else "fp32"
    recipes = {text: trainer_args(args.model, text) for text in args.recipes or RECIPES[args.model]}
    digits = data.load_digits("mnist", "train", args.data_dir or data.default_data_dir(), device)
    extractor, rows = Extractor(device), earlier_rows(args.out, {*KEY, *FIGURES})
    rows = [{name: cell if name in KEY else float(cell or math.nan) for name, cell in row.items()} for row in rows]
    done = {tuple(row[name] for name in KEY) for row in rows}
    compared = {"minutes": f"{args.minutes:g}", "device": str(device), "precision": args.precision, "n": str(args.n)}
    for seed, (text, trainer) in itertools.product(args.seeds, recipes.items()):
        job = {"model": args.model, "recipe": text, "seed": str(seed)} | compared
        if tuple(job.values()) in done:
            continue
        rows.append(job | measure(args, trainer, digits, extractor, seed))
        write_csv(args.out, rows)
        print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in rows[-1].items()), flush=True)  # fmt: skip
    alike = [row for row in rows if [row[name] for name in COMPARED] == list(compared.values())]
    charts.ablation(args.out.with_suffix(".png"), alike)
    print(f"wrote {args.out} and {args.out.with_suffix('.png')}")


def trainer_args(model: str, recipe: str):
    """The trainer's flags for a recipe; `ExpectedError` for one that has no effect here."""
    words = [] if recipe == "defaults" else [word.partition("=") for word in recipe.split()]
    argv = [text for name, _, value in words for text in ("--" + name.replace("_", "-"), value) if text]
    trainer = PARSERS[model](argv)
    idle = set(trainer.given) - (DIFFUSION_KNOBS if model == "diffusion" else GAN_KNOBS)
    if idle or trainer.lr_schedule == "plateau":  # nothing is scored in between
        names = ", ".join(sorted(idle)) or "lr_schedule=plateau"
        raise ExpectedError(f"{names} would have no effect in this comparison; leave it out")
    return trainer


def measure(args, trainer, digits: data.Digits, extractor: Extractor, seed: int) -> dict[str, float]:
    """Train a recipe for the given minutes, and score it; its size, its cost and its figures."""
    trial, _ = run_steps(args, trainer, digits, seed, UNTIMED_STEPS + TIMED_STEPS, UNTIMED_STEPS)
    steps = max(1, round(TIMED_STEPS / trial.seconds * 60 * args.minutes))
    state, network = run_steps(args, trainer, digits, seed, steps)
    options, diffusion = {}, args.model == "diffusion"
    if diffusion:
        options = {name: getattr(trainer, name) for name in ("sampler", "steps", "eta", "guidance")}
        options["precision"] = args.precision
    figures = training_scorer(digits, extractor, args.n, 0, args.model != "gan", options, two_way=diffusion)(network)
    return {"trained_minutes": state.seconds / 60, "steps": state.step, "images_per_second": state.images / state.seconds,
            "parameters_m": sum(parameter.numel() for parameter in network.parameters()) / 1e6,
            **{name: figures.get(name, math.nan) for name in FIGURES}}  # fmt: skip


def run_steps(args, trainer, digits: data.Digits, seed: int, steps: int, untimed: int = 0) -> tuple[TrainState, nn.Module]:
    """Train for so many steps, from the beginning, of which the first may be untimed; the state, and the network that is
    scored."""
    torch.manual_seed(seed)
    trainer.seed, state = seed, TrainState()
    network, optimizers, step = assemble(args, trainer, digits, state)
    ema = EMA(network, trainer.ema_decay)
    warmup = min(trainer.warmup_steps, steps // 10)  # a short training warms up for less
    schedule = ScheduledLR(list(optimizers.values()), warmup, steps if trainer.lr_schedule == "cosine" else None)
    schedule.on_start(state)
    batches = (batch for epoch in itertools.count() for batch in data.epoch_batches(digits, trainer.batch_size, seed, epoch))
    for number, (images, labels) in enumerate(itertools.islice(batches, steps)):
        if number == untimed:
            wait_for_device()
            state.tick()
            state.seconds = 0.0
        state.count(step(images, labels), len(images))
        if trainer.ema:
            ema.after_step(state)
        schedule.after_step(state)
    wait_for_device()
    state.tick()
    return state, ema.model if trainer.ema else network


def assemble(args, trainer, digits: data.Digits, state: TrainState):
    """(the network that is sampled, the optimizers, the step), as the trainer has them."""
    if args.model == "diffusion":
        return denoising.assemble(trainer, state, digits, args.precision)
    name, classes = ("cdcgan", data.NUM_CLASSES) if args.model == "cgan" else ("dcgan", 0)
    networks, optimizers, step = adversarial.assemble(trainer, state, digits.images.device, args.precision, name, classes)
    return networks["generator"], optimizers, step


if __name__ == "__main__":
    run_script(main)
