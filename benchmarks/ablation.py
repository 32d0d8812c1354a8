"""Which recipe makes the most of a given time: each is trained for the same minutes with every seed, then scored.

A recipe is what differs from the defaults of the model's trainer, as `name=value` pairs: width=24, or "muon_lr=0 lr=1e-3".
`no_ema` is a switch. "defaults" differs in nothing. With preset=cpu or preset=reference among the pairs, a recipe differs
from the preset instead. The study compares what a CPU should train, preset=cpu, with the classic table, preset=reference.

A few timed steps tell how many steps fit into the minutes. The learning rates follow the trainer's schedule over that many
steps. The EMA is scored, as in a training. The conditional GAN draws the labels of the training set. A diffusion model is
scored with labels (`fid`) and without them (`fid_unconditional`).

Each result is written to --out at once. Rows that are there already are not measured again. The chart beside the table shows
the rows with the same minutes, samples, device and precision. Run nothing else on the machine meanwhile.

    python benchmarks/ablation.py --model gan --minutes 5
    python benchmarks/ablation.py --model diffusion --minutes 10 --recipes preset=cpu "preset=cpu muon_lr=0" defaults
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from timing import wait_for_device
from torch import Tensor, nn

import data
import train_cgan
import train_diffusion
import train_gan
from callbacks import EMA, ScheduledLR
from cli import CUDA_DEVICE_HELP, DATA_DIR_HELP, SEED, ArgumentParser, expanded_path, number, run_script
from diffusion.options import OPTION_NAMES, PRECISIONS
from engine.cuda_graph import ORDINARY_CALLS
from figures import charts
from files import ExpectedError, check_outputs, earlier_rows, expanded, write_csv
from loop import TrainState
from recipes import ddpm, gan
from scoring.extractor import Extractor
from scoring.reference import FLOOR_SIZES
from scoring.scorer import training_scorer
from utils import choose_device, has_bf16

# The study: the classic table with one change each, then the CPU's recipe with one change each
REFERENCE = "preset=reference"
CPU = "preset=cpu"
GAN_CHANGES = ("loss=hinge", "loss=relativistic", "no_ema", "beta1=0", "lr=5e-4 d_lr=5e-4", "width=32", "batch_size=64")
GAN_RETURNS = (
    "loss=bce",
    "loss=relativistic",
    "no_ema",
    "beta1=0.5",
    "lr=1e-4 d_lr=1e-4",
    "width=64",
    "batch_size=64",
    "lr_schedule=constant",
)
DIFFUSION_CHANGES = (
    "schedule=cosine",
    "prediction=v",
    "label_dropout=0.5",
    "no_ema",
    "lr=1e-3",
    "lr_schedule=cosine",
    "width=24",
    "muon_lr=3e-3",
)
DIFFUSION_RETURNS = (
    "schedule=linear",
    "prediction=eps",
    "label_dropout=0.1",
    "no_ema",
    "muon_lr=0",
    "width=8",
    "width=24",
    "batch_size=128",
    "stable_targets=0",
    "time_power=1",
    "lr_schedule=constant",
)


def study(changes: tuple[str, ...], returns: tuple[str, ...]) -> list[str]:
    """Both presets, the classic table with each of `changes`, and the CPU's recipe with each of `returns`."""
    return [REFERENCE, *(f"{REFERENCE} {change}" for change in changes), CPU, *(f"{CPU} {change}" for change in returns)]


GAN_RECIPES = study(GAN_CHANGES, GAN_RETURNS)
DIFFUSION_RECIPES = study(DIFFUSION_CHANGES, DIFFUSION_RETURNS)
RECIPES = {"gan": GAN_RECIPES, "cgan": GAN_RECIPES, "diffusion": DIFFUSION_RECIPES}
PARSERS = {"gan": train_gan.parse_args, "cgan": train_cgan.parse_args, "diffusion": train_diffusion.parse_args}

FIGURES = ("fid", "fid_ratio", "label_accuracy", "fid_unconditional", "fid_ratio_unconditional")
COMPARED = ("minutes", "device", "precision", "n")  # what the rows of a chart have in common
KEY = ("model", "recipe", "seed", *COMPARED)  # of a row
# Steps of a trial. After the untimed ones, a GPU has recorded both variants of a GAN's step.
UNTIMED_STEPS = gan.PENALTY_EVERY * ORDINARY_CALLS + 1
TIMED_STEPS = 15

# The flags that a recipe may set. The trainer's other flags have no effect here.
SHARED_KNOBS = {"preset", "width", "lr", "lr_schedule", "warmup_steps", "ema", "ema_decay", "batch_size", "black"}
GAN_KNOBS = SHARED_KNOBS | {"latent_dim", "loss", "beta1", "d_lr"}
DIFFUSION_KNOBS = SHARED_KNOBS | {
    "timesteps",
    "schedule",
    "prediction",
    "time_power",
    "stable_targets",
    "label_dropout",
    "muon_lr",
    "grad_clip",
    "sampler",
    "steps",
    "eta",
    "guidance",
}

Step = Callable[[Tensor, Tensor], dict[str, Tensor]]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--model", choices=PARSERS, default="diffusion", help="the model whose trainer's defaults are the starting point")
    flag("--recipes", nargs="+", default=None, help="what to compare, see above (default: a list for each model)")
    flag("--minutes", type=number("(0, inf)"), default=5.0, help="of training for each recipe")
    flag("--seeds", nargs="+", type=SEED, default=[0, 1], help="training seeds of each recipe")
    flag("--n", type=int, choices=FLOOR_SIZES, default=2000, help="samples in a scoring: a size whose floor is known")
    flag("--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: bf16 where the device has it")
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    flag("--device", default="auto", help=CUDA_DEVICE_HELP)
    flag("--out", type=expanded, default=Path("reports/ablation.csv"), help="the table to write")
    args = parser.parse_args(argv)
    check_outputs(("--out", args.out, (".csv",)))

    device = choose_device(args.device, apple=False)
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(device) else "fp32"
    recipes = {text: trainer_args(args.model, text) for text in args.recipes or RECIPES[args.model]}
    digits = data.load_digits("mnist", "train", args.data_dir or data.default_data_dir(), device)
    extractor = Extractor(device)
    rows = read_rows(args.out)
    done = {tuple(row[name] for name in KEY) for row in rows}
    compared = {"minutes": f"{args.minutes:g}", "device": str(device), "precision": args.precision, "n": str(args.n)}
    for seed, (text, trainer) in itertools.product(args.seeds, recipes.items()):
        job = {"model": args.model, "recipe": text, "seed": str(seed)} | compared
        if tuple(job.values()) in done:
            continue
        row = job | measure(args, trainer, digits, extractor, seed)
        rows.append(row)
        write_csv(args.out, rows)
        cells = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
        print("  ".join(cells), flush=True)
    alike = [row for row in rows if [row[name] for name in COMPARED] == list(compared.values())]
    charts.ablation(args.out.with_suffix(".png"), alike)
    print(f"wrote {args.out} and {args.out.with_suffix('.png')}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run: text in the columns of `KEY`, numbers in the others. An empty cell becomes nan."""
    rows = earlier_rows(path, {*KEY, *FIGURES})
    return [{name: cell if name in KEY else float(cell or math.nan) for name, cell in row.items()} for row in rows]


def trainer_args(model: str, recipe: str) -> argparse.Namespace:
    """The trainer's flags for a recipe.

    Raises:
        ExpectedError: a flag of the recipe has no effect here.
        UsageError: the trainer does not accept the recipe.
    """
    words = [] if recipe == "defaults" else [word.partition("=") for word in recipe.split()]
    argv = [text for name, _, value in words for text in ("--" + name.replace("_", "-"), value) if text]
    trainer = PARSERS[model](argv)
    idle = set(trainer.given) - (DIFFUSION_KNOBS if model == "diffusion" else GAN_KNOBS)
    if idle or trainer.lr_schedule == "plateau":  # nothing is scored in between
        names = ", ".join(sorted(idle)) or "lr_schedule=plateau"
        raise ExpectedError(f"{names} would have no effect in this comparison; leave it out")
    return trainer


def measure(
    args: argparse.Namespace, trainer: argparse.Namespace, digits: data.Digits, extractor: Extractor, seed: int
) -> dict[str, Any]:
    """Train a recipe for the given minutes. Returns its cost, its size and its figures."""
    trial, _ = run_steps(args, trainer, digits, seed, UNTIMED_STEPS + TIMED_STEPS, UNTIMED_STEPS)
    steps = max(1, round(TIMED_STEPS / trial.seconds * 60 * args.minutes))
    state, network = run_steps(args, trainer, digits, seed, steps)
    options = {}
    if args.model == "diffusion":
        options = {name: getattr(trainer, name) for name in OPTION_NAMES} | {"precision": args.precision}
    conditional = args.model != "gan"
    score = training_scorer(digits, extractor, args.n, 0, conditional, options, two_way=args.model == "diffusion")
    figures = score(network)
    return {
        "trained_minutes": state.seconds / 60,
        "steps": state.step,
        "images_per_second": state.images / state.seconds,
        "parameters_m": sum(parameter.numel() for parameter in network.parameters()) / 1e6,
        **{name: figures.get(name, math.nan) for name in FIGURES},
    }


def run_steps(
    args: argparse.Namespace,
    trainer: argparse.Namespace,
    digits: data.Digits,
    seed: int,
    steps: int,
    untimed: int = 0,
) -> tuple[TrainState, nn.Module]:
    """Train a new network for so many steps, the first of them untimed. Returns the state, and the network to score."""
    torch.manual_seed(seed)
    trainer.seed = seed
    state = TrainState()
    network, optimizers, step = assemble(args, trainer, digits, state)
    ema = EMA(network, trainer.ema_decay)
    warmup = min(trainer.warmup_steps, steps // 10)  # a short training warms up for less
    schedule = ScheduledLR(list(optimizers.values()), warmup, steps if trainer.lr_schedule == "cosine" else None)
    schedule.on_start(state)
    batches = (batch for epoch in itertools.count() for batch in data.epoch_batches(digits, trainer.batch_size, seed, epoch))
    for done, (images, labels) in enumerate(itertools.islice(batches, steps)):
        if done == untimed:
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


def assemble(
    args: argparse.Namespace, trainer: argparse.Namespace, digits: data.Digits, state: TrainState
) -> tuple[nn.Module, dict[str, torch.optim.Optimizer], Step]:
    """The network that is sampled, the optimizers and the step, as in the trainer."""
    if args.model == "diffusion":
        return ddpm.assemble(trainer, state, digits, args.precision)
    name, classes = ("cdcgan", data.NUM_CLASSES) if args.model == "cgan" else ("dcgan", 0)
    networks, optimizers, step = gan.assemble(trainer, state, digits.images.device, args.precision, name, classes)
    return networks["generator"], optimizers, step


if __name__ == "__main__":
    run_script(main)
