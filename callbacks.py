"""What happens beside the training steps: EMA, FID monitor, early stopping, learning rate, checkpoints, GIF, CSV.

Their order in the list is the contract: EMA, then what only samples and can be repeated (ProgressGIF's frames, FIDMonitor),
Watchdog, EarlyStopping and ReduceLROnPlateau (which read the row that the monitor filled), then the writers.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import distributed
import plots
from checkpoint import save_model, write_tensors
from data import IMAGE_SIZE, NUM_CLASSES, to_uint8
from training import Callback, StopSignals, TrainState
from utils import ExpectedError, Interrupted, busy_seconds, is_first, keyed_generator, write_csv


class EMA(Callback):
    """Exponential moving average of a network's weights and buffers, in `self.model` (eval mode).

    The decay warms up as min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten. BatchNorm's
    running statistics are averaged too: with parameters alone, `running_mean` and `running_var` would keep their
    initial values (0 and 1) and the averaged network would be another function.
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
    """Every `every` epochs, adds the figures of `score(model)` to the row and keeps track of the best FID."""

    def __init__(self, score: Callable[[nn.Module], dict[str, float]], model: nn.Module, every: int, signals: StopSignals):
        self.score, self.model, self.every, self.signals = score, model, every, signals

    def after_epoch(self, state: TrainState) -> None:
        if (state.epoch + 1) % self.every:
            return
        with self.signals.at_once():  # nothing has changed yet, so a resumed run scores again
            figures = distributed.of_first(self.score(self.model))
        state.row.update(figures)
        if figures["fid"] < state.best_fid:
            state.best_fid, state.best_epoch = figures["fid"], state.epoch + 1


class Watchdog(Callback):
    """Puts a `warning` into the row when the samples collapse, or the discriminator has nothing to teach.

    `guessing` is the discriminator's loss where it tells real and generated images apart no better than by guessing.
    """

    VARIETY = 0.5  # of real digits
    NEAR = 0.02  # the share of `guessing` by which a loss counts as equal to it, or to zero

    def __init__(self, guessing: float | None = None):
        self.guessing = guessing

    def after_epoch(self, state: TrainState) -> None:
        row, warnings = state.row, []
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
        RuntimeError: after an epoch that was due to be scored, the row has no FID (or it is not finite).
    """

    def __init__(self, patience: int, every: int = 1):
        self.patience, self.every, self.without_gain = patience, every, 0

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
    """Halves the learning rates after `patience` scorings without a better FID (torch's scheduler for each optimizer)."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], patience: int):
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
        self.patience = patience - 1  # torch counts the scorings that it still bears
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
            scheduler.patience = self.patience  # a resumed run may change it


class ScheduledLR(Callback):
    """Raises the learning rates linearly over `warmup` steps; then keeps them, or with `total_steps` lowers them.

    They fall along a half cosine that reaches zero at `total_steps` (Loshchilov & Hutter 2017, eq. 5).
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], warmup: int, total_steps: int | None):
        self.warmup, self.total_steps = warmup, total_steps
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


class SharedCores(Callback):
    """Computes with as many threads as other work leaves cores for.

    For bf16 on a CPU: where one of its threads waits for a core, the others wait for it and keep theirs, so that a diffusion
    training beside one busy process would run at a quarter of its speed (benchmarks/README.md). The number of threads can
    change last bits, so it stays where OMP_NUM_THREADS says what it shall be.
    """

    SECONDS = 2.0  # between looks

    def __init__(self):
        self.most = torch.get_num_threads()

    def on_start(self, state: TrainState) -> None:
        self._looked = (time.monotonic(), *busy_seconds())

    def after_step(self, state: TrainState) -> None:
        if time.monotonic() - self._looked[0] < self.SECONDS:
            return
        before, self._looked = self._looked, (time.monotonic(), *busy_seconds())
        seconds, own, all_ = (new - old for new, old in zip(self._looked, before))
        others = (all_ - own) / seconds  # cores that they keep busy; nan where the system does not tell
        if math.isfinite(others):
            torch.set_num_threads(max(1, min(self.most, round(len(os.sched_getaffinity(0)) - others))))

    def on_end(self, state: TrainState) -> None:
        torch.set_num_threads(self.most)


class CheckpointWriter(Callback):
    """Writes `best_<file>.pt` whenever the FID is the best so far and `<file>_epoch_<n>.pt` every `save_every` epochs.

    `exports` maps the file part (such as `GAN_G`) to (model name, network).
    """

    def __init__(self, folder: Path, exports: dict[str, tuple[str, nn.Module]], save_every: int, meta: dict):
        self.folder, self.exports, self.save_every, self.meta = folder, exports, save_every, meta

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
    """One frame an epoch: the same noise through the network as it learns, the first frame before any training.

    A frame is a square of `columns`, or as many rows of them as `labels` [N], the classes to draw, fill. `options` are
    those of the model's `sample`. Frames are drawn beside the monitor, and written once the log has their FID.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        signals: StopSignals,
        seed: int,
        columns: int,
        labels: Tensor | None = None,
        options: dict | None = None,
    ):
        self.path, self.model, self.signals, self.seed, self.columns = path, model, signals, seed, columns
        self.labels, self.options = labels, options or {}
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
            pictures = [plots.captioned(frame.numpy(), caption) for frame, caption in zip(self.frames, captions)]
            plots.write_gif(self.path, torch.from_numpy(np.stack(pictures)))

    def _draw(self, number: int) -> None:
        with self.signals.at_once():  # a resumed run draws the frame again, in the same place
            rng = keyed_generator("cpu", self.seed, "progress")
            images = to_uint8(self.model.sample(self.n, self.labels, rng, **self.options))
        self.frames[number:] = [torch.from_numpy(plots.image_grid(images, self.columns))]

    def state_dict(self) -> dict:
        return {"frames": torch.stack(self.frames)} if self.frames else {}

    def load_state_dict(self, saved: dict) -> None:
        self.frames = list(saved.get("frames", []))
        blank = plots.image_grid(torch.zeros(self.n, 1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8), self.columns)
        if any(frame.shape != blank.shape or frame.dtype != torch.uint8 for frame in self.frames):
            raise ValueError("the GIF's frames are of another size")


def _fid(row: dict[str, float]) -> str:
    return f"   FID {row['fid']:.2f}" if "fid" in row else ""


class CSVLogger(Callback):
    """Rewrites the whole log after every epoch, so that each epoch stands in it once, resumed or not.

    `optimizers` are named as the columns of their learning rates: those that the next step will take.
    """

    def __init__(self, path: Path, optimizers: dict[str, torch.optim.Optimizer]):
        self.path, self.optimizers = path, optimizers

    def after_epoch(self, state: TrainState) -> None:
        for name, optimizer in self.optimizers.items():
            state.row[name] = optimizer.param_groups[0]["lr"]

    def at_rest(self, state: TrainState) -> None:
        if state.batch == 0 and state.log:
            write_csv(self.path, state.log)


class StateSaver(Callback):
    """Writes all that a resumed run needs: after every epoch, every minute, and when a signal asks to stop.

    `parts` are the objects with a `state_dict` (networks, optimizers, callbacks) by name. Of several processes, all stop
    where one is asked to, and the first one writes.
    """

    SECONDS = 60.0

    def __init__(self, path: Path, parts: dict[str, object], header: dict, signals: StopSignals):
        self.path, self.parts, self.header, self.signals = path, parts, header, signals
        self.saved_at = time.monotonic()

    def at_rest(self, state: TrainState) -> None:
        try:
            signum = distributed.largest(self.signals.received)
        except distributed.Left:  # it may have been told to stop, as we were
            signum = self.signals.received
            if not signum:
                raise
        if signum:
            raise Interrupted(signum)  # the trainer saves, then lets the process end
        if state.batch == 0 or time.monotonic() - self.saved_at > self.SECONDS:
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Write the file; a state with a loss or weight that is not finite is refused with `ExpectedError`."""
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
                    f"{name} {key} is not finite at step {step}; the files on disk hold the last good state: "
                    "lower --lr, then start again"
                )
