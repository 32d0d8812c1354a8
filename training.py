"""The one training loop, its state, stopping by signal, and the command-line flags that all trainers share.

`fit` knows no model, optimizer or device: a train step maps a batch to losses, callbacks do everything else, and the
order of the callbacks is the contract (EMA, then monitor, then early stopping, then the writers).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from utils import ExpectedError, Interrupted


@dataclasses.dataclass
class TrainState:
    """Where a run stands; saved and restored as a whole. Losses stay on their device until `mean_losses` is called."""

    epoch: int = 0  # completed epochs
    batch: int = 0  # completed batches of the current epoch
    step: int = 0  # completed steps of the run
    images: int = 0  # images seen
    seconds: float = 0.0  # of training and scoring, without interruptions
    stop_reason: str = ""
    loss_sums: dict[str, Any] = dataclasses.field(default_factory=dict)  # name -> device scalar, over this epoch
    row: dict[str, float] = dataclasses.field(default_factory=dict)  # figures of the epoch being closed
    log: list[dict[str, float]] = dataclasses.field(default_factory=list)  # one row for each completed epoch

    def count(self, losses: dict[str, Any], images: int) -> None:
        """Add one step's losses (device scalars; nothing is fetched)."""
        for name, loss in losses.items():
            self.loss_sums[name] = self.loss_sums[name] + loss if name in self.loss_sums else loss
        self.batch, self.step, self.images = self.batch + 1, self.step + 1, self.images + images

    def mean_losses(self) -> dict[str, float]:
        """Mean losses of the epoch so far, fetched from the device.

        Raises:
            ExpectedError: a loss is not finite.
        """
        means = {name: float(total) / self.batch for name, total in self.loss_sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise ExpectedError(
                    f"{name} is not finite at step {self.step}; the files on disk hold the last good state: "
                    "lower --lr, then start again"
                )
        return means

    def close_epoch(self) -> None:
        """Count the epoch as completed and file its row."""
        self.log.append(self.row)
        self.epoch, self.batch, self.row, self.loss_sums = self.epoch + 1, 0, {}, {}


class Callback:
    """Something that happens beside the steps. Hooks touch only the state; objects are given to `__init__`."""

    def on_start(self, state: TrainState) -> None:
        """Before the first step of this process."""

    def after_step(self, state: TrainState) -> None:
        """After every step, with nothing fetched from the device."""

    def after_epoch(self, state: TrainState) -> None:
        """After the last step of an epoch; figures go into `state.row`."""

    def at_rest(self, state: TrainState) -> None:
        """After every step and every closed epoch, when model, callbacks and state belong together: time to save."""

    def on_end(self, state: TrainState) -> None:
        """After the last epoch; also when the run ends early."""

    def state_dict(self) -> dict[str, Any]:
        """What this callback needs to continue: tensors and primitives."""
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `saved`."""


def fit(
    train_step: Callable[[Any, Any], dict[str, Any]],
    batches: Callable[[int, int], Iterable[tuple[Any, Any]]],
    epochs: int,
    callbacks: list[Callback],
    state: TrainState,
) -> TrainState:
    """Train until `epochs` are complete or a callback gives a `stop_reason`.

    Args:
        train_step: (images, labels) -> losses by name, as device scalars.
        batches: (epoch, first batch) -> the batches of that epoch from there on.
    """
    try:
        for callback in callbacks:
            callback.on_start(state)
        while state.epoch < epochs and not state.stop_reason:
            for images, labels in batches(state.epoch, state.batch):
                state.count(train_step(images, labels), len(images))
                for callback in callbacks:
                    callback.after_step(state)
                for callback in callbacks:
                    callback.at_rest(state)
            for callback in callbacks:
                callback.after_epoch(state)
            state.close_epoch()
            for callback in callbacks:
                callback.at_rest(state)
    finally:
        for callback in callbacks:
            callback.on_end(state)
    return state


class StopSignals:
    """SIGINT and SIGTERM, held back until the training is at rest, or served at once within `at_once()`.

    A second signal ends the process at once, the Python way.
    """

    def __init__(self):
        self.received = 0
        self._immediate = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: object) -> None:
        if self.received:
            raise Interrupted(signum)
        self.received = signum
        if self._immediate:
            raise Interrupted(signum)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that can be repeated (sampling, scoring): a signal raises `Interrupted` inside this block."""
        if self.received:
            raise Interrupted(self.received)
        self._immediate = True
        try:
            yield
        finally:
            self._immediate = False


# --------------------------------------------------------------------------------------------------------------------
# Command line


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    return _number(text, int, lambda value: value >= 1, "an integer of at least 1")


def natural(text: str) -> int:
    """argparse type: an integer of at least 0."""
    return _number(text, int, lambda value: value >= 0, "an integer of at least 0")


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every trainer has; a trainer sets its own defaults with `parser.set_defaults`."""
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--epochs", type=positive_int, default=100, help="passes over the training digits")
    flag("--batch-size", type=positive_int, default=128, help="images in a step")
    flag("--lr", type=positive_float, default=1e-4, help="learning rate of Adam")
    flag("--lr-schedule", choices=("constant", "plateau", "cosine"), default="constant",
         help="plateau: halve when the FID has not improved for half of --patience; cosine: to zero over --epochs")
    flag("--ema", action=switch, default=True, help="sample and score an exponential moving average of the weights")
    flag("--ema-decay", type=fraction, default=0.999, help="decay of that average in a step")
    flag("--early-stop", action=switch, default=True, help="stop when the FID has not improved for --patience scorings")
    flag("--patience", type=positive_int, default=10, help="scorings without a better FID before stopping")
    flag("--eval-every", type=positive_int, default=1, help="epochs between scorings")
    flag("--eval-samples", type=positive_int, default=10_000, help="samples in a scoring")
    flag("--save-every", type=natural, default=0, help="epochs between numbered checkpoints; 0: none")
    flag("--data-dir", default=None, help="where MNIST/raw lies or is downloaded to (default: $MNIST_DIR, else data)")
    flag("--dataset", choices=("mnist", "digits"), default="mnist",
         help="digits: scikit-learn's embedded 8x8 digits, for trying things out without a download")
    flag("--limit", type=natural, default=0, help="train on this many random digits only; 0: on all")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    flag("--precision", choices=("auto", "fp32", "bf16"), default="auto",
         help="auto: bf16 on a GPU that has it, else fp32; bf16 on a CPU pays while nothing else wants its cores")
    flag("--compile", choices=("auto", "on", "off"), default="auto",
         help="torch.compile the networks; auto is off, which is faster on a CPU")
    flag("--deterministic", action=switch, default=False, help="deterministic CUDA kernels, at some cost in speed")
    flag("--seed", type=natural, default=0, help="seed of weights, order, noise and scoring")
    flag("--width", type=positive_int, default=64, help="channels of the networks, in their own unit")
    flag("--out-dir", default=None, help="folder for checkpoints/, reports/ and samples/ (default: this one; runs/... "
         "with --dry-run, --limit or --dataset digits)")
    flag("--resume", action=switch, default=False, help="continue the last run in --out-dir, with its flags")
    flag("--dry-run", action=switch, default=False, help="a few steps, one small scoring, every output file, in seconds")
    flag("--preset", choices=("default", "reference"), default="default",
         help="reference: the classic table (batch 128, Adam 1e-4, EMA 0.999, patience 10), to compare against")  # fmt: skip
