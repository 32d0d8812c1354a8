"""What happens beside the training steps: EMA, FID monitor, early stopping, learning rate, and the writers.

Their order in the list matters. First comes EMA, then ProgressGIF and FIDMonitor, which draw samples and can be repeated.
Watchdog, EarlyStopping and the learning rate read the row that the monitor filled. The writers come last.
"""

from __future__ import annotations

import copy
import datetime
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import save_model, write_tensors
from data import IMAGE_SIZE, NUM_CLASSES, to_uint8
from engine import distributed
from figures import images
from files import ExpectedError, Interrupted, is_first, say, write_csv
from loop import Callback, StopSignals, TrainState
from utils import sampling_rng

# --------------------------------------------------------------------------------------------------------------------
# Average, scoring, stopping, learning rate


class EMA(Callback):
    """Exponential moving average of a network's weights and buffers, in `self.model` (eval mode).

    The decay warms up as min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten. BatchNorm's running
    statistics are averaged too. Otherwise they would keep their initial values, 0 and 1, and the average would be another
    function.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._averages, self._counters = _split_by_type(self.model)
        self._values, self._counts = _split_by_type(model)

    @torch.no_grad()
    def after_step(self, state: TrainState) -> None:
        decay = min(self.decay, (1 + state.step) / (10 + state.step))
        torch._foreach_lerp_(self._averages, self._values, 1 - decay)
        if self._counters:
            torch._foreach_copy_(self._counters, self._counts)

    def state_dict(self) -> dict:
        return self.model.state_dict()

    def load_state_dict(self, saved: dict) -> None:
        self.model.load_state_dict(saved)


def _split_by_type(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The floating-point tensors of a network's state, and its integer ones (BatchNorm's counters)."""
    tensors = list(model.state_dict().values())
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]


class FIDMonitor(Callback):
    """Adds the figures of `score(model)` to the row every `every` epochs, and remembers the best FID."""

    def __init__(self, score: Callable[[nn.Module], dict[str, float]], model: nn.Module, every: int, signals: StopSignals):
        self.score = score
        self.model = model
        self.every = every
        self.signals = signals

    def after_epoch(self, state: TrainState) -> None:
        if (state.epoch + 1) % self.every:
            return
        with self.signals.at_once():  # nothing has changed yet, so a resumed run scores again
            figures = distributed.of_first(self.score(self.model))
        state.row.update(figures)
        if figures["fid"] < state.best_fid:
            state.best_fid = figures["fid"]
            state.best_epoch = state.epoch + 1


class Watchdog(Callback):
    """Puts a `warning` into the row when the samples collapse, or when the discriminator has nothing to teach.

    `guessing` is the loss of a discriminator that only guesses. None: there is no discriminator.
    """

    VARIETY = 0.5  # of real digits; below, the samples count as collapsed
    NEAR = 0.02  # a loss within this share of `guessing` counts as equal to it, or to zero

    def __init__(self, guessing: float | None = None):
        self.guessing = guessing

    def after_epoch(self, state: TrainState) -> None:
        row = state.row
        warnings = []
        if row.get("digits", NUM_CLASSES) < NUM_CLASSES:
            warnings.append(f"mode collapse: only {row['digits']} of {NUM_CLASSES} digits are drawn")
        elif row.get("variety", 1.0) < self.VARIETY:
            warnings.append(f"mode collapse: samples vary {100 * row['variety']:.0f} % as much as real digits")
        if self.guessing:
            share = row["loss_d"] / self.guessing
            if share < self.NEAR:
                warnings.append("dead discriminator: it knows every image, and its loss is zero")
            elif abs(share - 1) < self.NEAR:
                warnings.append("dead discriminator: it guesses")
        if warnings:
            row["warning"] = "; ".join(warnings)


class EarlyStopping(Callback):
    """Stops after `patience` scorings without a better FID.

    Raises:
        RuntimeError: an epoch that should be scored has no FID, or one that is not finite.
    """

    def __init__(self, patience: int, every: int = 1):
        self.patience = patience
        self.every = every
        self.without_gain = 0

    def after_epoch(self, state: TrainState) -> None:
        if (state.epoch + 1) % self.every:
            return
        if not math.isfinite(state.row.get("fid", math.nan)):
            raise RuntimeError(f"early stopping watches the FID, which epoch {state.epoch + 1} does not have")
        improved = state.best_epoch == state.epoch + 1
        self.without_gain = 0 if improved else self.without_gain + 1
        if self.without_gain >= self.patience:
            best = f"best {state.best_fid:.3f} at epoch {state.best_epoch}"
            state.stop_reason = f"no better FID in {self.patience} scorings ({best})"

    def state_dict(self) -> dict:
        return {"without_gain": self.without_gain}

    def load_state_dict(self, saved: dict) -> None:
        self.without_gain = saved["without_gain"]


class ReduceLROnPlateau(Callback):
    """Halves the learning rates after `patience` scorings without a better FID, by torch's scheduler."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], patience: int):
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
        self.patience = patience - 1  # torch counts the scorings that it tolerates
        self.schedulers = [plateau(o, factor=0.5, patience=self.patience, threshold=0.0) for o in optimizers]

    def after_epoch(self, state: TrainState) -> None:
        if "fid" in state.row:
            for scheduler in self.schedulers:
                scheduler.step(state.row["fid"])

    def state_dict(self) -> dict:
        return {"schedulers": [scheduler.state_dict() for scheduler in self.schedulers]}

    def load_state_dict(self, saved: dict) -> None:
        for scheduler, part in zip(self.schedulers, saved["schedulers"]):
            scheduler.load_state_dict(part)
            scheduler.patience = self.patience  # a resumed run may have another


class ScheduledLR(Callback):
    """Raises the learning rates linearly over `warmup` steps. Then they stay, or with `total_steps` they fall.

    They fall along a half cosine that reaches zero at `total_steps` (Loshchilov & Hutter 2017, eq. 5).
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], warmup: int, total_steps: int | None):
        self.warmup = warmup
        self.total_steps = total_steps
        self.peaks = [(optimizer, [group["lr"] for group in optimizer.param_groups]) for optimizer in optimizers]

    def on_start(self, state: TrainState) -> None:
        self.after_step(state)

    def after_step(self, state: TrainState) -> None:
        factor = min(1.0, (state.step + 1) / self.warmup) if self.warmup else 1.0
        if self.total_steps:
            factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, state.step / self.total_steps)))
        for optimizer, peaks in self.peaks:
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor


# --------------------------------------------------------------------------------------------------------------------
# Writers


class CheckpointWriter(Callback):
    """Writes `best_<file>.pt` at every best FID, and `<file>_epoch_<n>.pt` every `save_every` epochs.

    `exports` maps the file part, such as `GAN_G`, to (model name, network).
    """

    def __init__(self, folder: Path, exports: dict[str, tuple[str, nn.Module]], save_every: int, meta: dict):
        self.folder = folder
        self.exports = exports
        self.save_every = save_every
        self.meta = meta

    def after_epoch(self, state: TrainState) -> None:
        if state.best_epoch == state.epoch + 1:
            self._write("best_{file}.pt", state)
        if self.save_every and (state.epoch + 1) % self.save_every == 0:
            self._write("{file}_epoch_{epoch:03d}.pt", state)

    def _write(self, pattern: str, state: TrainState) -> None:
        meta = {"epoch": state.epoch + 1, "metrics": dict(state.row), **self.meta}
        for file, (name, network) in self.exports.items():
            save_model(self.folder / pattern.format(file=file, epoch=state.epoch + 1), name, network, meta)


class ProgressGIF(Callback):
    """A GIF with one frame an epoch, drawn from the same noise. The first frame is from before the training.

    A frame is a square of `columns` images a side. With `labels` [N], the classes to draw, it has N images, `columns` in a
    row. `options` are those of the model's `sample`. The file is written after the log row, because its caption shows the
    FID.
    """

    def __init__(
        self,
        path: Path,
        model: Any,
        signals: StopSignals,
        seed: int,
        columns: int,
        labels: Tensor | None = None,
        options: dict | None = None,
    ):
        self.path = path
        self.model = model
        self.signals = signals
        self.seed = seed
        self.columns = columns
        self.labels = labels
        self.options = options or {}
        self.n = columns**2 if labels is None else len(labels)
        self.frames: list[Tensor] = []

    def on_start(self, state: TrainState) -> None:
        if not self.frames:
            self._draw(0)

    def after_epoch(self, state: TrainState) -> None:
        self._draw(state.epoch + 1)

    def at_rest(self, state: TrainState) -> None:
        if state.batch == 0 and state.log:
            captions = ["before training"] + [f"epoch {row['epoch']}{_fid(row)}" for row in state.log]
            pictures = [images.captioned(frame.numpy(), caption) for frame, caption in zip(self.frames, captions)]
            images.write_gif(self.path, torch.from_numpy(np.stack(pictures)))

    def _draw(self, number: int) -> None:
        with self.signals.at_once():  # a resumed run draws the frame again, in the same place
            samples = to_uint8(self.model.sample(self.n, self.labels, sampling_rng(self.seed), **self.options))
        self.frames[number:] = [torch.from_numpy(images.image_grid(samples, self.columns))]

    def state_dict(self) -> dict:
        return {"frames": torch.stack(self.frames)} if self.frames else {}

    def load_state_dict(self, saved: dict) -> None:
        self.frames = list(saved.get("frames", []))
        blank = images.image_grid(torch.zeros(self.n, 1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8), self.columns)
        if any(frame.shape != blank.shape or frame.dtype != torch.uint8 for frame in self.frames):
            raise ValueError("the GIF's frames are of another size")


def _fid(row: dict[str, float]) -> str:
    return f"   FID {row['fid']:.2f}" if "fid" in row else ""


class CSVLogger(Callback):
    """Rewrites the whole log after every epoch, so that each epoch stands in it once, resumed or not.

    `rates` maps a column to an optimizer. The column has its learning rate in the next step.
    """

    def __init__(self, path: Path, rates: dict[str, torch.optim.Optimizer]):
        self.path = path
        self.rates = rates

    def after_epoch(self, state: TrainState) -> None:
        for column, optimizer in self.rates.items():
            state.row[column] = optimizer.param_groups[0]["lr"]

    def at_rest(self, state: TrainState) -> None:
        if state.batch == 0 and state.log:
            write_csv(self.path, state.log)


class ProgressBar(Callback):
    """A bar over the whole run: losses, FID, best FID, images/s, time left. Without a terminal: one line an epoch."""

    FETCH_SECONDS = 2.0  # losses are fetched from the device no more often than this

    def __init__(self, total_images: int, epochs: int):
        self.total_images = total_images
        self.epochs = epochs
        self.bar: Any = None

    def on_start(self, state: TrainState) -> None:
        self.bar = tqdm(
            total=self.total_images,
            initial=state.images,
            unit="img",
            unit_scale=True,
            smoothing=0,
            dynamic_ncols=True,
            disable=not (sys.stderr and sys.stderr.isatty()),
        )
        self.bar.set_description(f"epoch {state.epoch + 1}/{self.epochs}")
        self.fetched = time.perf_counter()

    def after_step(self, state: TrainState) -> None:
        self.bar.update(state.images - self.bar.n)
        if time.perf_counter() - self.fetched > self.FETCH_SECONDS:
            self._show(state, state.mean_losses())  # without a terminal too: a loss that is not finite ends the run here
            self.fetched = time.perf_counter()

    def after_epoch(self, state: TrainState) -> None:
        self._show(state, state.row)
        if self.bar.disable:
            state.tick()
            rate = state.images / state.seconds
            left = datetime.timedelta(seconds=round((self.total_images - state.images) / rate))
            figures = self._figures(state, state.row)
            say(f"epoch {state.epoch + 1}/{self.epochs}  {figures}  {rate:.0f} img/s  {left} left")

    def on_end(self, state: TrainState) -> None:
        if self.bar is not None:
            self.bar.close()

    def _show(self, state: TrainState, row: dict[str, Any]) -> None:
        self.bar.set_description(f"epoch {state.epoch + 1}/{self.epochs}", refresh=False)
        self.bar.set_postfix_str(self._figures(state, row))

    def _figures(self, state: TrainState, row: dict[str, Any]) -> str:
        last = state.log[-1] if state.log else {}
        shown = [f"{name} {value:.3f}" for name, value in row.items() if name.startswith("loss")]
        scored = row if "fid" in row else last
        if "fid" in scored:
            shown.append(f"FID {scored['fid']:.3f}")
        if "label_accuracy" in scored:
            shown.append(f"label accuracy {100 * scored['label_accuracy']:.2f} %")
        if warning := (row if "epoch" in row else last).get("warning"):
            shown.append(f"({warning})")
        if state.best_epoch:
            shown.append(f"best {state.best_fid:.3f} @{state.best_epoch}")
        return "  ".join(shown)


class Stateful(Protocol):
    """A network, an optimizer or a callback."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, saved: dict[str, Any], /) -> Any: ...


class StateSaver(Callback):
    """Writes everything that a resumed run needs: after every epoch, every minute, and when a signal asks to stop.

    `parts` are networks, optimizers and callbacks by name. With several processes, all stop when one is asked to, and
    process 0 writes.
    """

    SECONDS = 60.0

    def __init__(self, path: Path, parts: dict[str, Stateful], header: dict, signals: StopSignals):
        self.path = path
        self.parts = parts
        self.header = header
        self.signals = signals
        self.saved_at = time.monotonic()

    def at_rest(self, state: TrainState) -> None:
        try:
            signum = distributed.largest(self.signals.received)
        except distributed.Left:  # the other process may have been asked to stop, as this one was
            signum = self.signals.received
            if not signum:
                raise
        if signum:
            raise Interrupted(signum)  # the run saves, then ends
        if state.batch == 0 or time.monotonic() - self.saved_at > self.SECONDS:
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Write the file. `ExpectedError`: a loss or a weight is not finite, and the file is kept as it was."""
        if not is_first():
            return
        state.mean_losses()
        position = {name: value for name, value in vars(state).items() if not name.startswith("_")}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        _check_finite(parts, state.step)
        write_tensors(self.path, {**self.header, "state": position, "parts": parts})
        self.saved_at = time.monotonic()


def _check_finite(parts: dict[str, dict], step: int) -> None:
    for name, part in parts.items():
        for key, value in part.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
                raise ExpectedError(
                    f"{name} {key} is not finite at step {step}; the files hold the last good state: lower --lr, then "
                    "start again"
                )
