"""The command line that the scripts share: flags with their defaults, presets, exit codes.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from diffusion.options import (
    CONDITIONAL_ETA,
    CONDITIONAL_STEPS,
    DEFAULT_STEPS,
    MAX_ETA,
    MAX_GUIDANCE,
    OPTION_NAMES,
    PRECISIONS,
    SCRIPT_GUIDANCE,
    UNCONDITIONAL_ETA,
    SamplingOptions,
)
from files import ExpectedError, Interrupted, UsageError, expanded, is_first, is_out_of_memory, processes, stop_signals

# --------------------------------------------------------------------------------------------------------------------
# Exit codes

AGAIN = "No file is half written; give the same command again."
# How often a thread of OpenMP looks for the others before it sleeps. With the default of 300,000 it blocks a shared core.
# 10,000 is as fast on idle cores (docs/speed.md).
SPINS = "10000"


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` and turn expected failures into the documented exit codes: 0, 1, 2, 129, 130, 143."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # torch reads it at its first import, which comes later
    with _unbreakable_streams(), _interruptible():
        code = _exit_code(main)
    if _are_several():
        # A thread of gloo may still hold a tensor. To free it, it needs the interpreter, which is gone by then: it aborts.
        os._exit(code)
    if code:
        sys.exit(code)


def _are_several() -> bool:
    try:
        return processes().total > 1
    except UsageError:  # contradictory variables: nothing has been started
        return False


@contextlib.contextmanager
def _unbreakable_streams() -> Iterator[None]:
    """Let the work go on, whatever happens to stdout and stderr: closed, no reader any more, a full disk."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed ones: else a file of ours would get the number
        pass
    os.close(descriptor)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Unbreakable(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _Unbreakable:
    """A stream for text that swallows what it cannot write."""

    def __init__(self, stream: Any):
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")  # a path may hold any bytes

    def write(self, text: str) -> int:
        try:
            self._tried(self._stream.write, text)
        except UnicodeEncodeError:  # a stream without `reconfigure`
            self._tried(self._stream.write, text.encode("ascii", "backslashreplace").decode())
        return len(text)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def _tried(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
        except UnicodeEncodeError:
            raise
        except (OSError, ValueError):  # ValueError: it is closed
            self._close()

    def _close(self) -> None:
        """Write nowhere from now on. The descriptor itself is redirected, for what the buffer still holds."""
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        try:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        except (OSError, ValueError, AttributeError):  # it has no descriptor: a stream of a notebook, or a closed one
            self._stream = nowhere
        else:
            nowhere.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turn the signals that ask to stop into `Interrupted`. SIGINT is Python's KeyboardInterrupt already."""
    previous = {signum: signal.signal(signum, _interrupt) for signum in stop_signals() if signum != signal.SIGINT}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _exit_code(main: Callable[[], None]) -> int:
    """Run `main`. Returns the exit code, after one line that gives the reason if it is not 0."""
    try:
        processes()  # refuse contradictory variables of torchrun before any work
        main()
    except (ExpectedError, OSError) as error:  # OSError: a full disk, a missing permission; the message names the file
        return _error_line(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _error_line(ExpectedError("out of memory; lower --batch-size, --width or the number of samples"))
    except Interrupted as stop:
        if is_first():
            print(f"stopped by signal {stop.signum}. {stop.hint or AGAIN}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print(f"stopped by signal {signal.SIGINT.value}. {AGAIN}", file=sys.stderr)
        return 130
    return 0


def _interrupt(signum: int, _frame: object) -> None:
    raise Interrupted(signum)


def _error_line(error: Exception) -> int:
    if is_first():
        print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


# --------------------------------------------------------------------------------------------------------------------
# Parsing


class ArgumentParser(argparse.ArgumentParser):
    """No abbreviations. A bad argument raises `UsageError`. The help text shows every default."""

    def __init__(self, description: str | None):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, except that no value may be empty: an empty path would mean the current folder."""
        if any(text == "" or re.fullmatch("--[a-z0-9-]+=", text) for text in (sys.argv[1:] if args is None else args)):
            self.error("an argument is empty; leave it out, or give it a value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def integer(low: int, high: float = math.inf) -> Callable[[str], int]:
    """argparse type: an integer in low..high."""
    wanted = f"an integer of at least {low}" if high == math.inf else f"an integer in {low}..{high}"
    return _number(int, lambda value: low <= value <= high, wanted)


def number(interval: str) -> Callable[[str], float]:
    """argparse type: a finite number in an interval, written as (0, 1] or [0, inf)."""
    low, high = map(float, interval[1:-1].split(","))

    def accept(value: float) -> bool:
        above = low < value if interval[0] == "(" else low <= value
        return above and (value < high if interval[-1] == ")" else value <= high)

    return _number(float, accept, f"a number in {interval}")


def _number(kind: type, accept: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def expanded_path(text: str) -> str:
    """argparse type: a path, with `~` expanded (a shell leaves it alone in --flag=~/folder)."""
    return str(expanded(text))


SEED = integer(0, 2**63 - 1)  # what torch accepts
LEARNING_RATE = number("(0, 1]")  # Adam moves a weight by about as much in a step
ETA = number(f"[0, {max(MAX_ETA.values()):g}]")
GUIDANCE = number(f"[0, {MAX_GUIDANCE}]")
OUT_DIR = ("--out-dir", "--outdir")  # every script takes both
DATA_DIR_HELP = "where MNIST/raw is, or is downloaded to (default: $MNIST_DIR, else data)"
CUDA_DEVICE_HELP = "auto, cpu, cuda, cuda:1, ..."
DEVICE_HELP = f"{CUDA_DEVICE_HELP}, or mps (an Apple GPU, never chosen by auto)"


# --------------------------------------------------------------------------------------------------------------------
# The trainers' flags

# `--preset reference`: the table of the classic student projects, to compare the defaults against
REFERENCE = {
    "epochs": 100,
    "batch_size": 128,
    "lr": 1e-4,
    "lr_schedule": "constant",
    "ema": True,
    "ema_decay": 0.999,
    "early_stop": True,
    "patience": 10,
    "warmup_steps": 0,
    "eval_every": 1,
    "black": -1.0,
}
GAN_REFERENCE = {"width": 64, "latent_dim": 100, "loss": "bce", "beta1": 0.5, "d_lr": 1e-4}
CGAN_REFERENCE = GAN_REFERENCE | {"epochs": 80}
DIFFUSION_REFERENCE = {
    "width": 16,
    "timesteps": 1000,
    "schedule": "linear",
    "prediction": "eps",
    "time_power": 1.0,
    "stable_targets": 0.0,
    "muon_lr": 0.0,
    "grad_clip": 1.0,
    "label_dropout": 0.1,
}
STEPS_HELP = (
    "steps of that sampler; guidance evaluates the network twice in some of them "
    f"(default: {DEFAULT_STEPS}, class-conditional {CONDITIONAL_STEPS}; ddim: {DEFAULT_STEPS}; ddpm: every timestep)"
)
# `--preset cpu`: fewer epochs. The diffusion model also gets small batches: it learns more from an epoch.
GAN_CPU = {"epochs": 20}
DIFFUSION_CPU = {
    "epochs": 12,
    "batch_size": 64,
    "lr": 2e-3,
    "muon_lr": 3e-3,
    "warmup_steps": 500,
    "ema_decay": 0.999,
    "eval_every": 2,
}
ETA_HELP = (
    "stochasticity: 0 is deterministic, 1 adds the noise of ancestral sampling "
    f"(default: {UNCONDITIONAL_ETA:g}, class-conditional {CONDITIONAL_ETA:g}; ddim: 0)"
)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every trainer has. A trainer sets its own defaults with `parser.set_defaults`."""
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction

    # Length, learning rate, average, stopping
    flag("--epochs", type=integer(1, 10**6), default=100, help="passes over the training digits")
    flag("--batch-size", type=integer(1), default=128, help="images in a step")
    flag("--lr", type=LEARNING_RATE, default=1e-4, help="learning rate of Adam")
    flag(
        "--lr-schedule",
        choices=("constant", "plateau", "cosine"),
        default="constant",
        help="plateau: halve when the FID has not improved for half of --patience; cosine: fall to zero over --epochs",
    )
    flag(
        "--warmup-steps",
        type=integer(0),
        default=0,
        help="steps in which the learning rate rises from zero; 0: none; not with --lr-schedule plateau",
    )
    flag("--ema", action=switch, default=True, help="sample and score an exponential moving average of the weights")
    flag("--ema-decay", type=number("[0, 1)"), default=0.999, help="decay of that average in a step")
    flag("--early-stop", action=switch, default=True, help="stop when the FID has not improved for --patience scorings")
    flag("--patience", type=integer(1), default=20, help="scorings without a better FID before stopping")

    # Scoring and files
    flag("--eval-every", type=integer(1), default=1, help="epochs between scorings")
    flag(
        "--eval-samples",
        type=integer(10, 10**6),
        default=None,
        help="samples in a scoring (default: 10000; digits: 700; a diffusion model on a CPU: 1000)",
    )
    flag("--save-every", type=integer(0), default=0, help="epochs between numbered checkpoints; 0: none")
    flag(
        *OUT_DIR,
        type=expanded_path,
        default=None,
        help="folder for checkpoints/, reports/ and samples/ (default: this one; runs/... with --dry-run, --limit or "
        "--dataset digits)",
    )
    flag("--resume", action=switch, default=False, help="continue the last run (or that in --out-dir), with its flags")

    # Data
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    flag(
        "--dataset",
        choices=("mnist", "digits"),
        default="mnist",
        help="digits: scikit-learn's embedded 8x8 digits, which need no download",
    )
    flag("--limit", type=integer(0), default=0, help="train on this many random digits; 0: on all")
    flag(
        "--dry-run",
        action=switch,
        default=False,
        help="two epochs of four steps with small scorings: every output file in seconds, whatever other flags say",
    )

    # Machine
    flag("--device", default="auto", help=DEVICE_HELP)
    flag(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="auto: bf16 on a GPU that has it, else fp32; bf16 pays on CPUs with bf16 units, if no other work shares them",
    )
    flag(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="torch.compile the networks: up to a minute, then a step on a GPU is faster; auto: in long trainings there",
    )
    flag("--deterministic", action=switch, default=False, help="deterministic CUDA kernels, at some cost in speed")
    flag("--seed", type=SEED, default=0, help="seed of weights, order, noise and scoring")

    # Model
    flag("--width", type=integer(1), default=64, help="channels of the networks; a multiple of 8 for diffusion")
    flag(
        "--black",
        type=number("[-2, -1]"),
        default=-1.08,
        help="the value of black pixels that the network learns; below -1, a small error of it still decodes to black",
    )
    flag(
        "--preset",
        choices=("default", "reference", "cpu"),
        default="default",
        help="reference: the classic table (batch 128, Adam 1e-4, EMA 0.999, patience 10), to compare against; cpu: what a "
        "CPU trains in half an hour to two hours",
    )


def add_gan_flags(parser: argparse.ArgumentParser) -> None:
    """The further flags of both GAN trainers, and their defaults for the common ones."""
    flag = parser.add_argument
    flag("--latent-dim", type=integer(1), default=100, help="dimensions of the generator's noise")
    flag(
        "--loss",
        choices=("bce", "hinge", "relativistic"),
        default="hinge",
        help="bce: non-saturating, BatchNorm; hinge: spectral norm; relativistic: R3GAN's, with gradient penalties",
    )
    flag("--beta1", type=number("[0, 1)"), default=0.0, help="beta1 of Adam")
    flag("--d-lr", type=LEARNING_RATE, default=1.5e-3, help="learning rate of the discriminator")
    parser.set_defaults(epochs=60, width=32, lr=5e-4, lr_schedule="cosine")


def add_diffusion_flags(parser: argparse.ArgumentParser) -> None:
    """The further flags of the diffusion trainer, and its defaults for the common ones."""
    flag = parser.add_argument
    flag("--timesteps", type=integer(1), default=1000, help="noise levels of the forward process")
    flag("--schedule", choices=("linear", "cosine"), default="cosine", help="how the noise grows with time")
    flag("--prediction", choices=("eps", "v"), default="v", help="what the network predicts: the noise, or the velocity")
    flag(
        "--time-power",
        type=number("(0, inf)"),
        default=0.75,
        help="training times are timesteps * u^power with u uniform; below 1, noisy times are more frequent",
    )
    flag(
        "--stable-targets",
        type=number("[0, 1)"),
        default=0.4,
        help="share of a batch with the most noise, whose target is a mean of digits: less variance; 0: none",
    )
    flag(
        "--init",
        type=expanded_path,
        default=None,
        help="start from the weights of this diffusion checkpoint: fine-tuning",
    )
    flag(
        "--muon-lr",
        type=number("[0, 1]"),
        default=5e-3,
        help="learning rate of Muon, for the weights between first and last layer; 0: Adam for these too",
    )
    flag("--grad-clip", type=number("[0, inf)"), default=1.0, help="largest norm of the gradient; 0: no bound")
    flag(
        "--label-dropout",
        type=number("[0, 1)"),
        default=0.5,
        help="share of labels hidden, to learn unconditional sampling; 0: do not learn it",
    )
    defaults = SamplingOptions()
    flag("--sampler", choices=MAX_ETA, default=defaults.sampler, help="sampler of the scorings and of the GIF")
    flag("--steps", type=integer(1), default=None, help=STEPS_HELP)
    flag("--eta", type=ETA, default=None, help=ETA_HELP)
    flag(
        "--guidance",
        type=GUIDANCE,
        default=defaults.guidance,
        help="guidance scale of those samples; 1 is plain class-conditional, others take more evaluations",
    )
    parser.set_defaults(epochs=56, batch_size=256, lr=3e-3, lr_schedule="cosine", warmup_steps=300, ema_decay=0.9995)
    parser.set_defaults(width=16, eval_every=8)


def parse_training_args(
    parser: argparse.ArgumentParser, argv: list[str] | None, reference: dict[str, Any], cpu: dict[str, Any] | None = None
) -> argparse.Namespace:
    """Parse a trainer's arguments. `args.given` names the flags that were typed.

    Args:
        reference, cpu: the trainer's own part of these presets. A typed flag has priority over a preset. None: it has no
            such preset.
    """
    typed = parser.parse_args(argv, argparse.Namespace(**{action.dest: None for action in parser._actions}))
    if typed.preset == "cpu" and cpu is None:
        parser.error("this trainer has no --preset cpu; leave it out")
    parser.set_defaults(**({"reference": REFERENCE | reference, "cpu": cpu}.get(typed.preset) or {}))
    args = parser.parse_args(argv)
    if not typed.eval_every:
        args.eval_every = min(args.eval_every, args.epochs)
    if args.eval_every > args.epochs and not args.resume:  # a resumed run has its own number of epochs
        parser.error(f"--eval-every {args.eval_every} is more than --epochs {args.epochs}: nothing would be scored")
    if args.lr_schedule == "plateau":
        if typed.warmup_steps:
            parser.error("--lr-schedule plateau has no warm-up; leave --warmup-steps out")
        args.warmup_steps = 0
    args.given = sorted(name for name, value in vars(typed).items() if value is not None)
    args.parser = parser
    return args


def parse_again(parser: argparse.ArgumentParser, flags: dict[str, Any]) -> argparse.Namespace:
    """Parse recorded flags as if they were typed.

    Raises:
        ValueError: a value is no primitive, or the command line does not accept it.
    """
    argv = []
    for action in parser._actions:
        value = flags.get(action.dest)
        if type(value) not in (bool, int, float, str, type(None)):
            raise ValueError(f"{action.dest} is a {type(value).__name__}")
        if isinstance(action, argparse.BooleanOptionalAction) and value is not None:
            argv.append(action.option_strings[0 if value else 1])
        elif value is not None:
            argv.append(f"{action.option_strings[0]}={value}")
    try:
        return parser.parse_args(argv)
    except UsageError as error:
        raise ValueError(str(error).partition(";")[0][:200]) from error  # the value may be long


# --------------------------------------------------------------------------------------------------------------------
# Flags of the scripts that sample


def add_sampling_flags(parser: argparse.ArgumentParser, guidance: bool = True) -> None:
    """How a diffusion model is sampled. A flag that is not typed is None, and left to the model's `sample`."""
    flag = parser.add_argument
    flag(
        "--sampler",
        choices=MAX_ETA,
        default=None,
        help=f"sampler of a diffusion model; ddpm: ancestral (default: {SamplingOptions().sampler})",
    )
    flag("--steps", type=integer(1), default=None, help=STEPS_HELP)
    flag("--eta", type=ETA, default=None, help=ETA_HELP)
    flag(
        "--precision",
        choices=PRECISIONS,
        default=None,
        help="of a diffusion model's evaluations; bf16 is faster where the device has it (default: fp32)",
    )
    if guidance:
        flag(
            "--guidance",
            type=GUIDANCE,
            default=None,
            help="guidance scale of class-conditional samples; 1 is none, others take a second evaluation at middle noise "
            f"(default: {SCRIPT_GUIDANCE})",
        )


def sampling_options(args: argparse.Namespace, generator: Any, path: str) -> dict[str, Any]:
    """The typed sampling flags, as options of `sample` of the generator in `path`; with the scripts' guidance scale.

    Raises:
        UsageError: the generator has no such option, or refuses its value.
    """
    typed = {name: vars(args)[name] for name in OPTION_NAMES if vars(args).get(name) is not None}
    if unknown := [f"--{name}" for name in typed if name not in generator.SAMPLE_OPTIONS]:
        raise UsageError(f"{path} holds a {generator.model_name}, which has no {', '.join(unknown)}; leave it out")
    if typed:
        try:
            generator.sample_options(**typed)
        except ValueError as error:
            raise UsageError(f"{path} cannot be sampled in this way: {error}") from error
    if "guidance" in vars(args) and "guidance" in generator.SAMPLE_OPTIONS and generator.config.num_classes:
        typed.setdefault("guidance", SCRIPT_GUIDANCE)
    return typed
