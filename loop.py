"""The one training loop, its state, and stopping by signal.

`fit` knows no model, optimizer or device. A train step maps a batch to losses; callbacks do everything else. Their order in
the list matters, see callbacks.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from files import ExpectedError, Interrupted, stop_signals


@dataclasses.dataclass
class TrainState:
    """Where a run stands. It is saved and restored as a whole. Losses stay on their device until `mean_losses`."""

    epoch: int = 0  # completed epochs
    batch: int = 0  # completed batches of the current epoch
    step: int = 0  # completed steps of the run
    images: int = 0  # images seen
    seconds: float = 0.0  # of training and scoring, without interruptions
    best_fid: float = math.inf
    best_epoch: int = 0  # counted from 1; 0: no epoch is scored yet
    stop_reason: str = ""  # why a callback ends the run
    loss_sums: dict[str, float] = dataclasses.field(default_factory=dict)  # name -> sum over this epoch
    row: dict[str, Any] = dataclasses.field(default_factory=dict)  # figures of the epoch that ends now
    log: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # one row for each completed epoch

    def __post_init__(self) -> None:
        self._last_tick = time.perf_counter()
        self._unfetched: list[dict[str, Any]] = []  # losses of the last steps, on their device

    def tick(self) -> None:
        """Add the time since the last tick to `seconds`."""
        now = time.perf_counter()
        self.seconds += now - self._last_tick
        self._last_tick = now

    def count(self, losses: dict[str, Any], images: int) -> None:
        """Count a step with its losses, scalars on the device. Nothing is fetched."""
        self._unfetched.append(losses)
        self.batch += 1
        self.step += 1
        self.images += images
        self.tick()

    def mean_losses(self) -> dict[str, float]:
        """Mean losses of the epoch so far, fetched from the device.

        Raises:
            ExpectedError: a loss is not finite. The message names the loss and the step. A step returns nan for a gradient
                that is not finite.
        """
        import torch

        steps = self._unfetched
        self._unfetched = []
        for name in steps[0] if steps else ():
            for i, loss in enumerate(torch.stack([losses[name] for losses in steps]).tolist()):
                if not math.isfinite(loss):
                    raise ExpectedError(
                        f"{name} or its gradient is not finite at step {self.step - len(steps) + i + 1}; the files hold "
                        "the last good state: lower --lr, then start again"
                    )
                self.loss_sums[name] = self.loss_sums.get(name, 0.0) + loss
        return {name: total / self.batch for name, total in self.loss_sums.items()}

    def open_row(self) -> None:
        """Begin the log row of an epoch after its last step. Errors as for `mean_losses`."""
        self.row = {"epoch": self.epoch + 1, "step": self.step, "images": self.images, **self.mean_losses()}

    def close_epoch(self) -> None:
        """Count the epoch as completed and add its row to the log."""
        self.tick()
        self.log.append(self.row | {"seconds": self.seconds})
        self.epoch += 1
        self.batch = 0
        self.row = {}
        self.loss_sums = {}


class Callback:
    """Something that happens beside the steps. Callbacks communicate through the state; `__init__` takes other objects."""

    def on_start(self, state: TrainState) -> None:
        """Before the first step of this process."""

    def after_step(self, state: TrainState) -> None:
        """After every step. It must not wait for the device."""

    def after_epoch(self, state: TrainState) -> None:
        """After the last step of an epoch. Figures go into `state.row`."""

    def at_rest(self, state: TrainState) -> None:
        """After every step and every completed epoch, when model, callbacks and state are consistent: time to save."""

    def on_end(self, state: TrainState) -> None:
        """At the end of the run, also after an error."""

    def state_dict(self) -> dict[str, Any]:
        """What this callback needs to resume: tensors and primitives."""
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Resume from `saved`."""


def fit(
    train_step: Callable[[Any, Any], dict[str, Any]],
    batches: Callable[[int, int], Iterable[tuple[Any, Any]]],
    epochs: int,
    callbacks: list[Callback],
    state: TrainState,
) -> TrainState:
    """Train until `epochs` are complete, or until a callback sets `state.stop_reason`.

    Args:
        train_step: (images, labels) -> losses by name, scalars on the device.
        batches: (epoch, first batch) -> the batches of that epoch from the first one on.
        callbacks: called in this order at every hook.
        state: where to start; it is changed in place, and returned.
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
    """Delays the signals that ask to stop until the training is at rest. Within `at_once()` they act immediately.

    A second SIGINT ends the process at once, even in a long step. A second SIGTERM, which some tools send, changes nothing.
    Outside of the main thread, where no signal can be handled, nothing stops the training.
    """

    def __init__(self) -> None:
        self.received = 0
        self._immediate = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for signum in stop_signals():
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: object) -> None:
        if self.received:
            return
        self.received = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends the process without waiting for Python
        if self._immediate:
            raise Interrupted(signum)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A signal raises `Interrupted` inside this block: for work that can be repeated, such as sampling and scoring."""
        self._immediate = True  # before the check, so that a signal between the two is not lost
        try:
            if self.received:
                raise Interrupted(self.received)
            yield
        finally:
            self._immediate = False
