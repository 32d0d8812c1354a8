"""The one training loop, its state, its progress bar, and stopping by signal.

`fit` knows no model, optimizer or device: a train step maps a batch to losses, callbacks do everything else, and the
order of the callbacks is the contract (EMA, then monitor, then early stopping, then the writers).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from utils import ExpectedError, Interrupted, say


@dataclasses.dataclass
class TrainState:
    """Where a run stands; saved and restored as a whole. Losses stay on their device until `mean_losses` fetches them."""

    epoch: int = 0  # completed epochs
    batch: int = 0  # completed batches of the current epoch
    step: int = 0  # completed steps of the run
    images: int = 0  # images seen
    seconds: float = 0.0  # of training and scoring, without interruptions
    best_fid: float = math.inf
    best_epoch: int = 0  # counted from 1; 0: nothing scored yet
    stop_reason: str = ""
    loss_sums: dict[str, float] = dataclasses.field(default_factory=dict)  # name -> sum over this epoch
    row: dict[str, Any] = dataclasses.field(default_factory=dict)  # figures of the epoch being closed
    log: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # one row for each completed epoch

    def __post_init__(self):
        self._last_tick = time.perf_counter()
        self._unfetched: list[dict[str, Any]] = []  # the losses of the last steps, on their device

    def tick(self) -> None:
        """Add the time since the last tick to `seconds`."""
        now = time.perf_counter()
        self.seconds, self._last_tick = self.seconds + now - self._last_tick, now

    def count(self, losses: dict[str, Any], images: int) -> None:
        """Add one step's losses (device scalars; nothing is fetched)."""
        self._unfetched.append(losses)
        self.batch, self.step, self.images = self.batch + 1, self.step + 1, self.images + images
        self.tick()

    def mean_losses(self) -> dict[str, float]:
        """Mean losses of the epoch so far, fetched from the device.

        Raises:
            ExpectedError: a loss is not finite (the step makes it nan if its gradient is not); names it and its step.
        """
        import torch

        steps, self._unfetched = self._unfetched, []
        for name in steps[0] if steps else ():
            for i, loss in enumerate(torch.stack([losses[name] for losses in steps]).tolist()):
                if not math.isfinite(loss):
                    raise ExpectedError(
                        f"{name} or its gradient is not finite at step {self.step - len(steps) + i + 1}; what has been "
                        "written is the last good state: lower --lr, then start again"
                    )
                self.loss_sums[name] = self.loss_sums.get(name, 0.0) + loss
        return {name: total / self.batch for name, total in self.loss_sums.items()}

    def open_row(self) -> None:
        """Begin the row of the epoch whose last step was taken; raises as `mean_losses` does."""
        self.row = {"epoch": self.epoch + 1, "step": self.step, "images": self.images, **self.mean_losses()}

    def close_epoch(self) -> None:
        """Count the epoch as completed and file its row."""
        self.tick()
        self.log.append(self.row | {"seconds": self.seconds})
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
            state.open_row()
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

    A second SIGINT ends the process at once, also within a long step; a second SIGTERM (some tools send two) changes
    nothing.
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
            return
        self.received = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the system serves the next one, without waiting for Python
        if self._immediate:
            raise Interrupted(signum)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that can be repeated (sampling, scoring): a signal raises `Interrupted` inside this block."""
        self._immediate = True  # before the question: a signal that comes between the two must not be lost
        try:
            if self.received:
                raise Interrupted(self.received)
            yield
        finally:
            self._immediate = False


class ProgressBar(Callback):
    """A bar over the whole run: losses, FID, best FID, images/s, time left. Without a terminal: a line an epoch."""

    FETCH_SECONDS = 2.0  # losses are fetched from the device no more often than this

    def __init__(self, total_images: int, epochs: int):
        self.total_images, self.epochs = total_images, epochs
        self.bar = None

    def on_start(self, state: TrainState) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.total_images, initial=state.images, unit="img", unit_scale=True, smoothing=0, dynamic_ncols=True,
            disable=not (sys.stderr and sys.stderr.isatty()),
        )  # fmt: skip
        self.bar.set_description(f"epoch {state.epoch + 1}/{self.epochs}")
        self.fetched = time.perf_counter()

    def after_step(self, state: TrainState) -> None:
        self.bar.update(state.images - self.bar.n)
        if time.perf_counter() - self.fetched > self.FETCH_SECONDS:
            self._show(state, state.mean_losses())  # also where nobody looks: a loss that is not finite ends the run here
            self.fetched = time.perf_counter()

    def after_epoch(self, state: TrainState) -> None:
        self._show(state, state.row)
        if self.bar.disable:
            state.tick()
            rate = state.images / state.seconds
            left = datetime.timedelta(seconds=round((self.total_images - state.images) / rate))
            say(f"epoch {state.epoch + 1}/{self.epochs}  {self._figures(state, state.row)}  "
                f"{rate:.0f} img/s  {left} left")  # fmt: skip

    def on_end(self, state: TrainState) -> None:
        if self.bar is not None:
            self.bar.close()

    def _show(self, state: TrainState, row: dict[str, Any]) -> None:
        self.bar.set_description(f"epoch {state.epoch + 1}/{self.epochs}", refresh=False)
        self.bar.set_postfix_str(self._figures(state, row))

    def _figures(self, state: TrainState, row: dict[str, Any]) -> str:
        last = state.log[-1] if state.log else {}
        shown = [f"{name} {value:.3f}" for name, value in row.items() if name.startswith("loss")]
        if "fid" in (scored := row if "fid" in row else last):
            shown.append(f"FID {scored['fid']:.3f}")
        if "label_accuracy" in scored:
            shown.append(f"label accuracy {100 * scored['label_accuracy']:.2f} %")
        if warning := (row if "epoch" in row else last).get("warning"):
            shown.append(f"({warning})")
        if state.best_epoch:
            shown.append(f"best {state.best_fid:.3f} @{state.best_epoch}")
        return "  ".join(shown)
