"""The command-line flags that the scripts share. Imports nothing heavy: `--help` must answer at once."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import Any

from utils import UsageError, is_first


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    return _number(text, int, lambda value: value >= 1, "an integer of at least 1")


def natural(text: str) -> int:
    """argparse type: an integer of at least 0."""
    return _number(text, int, lambda value: value >= 0, "an integer of at least 0")


def seed_number(text: str) -> int:
    """argparse type: an integer that torch accepts as a seed."""
    return _number(text, int, lambda value: 0 <= value < 2**63, "an integer of at least 0 and below 2^63")


def seed_count(text: str) -> int:
    """argparse type: how often something is repeated with another seed."""
    return _number(text, int, lambda value: 1 <= value <= 1000, "an integer in 1..1000")


def sample_count(text: str) -> int:
    """argparse type: a number of samples to score: at least one for each split of the inception score."""
    return _number(text, int, lambda value: 10 <= value <= 10**6, "an integer in 10..1000000")


def panel_count(text: str) -> int:
    """argparse type: how many images a picture shows, so many that they can still be told apart."""
    return _number(text, int, lambda value: 1 <= value <= 1024, "an integer in 1..1024")


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def epoch_count(text: str) -> int:
    """argparse type: a number of epochs or scorings that some computer may live to see."""
    return _number(text, int, lambda value: 1 <= value <= 10**6, "an integer in 1..1000000")


def learning_rate(text: str) -> float:
    """argparse type: a learning rate; Adam moves a weight by about as much in a step."""
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def learning_rate_or_none(text: str) -> float:
    """argparse type: a learning rate, or 0 for none."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number in 0..1")


def guidance_weight(text: str) -> float:
    """argparse type: a strength of guidance, as models.py bounds it."""
    return _number(text, float, lambda value: 0 <= value <= 100, "a number in 0..100")


def noise_strength(text: str) -> float:
    """argparse type: the eta of a sampler, as models.py bounds it."""
    return _number(text, float, lambda value: 0 <= value <= max(MAX_ETA.values()), "a number in 0..10")


def non_negative(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < math.inf, "a number of at least 0")


def fraction(text: str) -> float:
    """argparse type: a number in [0, 1)."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1")


def _number(text: str, kind: type, accept: Callable[[Any], bool], wanted: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


class ArgumentParser(argparse.ArgumentParser):
    """No abbreviations; a bad argument ends in one `error:` line and exit code 2, help shows every default."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does, but that no value may be empty: an empty path would be this folder."""
        if any(text == "" or re.fullmatch("--[a-z0-9-]+=", text) for text in (sys.argv[1:] if args is None else args)):
            self.error("an argument is empty; leave it out, or give it a value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        """Leave with exit code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n" if is_first() else None)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


# Of models.py, which needs torch: samplers, with the largest eta of each, and steps and etas of the default one
MAX_ETA = {"dpm-solver++": 10.0, "ddim": 1.0, "ddpm": 0.0}
SAMPLERS, DEFAULT_STEPS, DEFAULT_ETA, DIGIT_ETA = tuple(MAX_ETA), 15, 2.5, 0.8
ETA_HELP = (
    "noise that it renews: 0 is deterministic, 1 as ancestral sampling does "
    f"(default: {DEFAULT_ETA:g}, {DIGIT_ETA:g} for digits on demand; ddim: 0)"
)
DIGIT_GUIDANCE = 2.25  # more right digits than 1, by benchmarks/samplers.py

# `--preset reference`: the table of the classic student projects, to compare the defaults against.
REFERENCE = {"epochs": 100, "batch_size": 128, "lr": 1e-4, "lr_schedule": "constant", "ema": True, "ema_decay": 0.999,
             "early_stop": True, "patience": 10, "warmup_steps": 0}  # fmt: skip
GAN_REFERENCE = {"width": 64, "latent_dim": 100, "loss": "bce", "beta1": 0.5, "d_lr": 1e-4}
CGAN_REFERENCE = GAN_REFERENCE | {"epochs": 80}
DIFFUSION_REFERENCE = {"width": 16, "timesteps": 1000, "schedule": "linear", "prediction": "eps", "time_power": 1.0,
                       "stable_targets": 0.0, "muon_lr": 0.0, "grad_clip": 1.0, "label_dropout": 0.1}  # fmt: skip


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every trainer has; a trainer sets its own defaults with `parser.set_defaults`."""
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--epochs", type=epoch_count, default=100, help="passes over the training digits")
    flag("--batch-size", type=positive_int, default=128, help="images in a step")
    flag("--lr", type=learning_rate, default=1e-4, help="learning rate of Adam")
    flag(
        "--lr-schedule",
        choices=("constant", "plateau", "cosine"),
        default="constant",
        help="plateau: halve when the FID has not improved for half of --patience; cosine: to zero over --epochs",
    )
    flag("--warmup-steps", type=natural, default=0,
         help="steps over which the learning rate rises from zero; 0: none, as with --lr-schedule plateau")  # fmt: skip
    flag("--ema", action=switch, default=True, help="sample and score an exponential moving average of the weights")
    flag("--ema-decay", type=fraction, default=0.999, help="decay of that average in a step")
    flag("--early-stop", action=switch, default=True, help="stop when the FID has not improved for --patience scorings")
    flag("--patience", type=positive_int, default=20, help="scorings without a better FID before stopping")
    flag("--eval-every", type=positive_int, default=1, help="epochs between scorings")
    flag(
        "--eval-samples",
        type=sample_count,
        default=None,
        help="samples in a scoring (default: 10000; digits: 700; a diffusion model on a CPU: 1000)",
    )
    flag("--save-every", type=natural, default=0, help="epochs between numbered checkpoints; 0: none")
    flag("--data-dir", default=None, help="where MNIST/raw lies or is downloaded to (default: $MNIST_DIR, else data)")
    flag(
        "--dataset",
        choices=("mnist", "digits"),
        default="mnist",
        help="digits: scikit-learn's embedded 8x8 digits, for trying things out without a download",
    )
    flag("--limit", type=natural, default=0, help="train on this many random digits only; 0: on all")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    flag(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto: bf16 on a GPU that has it, else fp32; bf16 pays on some CPUs, while nothing else wants their cores",
    )
    flag(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="torch.compile the networks; auto is off: on a GPU it takes half a minute, and pays in long trainings alone",
    )
    flag("--deterministic", action=switch, default=False, help="deterministic CUDA kernels, at some cost in speed")
    flag("--seed", type=seed_number, default=0, help="seed of weights, order, noise and scoring")
    flag(
        "--width",
        type=positive_int,
        default=64,
        help="channels of the networks, in their own unit; a multiple of 8 for diffusion",
    )
    flag(
        "--out-dir",
        default=None,
        help="folder for checkpoints/, reports/ and samples/ (default: this one; runs/... "
        "with --dry-run, --limit or --dataset digits)",
    )
    flag("--resume", action=switch, default=False, help="continue the last run (or that in --out-dir), with its flags")
    flag(
        "--dry-run",
        action=switch,
        default=False,
        help="two epochs of four steps with small scorings (whatever other flags say), every output file, in seconds",
    )
    flag("--preset", choices=("default", "reference"), default="default",
         help="reference: the classic table (batch 128, Adam 1e-4, EMA 0.999, patience 10), to compare against")  # fmt: skip


def add_gan_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that both GAN trainers have beside the common ones, and their defaults for those."""
    flag = parser.add_argument
    flag("--latent-dim", type=positive_int, default=100, help="dimensions of the generator's noise")
    flag(
        "--loss",
        choices=("bce", "hinge", "relativistic"),
        default="hinge",
        help="bce: non-saturating, BatchNorm; hinge: spectral norm; relativistic: R3GAN's, with gradient penalties",
    )
    flag("--beta1", type=fraction, default=0.0, help="beta1 of Adam")
    flag("--d-lr", type=learning_rate, default=1.5e-3, help="learning rate of the discriminator")  # fmt: skip
    parser.set_defaults(epochs=60, width=32, lr=5e-4, lr_schedule="cosine")


def add_diffusion_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the diffusion trainer beside the common ones, and its defaults for those."""
    flag = parser.add_argument
    flag("--timesteps", type=positive_int, default=1000, help="noise levels of the forward process")
    flag("--schedule", choices=("linear", "cosine"), default="cosine", help="how the noise grows with time")
    flag("--prediction", choices=("eps", "v"), default="v", help="what the network predicts: the noise, or the velocity")
    flag("--time-power", type=positive_float, default=0.75,
         help="training times are timesteps * u^power, u uniform; below 1 noisy ones are more frequent")  # fmt: skip
    flag("--stable-targets", type=fraction, default=0.4,
         help="share of a batch, its noisiest, that aims at the mean of all digits it may come from; 0: none")  # fmt: skip
    flag("--init", default=None, help="checkpoint of such a diffusion model, whose weights are the first ones: fine-tuning")
    flag("--muon-lr", type=learning_rate_or_none, default=3e-3,
         help="learning rate of Muon, for the weights between first and last layer; 0: Adam for these too")  # fmt: skip
    flag("--grad-clip", type=non_negative, default=1.0, help="largest norm of the gradient; 0: no bound")
    flag(
        "--label-dropout",
        type=fraction,
        default=0.5,
        help="share of labels hidden, to learn unconditional sampling; 0: it is not learnt",
    )
    flag("--sampler", choices=SAMPLERS, default="dpm-solver++", help="sampler of the monitor and of the GIF")
    flag("--steps", type=positive_int, default=None,
         help="network evaluations of that sampler (default: 15, or all of fewer timesteps)")  # fmt: skip
    flag("--eta", type=noise_strength, default=None, help=ETA_HELP)
    flag("--guidance", type=guidance_weight, default=1.0,
         help="guidance of those samples: 1 is plain conditional sampling; others cost more")  # fmt: skip
    parser.set_defaults(epochs=36, width=16, batch_size=64, lr=2e-3, lr_schedule="cosine", warmup_steps=500)


def add_sampling_flags(parser: argparse.ArgumentParser, guidance: bool = True) -> None:
    """How scripts sample a diffusion model; what is not typed is None, and left to the model's `sample`."""
    flag = parser.add_argument
    flag("--sampler", choices=SAMPLERS, default=None,
         help="sampler of a diffusion model; ddpm: ancestral (default: dpm-solver++)")  # fmt: skip
    flag("--steps", type=positive_int, default=None,
         help="network evaluations of that sampler (default: 15; ddpm: every timestep)")  # fmt: skip
    flag("--eta", type=noise_strength, default=None, help=ETA_HELP)
    flag("--precision", choices=("fp32", "bf16"), default=None,
         help="of a diffusion model's evaluations; bf16 is faster where the device has it (default: fp32)")  # fmt: skip
    if guidance:
        flag("--guidance", type=guidance_weight, default=None,
             help="strength of classifier-free guidance at middle noise, where it takes two evaluations a step: 1 is plain "
             f"conditional sampling (default: {DIGIT_GUIDANCE} where digits are asked for)")  # fmt: skip


def sampling_options(args: argparse.Namespace, generator: Any, path: str) -> dict[str, Any]:
    """The sampling flags that were typed, as options of the `sample` of a generator read from `path`; and the guidance
    with which scripts draw digits on demand.

    Raises:
        UsageError: it has no such option, or refuses its value.
    """
    names = ("sampler", "steps", "eta", "precision", "guidance")
    typed = {name: vars(args)[name] for name in names if vars(args).get(name) is not None}
    if unknown := [f"--{name}" for name in typed if name not in generator.SAMPLE_OPTIONS]:
        raise UsageError(f"{path} holds a {generator.model_name}, which has no {', '.join(unknown)}; leave it out")
    if typed:
        try:
            generator.sample_options(**typed)
        except ValueError as error:
            raise UsageError(f"{path} cannot be sampled in this way: {error}") from error
    if "guidance" in vars(args) and "guidance" in generator.SAMPLE_OPTIONS and generator.config.num_classes:
        typed.setdefault("guidance", DIGIT_GUIDANCE)
    return typed


def parse_training_args(
    parser: argparse.ArgumentParser, argv: list[str] | None, reference: dict[str, Any]
) -> argparse.Namespace:
    """Parse a trainer's arguments; `args.given` names the flags that were typed.

    Args:
        reference: the trainer's own part of `--preset reference`; a typed flag goes before any preset.
    """
    typed = parser.parse_args(argv, argparse.Namespace(**{action.dest: None for action in parser._actions}))
    if typed.preset == "reference":
        parser.set_defaults(**(REFERENCE | reference))
    args = parser.parse_args(argv)
    if args.eval_every > args.epochs:
        parser.error(f"--eval-every {args.eval_every} is more than --epochs {args.epochs}: nothing would be scored")
    if args.lr_schedule == "plateau":
        if typed.warmup_steps:
            parser.error("--lr-schedule plateau has no warm-up; leave --warmup-steps out")
        args.warmup_steps = 0
    args.given, args.parser = sorted(name for name, value in vars(typed).items() if value is not None), parser
    return args


def fits_flag(parser: argparse.ArgumentParser, name: str, value: object) -> bool:
    """Whether `value` is one that the flag could have on the command line, or by default."""
    action = next(action for action in parser._actions if action.dest == name)
    if value is None or isinstance(action, argparse.BooleanOptionalAction):
        return (value is None and action.default is None) or type(value) is bool
    try:
        return (
            type(value) is str if not action.type and not action.choices else _parsed(action, value) == (type(value), value)
        )
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        return False


def _parsed(action: argparse.Action, value: object) -> tuple[type, object]:
    """Type and value of what the command line would make of the value's text."""
    parsed = action.type(str(value)) if action.type else str(value)
    if action.choices and parsed not in action.choices:
        raise ValueError
    return type(parsed), parsed
