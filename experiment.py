"""What every trainer does around `fit`: device, data, folders, the callbacks in their order, signals and resuming."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import callbacks
import data
import distributed
import resuming
from checkpoint import FORMAT, keep_previous
from evaluation import Extractor, training_scorer
from training import Callback, ProgressBar, StopSignals, TrainState, fit
from utils import (
    ExpectedError,
    Interrupted,
    UsageError,
    choose_device,
    exclusive,
    is_first,
    make_deterministic,
    provenance,
    resolve_precision,
    say,
)

EVAL_SAMPLES = {"mnist": 10_000, "digits": 700}
SLOW_EVAL_SAMPLES = {"mnist": 1_000, "digits": 700}  # of a model of many evaluations per image, on a CPU
DRY_RUN = {"epochs": 2, "eval_every": 1, "eval_samples": 100, "save_every": 1}
DRY_RUN_BATCHES = 4
DEFAULT_FOLDERS = (".", "runs/dry-run", "runs/limit", "runs/digits")  # where runs go without --out-dir
GIF_COLUMNS = 8


class Experiment:
    """A run of one trainer. `prefix` names its checkpoints (`best_GAN_G.pt`), `title` its log and GIF.

    A trainer finds here `args` (those of the resumed run, if one is), `device`, `precision` and `state`; it builds its
    networks and its step, and hands them to `train`. `slow_sampling`: sampling takes many network evaluations, so fewer
    samples are scored on a CPU.

    Raises:
        UsageError: a batch size that the data do not fill, or flags that contradict the resumed run.
        ExpectedError: bad data or device; nothing to resume, or a file that is not what such a run leaves.
    """

    def __init__(self, args: argparse.Namespace, prefix: str, title: str, slow_sampling: bool = False):
        self.prefix, self.title, self.state = prefix, title, TrainState()
        self.out_dir = _out_dir(args, prefix)
        self.last = _last(self.out_dir, prefix)
        self.saved = resuming.read_last(self.last, prefix) if args.resume else None
        if self.saved:
            self._adopt_flags(args)
        elif args.dry_run:
            vars(args).update(DRY_RUN)
        self.args, self.device = args, choose_device(args.device)
        distributed.join(self.device)
        self.precision = resolve_precision(args.precision, self.device)
        args.precision = self.precision
        sizes = SLOW_EVAL_SAMPLES if slow_sampling and self.device.type == "cpu" else EVAL_SAMPLES
        args.eval_samples = args.eval_samples or sizes[args.dataset]
        if args.deterministic:
            make_deterministic()
        torch.manual_seed(args.seed)  # of the initial weights: all later randomness is keyed
        with distributed.first_before_others():
            self.digits = self._load_digits()
        self.batches_per_epoch = data.batches_per_epoch(self.digits, args.batch_size)
        if args.batch_size % distributed.count():
            raise UsageError(f"--batch-size {args.batch_size} cannot be divided among {distributed.count()} processes")
        if self.saved:
            self._adopt_state(self.saved["state"])
            self._check_unfinished()

    def _adopt_flags(self, args: argparse.Namespace) -> None:
        with self._doubting():
            resuming.adopt_flags(args, self.saved)

    def _adopt_state(self, saved: dict) -> None:
        with self._doubting():
            resuming.adopt_state(self.state, saved, self.batches_per_epoch, self.args.batch_size)

    def _restore(self, parts: dict) -> None:
        with self._doubting():
            resuming.restore(parts, self.saved["parts"])

    @contextlib.contextmanager
    def _doubting(self) -> Iterator[None]:
        """What does not fit in the file of the run to resume is refused in one line."""
        try:
            yield
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            what = " ".join(str(error).split())
            raise ExpectedError(f"{self.last} does not fit this version of the code ({what}); start a new run") from error

    def _check_unfinished(self) -> None:
        if self.state.stop_reason and "patience" not in self.args.given:
            raise ExpectedError(f"this run has stopped: {self.state.stop_reason}; give a larger --patience to go on")
        if self.state.epoch >= self.args.epochs:
            raise ExpectedError(f"this run has completed its {self.state.epoch} epochs; give a larger --epochs to go on")
        self.state.stop_reason = ""

    def _load_digits(self) -> data.Digits:
        args = self.args
        data_dir = args.data_dir or data.default_data_dir()
        digits = data.load_digits(args.dataset, "train", data_dir, self.device, args.limit, args.seed)
        if args.dry_run:
            digits = digits.subset(min(len(digits), DRY_RUN_BATCHES * args.batch_size), "dry run", args.seed)
        return digits

    def train(
        self,
        train_step: Callable,
        model: nn.Module,
        networks: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
        exports: dict[str, tuple[str, nn.Module]],
        sample_options: dict | None = None,
        guessing: float | None = None,
        two_way: bool = False,
    ) -> None:
        """Train, score and write until the run is over, or a signal interrupts it.

        Args:
            train_step: (images, labels) -> losses by name, as device scalars; it may read `self.state`.
            model: the network that is sampled: the monitor scores its EMA.
            networks, optimizers: by name, what a resumed run must restore; the optimizers' names are their columns in
                the log.
            exports: suffix of the file -> (model name, network), what to write; `model` is written as its EMA.
            sample_options: of the model's `sample`, for the monitor and the GIF.
            guessing: what a discriminator's `loss_d` would be if it guessed; None where there is none.
            two_way: the model learns to draw without labels too, and is scored in both ways.
        """
        args, signals = self.args, StopSignals()
        ema = callbacks.EMA(model, args.ema_decay) if args.ema else None
        sampled = ema.model if ema else model
        conditional = model.config.num_classes > 0
        scorer = training_scorer(
            self.digits, Extractor(self.device), args.eval_samples, args.seed, conditional, sample_options, two_way
        )
        shown = torch.arange(data.NUM_CLASSES).repeat_interleave(GIF_COLUMNS) if conditional else None
        flags = resuming.recorded(args)
        files = {
            f"{self.prefix}_{suffix}".rstrip("_"): (name, sampled if network is model else network)
            for suffix, (name, network) in exports.items()
        }
        gif = self.path("samples", "progress.gif")
        # The order is the contract: EMA, then what samples, then early stopping and learning rate, then the writers.
        hooks = {
            "ema": ema,
            "gif": callbacks.ProgressGIF(gif, sampled, signals, args.seed, GIF_COLUMNS, shown, sample_options),
            "monitor": callbacks.FIDMonitor(scorer, sampled, args.eval_every, signals),
            "watchdog": callbacks.Watchdog(guessing),
            "early_stopping": callbacks.EarlyStopping(args.patience, args.eval_every) if args.early_stop else None,
            "lr_schedule": self._lr_schedule(list(optimizers.values())),
            "log": callbacks.CSVLogger(self.path("reports", "training_log.csv"), optimizers),
            "bar": ProgressBar(args.epochs * self.batches_per_epoch * args.batch_size, args.epochs),
            "checkpoints": callbacks.CheckpointWriter(
                self.last.parent, files, args.save_every, {"flags": flags, "versions": provenance()}
            ),
        }
        writers = {"gif", "watchdog", "log", "bar", "checkpoints"}
        hooks = {name: hook for name, hook in hooks.items() if hook and (is_first() or name not in writers)}
        parts = {**networks, **optimizers, **hooks}
        header = {"format": FORMAT, "training": self.prefix, "flags": flags, "data_dir": args.data_dir}
        saver = callbacks.StateSaver(self.last, parts, header, signals)
        best = [self.last.parent / f"best_{file}.pt" for file in files]
        with exclusive(self.last.with_name(f".{self.prefix}.lock")) if is_first() else contextlib.nullcontext():
            self._begin(parts, saver, best)
            self._fit(train_step, [*self._core_watch(), *hooks.values(), saver], saver, signals)
        distributed.leave()
        if is_first():
            self._report([*best, hooks["log"].path, hooks["gif"].path, self.last])

    def _begin(self, parts: dict, saver: callbacks.StateSaver, best: list[Path]) -> None:
        """Go on from what was saved; or keep what a new run will replace, and make it the one that is continued."""
        if not self.saved:
            if is_first():
                for path in (*best, self.last):
                    keep_previous(path)
                saver.save(self.state)
            return
        self._restore(parts)
        if self.state.best_epoch and not all(path.exists() for path in best):
            say(f"{', '.join(map(str, best))}: not all there any more, so the best epoch from here on is written")
            self.state.best_fid, self.state.best_epoch = math.inf, 0

    def _fit(self, train_step: Callable, hooks: list[Callback], saver: callbacks.StateSaver, signals: StopSignals) -> None:
        """Train; where a signal stops it, save, and say how to go on."""
        with signals:
            try:
                fit(train_step, self.batches, self.args.epochs, hooks, self.state)
            except Interrupted as stop:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()  # the other processes wait for what this one has still to give to their steps
                saver.save(self.state)
                over = self.state.stop_reason or self.state.epoch >= self.args.epochs
                hint = "The run was over." if over else f"To continue: {self._resume_line()}"
                raise Interrupted(stop.signum, hint) from None
            except distributed.Left:  # in the middle of a step, which another process did not finish
                if not signals.received:
                    raise
                hint = f"The state of up to a minute ago is saved; to continue: {self._resume_line()}"
                raise Interrupted(signals.received, hint) from None

    def batches(self, epoch: int, start: int):
        """The batches of `epoch` from number `start` on, as `fit` asks for them."""
        return data.epoch_batches(self.digits, self.args.batch_size, self.args.seed, epoch, start)

    def path(self, folder: str, name: str) -> Path:
        """Where this run writes `name`, such as reports/gan_training_log.csv."""
        return self.out_dir / folder / f"{self.title}_{name}"

    def _lr_schedule(self, optimizers: list[torch.optim.Optimizer]) -> Callback:
        args = self.args
        if args.lr_schedule == "plateau":
            return callbacks.ReduceLROnPlateau(optimizers, max(1, args.patience // 2))
        total = args.epochs * self.batches_per_epoch if args.lr_schedule == "cosine" else None
        return callbacks.ScheduledLR(optimizers, args.warmup_steps, total)

    def _core_watch(self) -> list[Callback]:
        alone = distributed.count() == 1 and "OMP_NUM_THREADS" not in os.environ
        return [callbacks.SharedCores()] if alone and self.device.type == "cpu" and self.precision == "bf16" else []

    def _resume_line(self) -> str:
        processes = distributed.count()
        program = ["python"] if processes == 1 else ["torchrun", f"--nproc-per-node={processes}"]
        line = [*program, sys.argv[0], "--resume"]
        for flag, folder in (("--out-dir", str(self.out_dir)), ("--data-dir", self.args.data_dir)):
            if folder:
                line += [f"{flag}={folder}"] if folder.startswith("-") else [flag, folder]
        return shlex.join(line)

    def _report(self, files: list[Path]) -> None:
        state = self.state
        say(f"done after {state.epoch} epochs and {state.seconds / 60:.1f} minutes: "
            f"{state.stop_reason or 'all epochs completed'}")  # fmt: skip
        if state.best_epoch:
            ratio = state.log[state.best_epoch - 1]["fid_ratio"]
            floor = f", {ratio:.1f} times that of real digits" if ratio == ratio else ""  # nan: the floor is not known
            say(f"best FID {state.best_fid:.3f} at epoch {state.best_epoch}{floor} ({self.args.eval_samples} samples, "
                "mnist extractor, against the training set)")  # fmt: skip
        say("wrote", *(f"  {path}" for path in files if path.exists()))


def _out_dir(args: argparse.Namespace, prefix: str) -> Path:
    """`--out-dir`; else that of the last run to resume; else this folder for real runs, and one under runs/ for trials,
    which never touch shipped files."""
    if args.out_dir:
        return Path(args.out_dir)
    if args.resume and not {"dry_run", "limit", "dataset"}.intersection(args.given):
        found = [path for folder in DEFAULT_FOLDERS if (path := _last(Path(folder), prefix)).exists()]
        return max(found, key=lambda path: path.stat().st_mtime, default=_last(Path("."), prefix)).parent.parent
    if args.dry_run:
        return Path("runs/dry-run")
    if args.limit:
        return Path("runs/limit")
    return Path("runs/digits") if args.dataset == "digits" else Path(".")


def _last(folder: Path, prefix: str) -> Path:
    return folder / "checkpoints" / f"last_{prefix}.pt"
