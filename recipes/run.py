"""What every trainer does around `fit`: device, data, folders, callbacks in their order, signals, resuming."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import callbacks
import data
from checkpoint import FORMAT, keep_previous
from engine import distributed
from files import ExpectedError, Interrupted, UsageError, check_writable, exclusive, is_first, say
from loop import Callback, StopSignals, TrainState, fit
from recipes import resume
from scoring.extractor import Extractor
from scoring.scorer import training_scorer
from utils import choose_device, make_deterministic, provenance, resolve_precision, scoring_device

EVAL_SAMPLES = {"mnist": 10_000, "digits": 700}
SLOW_EVAL_SAMPLES = {"mnist": 1_000, "digits": 700}  # of a model with many network evaluations an image, on a CPU
DRY_RUN = {"epochs": 2, "eval_every": 1, "eval_samples": 100, "save_every": 1}
DRY_RUN_BATCHES = 4
DEFAULT_FOLDERS = (".", "runs/dry-run", "runs/limit", "runs/digits")  # of runs without --out-dir
GIF_COLUMNS = 8
WORTH_COMPILING = 3_000_000  # images of a whole training on a GPU; see docs/speed.md


class Run:
    """A run of one trainer. `prefix` names its checkpoints (`best_GAN_G.pt`), `title` its log and GIF.

    A trainer reads `args` (those of the resumed run, if there is one), `device`, `precision`, `compiled`, `digits` and
    `state` from it. Then it builds its networks and its step, and gives them to `train`. `slow_sampling`: an image takes
    many network evaluations, so fewer samples are scored without a CUDA GPU.

    Raises:
        UsageError: a batch size larger than the data set, or flags that contradict the resumed run.
        ExpectedError: bad data or device; nothing to resume, or a file that is no saved run.
    """

    def __init__(self, args: argparse.Namespace, prefix: str, title: str, slow_sampling: bool = False):
        self.prefix = prefix
        self.title = title
        self.state = TrainState()
        self.out_dir = _out_dir(args, prefix)
        self.last = _last(self.out_dir, prefix)
        self.saved = resume.read_last(self.last, prefix) if args.resume else None
        if self.saved:
            with self._checked():
                resume.adopt_flags(args, self.saved)
        elif args.dry_run:
            vars(args).update(DRY_RUN)
        self.args = args
        self.device = choose_device(args.device)
        distributed.join(self.device)
        self.precision = resolve_precision(args.precision, self.device)
        args.precision = self.precision
        sizes = SLOW_EVAL_SAMPLES if slow_sampling and self.device.type != "cuda" else EVAL_SAMPLES
        args.eval_samples = args.eval_samples or sizes[args.dataset]
        if args.deterministic:
            make_deterministic()
        else:
            torch.backends.cudnn.benchmark = True  # tries the kernels of each convolution once, and takes the fastest
        torch.manual_seed(args.seed)  # for the initial weights; all later randomness is keyed
        with distributed.first_before_others():
            self.digits = self._load_digits()
        self.batches_per_epoch = data.batches_per_epoch(self.digits, args.batch_size)
        self.compiled = args.compile == "on"
        if args.compile == "auto" and self._pays_to_compile():
            self.compiled = True
            torch._dynamo.config.suppress_errors = True  # where the compiler fails, the run goes on without it
        if args.batch_size % distributed.count():
            raise UsageError(f"--batch-size {args.batch_size} cannot be divided among {distributed.count()} processes")
        if self.saved:
            with self._checked():
                resume.adopt_state(self.state, self.saved["state"], self.batches_per_epoch, args.batch_size)
            self._check_unfinished()

    def _pays_to_compile(self) -> bool:
        """Whether the run has a GPU and its compiler, and is long enough to win back the time that compilation takes."""
        images = self.args.epochs * self.batches_per_epoch * self.args.batch_size
        return self.device.type == "cuda" and images >= WORTH_COMPILING and importlib.util.find_spec("triton") is not None

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        """Report a saved run that does not fit as one error line."""
        try:
            yield
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            what = " ".join(str(error).split())
            raise ExpectedError(f"{self.last} does not fit this version of the code ({what}); start a new run") from error

    def _check_unfinished(self) -> None:
        if self.state.stop_reason and "patience" not in self.args.given:
            raise ExpectedError(f"this run has stopped: {self.state.stop_reason}; give a larger --patience to go on")
        if self.args.eval_every > self.args.epochs:
            raise UsageError(f"--eval-every {self.args.eval_every} is more than the run's {self.args.epochs} epochs")
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
        train_step: Callable[[Tensor, Tensor], dict[str, Tensor]],
        *,
        model: Any,
        networks: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
        rates: dict[str, torch.optim.Optimizer],
        exports: dict[str, tuple[str, nn.Module]],
        sample_options: dict[str, Any] | None = None,
        guessing: float | None = None,
        two_way: bool = False,
    ) -> None:
        """Train, score and write until the run is over or a signal interrupts it.

        Args:
            train_step: (images, labels) -> losses by name, scalars on the device. It may read `self.state`.
            model: the network that is sampled. The monitor scores its EMA.
            networks, optimizers: what a resumed run restores, by name.
            rates: column of the log -> the optimizer whose learning rate stands there.
            exports: suffix of the file -> (model name, network) to write. `model` is written as its EMA.
            sample_options: options of the model's `sample`, for the monitor and the GIF.
            guessing: the `loss_d` of a discriminator that only guesses. None: there is no discriminator.
            two_way: score the model without labels and with them.
        """
        signals = StopSignals()
        ema = callbacks.EMA(model, self.args.ema_decay) if self.args.ema else None
        sampled = ema.model if ema else model
        files = {
            f"{self.prefix}_{suffix}".rstrip("_"): (name, sampled if network is model else network)
            for suffix, (name, network) in exports.items()
        }
        hooks = {"ema": ema} | self._hooks(
            sampled, signals, sample_options or {}, two_way, guessing, optimizers, rates, files
        )
        writers = {"gif", "watchdog", "log", "bar", "checkpoints"}
        hooks = {name: hook for name, hook in hooks.items() if hook and (is_first() or name not in writers)}
        parts = {**networks, **{f"{name} optimizer": optimizer for name, optimizer in optimizers.items()}, **hooks}
        flags = resume.recorded(self.args)
        header = {"format": FORMAT, "training": self.prefix, "flags": flags, "data_dir": self.args.data_dir}
        saver = callbacks.StateSaver(self.last, parts, header, signals)
        best = [self.last.parent / f"best_{file}.pt" for file in files]
        if is_first():
            for folder in ("checkpoints", "reports", "samples"):
                check_writable(self.out_dir / folder)
        with exclusive(self.last.with_name(f".{self.prefix}.lock")) if is_first() else contextlib.nullcontext():
            self._begin(parts, saver, best, rates)
            self._fit(train_step, [*hooks.values(), saver], saver, signals)
        distributed.leave()
        if is_first():
            self._report([*best, hooks["log"].path, hooks["gif"].path, self.last])

    def _hooks(
        self,
        sampled: Any,
        signals: StopSignals,
        options: dict[str, Any],
        two_way: bool,
        guessing: float | None,
        optimizers: dict[str, torch.optim.Optimizer],
        rates: dict[str, torch.optim.Optimizer],
        files: dict[str, tuple[str, nn.Module]],
    ) -> dict[str, Any]:
        """The callbacks after the EMA, by name. Their order is the contract; see callbacks.py."""
        args = self.args
        conditional = sampled.config.num_classes > 0
        extractor = Extractor(scoring_device(self.device))
        scorer = training_scorer(self.digits, extractor, args.eval_samples, args.seed, conditional, options, two_way)
        shown = torch.arange(data.NUM_CLASSES).repeat_interleave(GIF_COLUMNS) if conditional else None
        gif = self.path("samples", "progress.gif")
        meta = {"flags": resume.recorded(args), "versions": provenance()}
        return {
            "gif": callbacks.ProgressGIF(gif, sampled, signals, args.seed, GIF_COLUMNS, shown, options),
            "monitor": callbacks.FIDMonitor(scorer, sampled, args.eval_every, signals),
            "watchdog": callbacks.Watchdog(guessing),
            "early_stopping": callbacks.EarlyStopping(args.patience, args.eval_every) if args.early_stop else None,
            "lr_schedule": self._lr_schedule(list(optimizers.values())),
            "log": callbacks.CSVLogger(self.path("reports", "training_log.csv"), rates),
            "bar": callbacks.ProgressBar(args.epochs * self.batches_per_epoch * args.batch_size, args.epochs),
            "checkpoints": callbacks.CheckpointWriter(self.last.parent, files, args.save_every, meta),
        }

    def _begin(self, parts: dict, saver: callbacks.StateSaver, best: list[Path], rates: dict) -> None:
        """Restore what was saved. A new run keeps the files that it will replace, and saves its first state."""
        if not self.saved:
            if is_first():
                for path in (*best, self.last):
                    keep_previous(path)
                saver.save(self.state)
            return
        with self._checked():
            before = self.args.before
            factors = {
                name: getattr(self.args, column) / before[column]
                for column, optimizer in rates.items()
                for name, part in parts.items()
                if part is optimizer and before.get(column)
            }
            resume.restore(parts, self.saved["parts"], factors)
        if self.state.best_epoch and not all(path.exists() for path in best):
            say(f"{', '.join(map(str, best))}: not all of them exist, so the best epoch from here on is written")
            self.state.best_fid = math.inf
            self.state.best_epoch = 0

    def _fit(self, train_step: Callable, hooks: list[Callback], saver: callbacks.StateSaver, signals: StopSignals) -> None:
        """Train. When a signal stops the training, save it and say how to continue."""
        with signals:
            try:
                fit(train_step, self.batches, self.args.epochs, hooks, self.state)
            except Interrupted as stop:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()  # the other processes still wait for this one's part of their steps
                saver.save(self.state)
                over = self.state.stop_reason or self.state.epoch >= self.args.epochs
                hint = "The run was over." if over else f"To continue: {self._resume_line()}"
                raise Interrupted(stop.signum, hint) from None
            except distributed.Left:  # another process ended in the middle of a step
                if not signals.received:
                    raise
                hint = f"The state of up to a minute ago is saved; to continue: {self._resume_line()}"
                raise Interrupted(signals.received, hint) from None

    def batches(self, epoch: int, start: int) -> Iterable[tuple[Tensor, Tensor]]:
        """The batches of `epoch` from number `start` on, for `fit`."""
        return data.epoch_batches(self.digits, self.args.batch_size, self.args.seed, epoch, start)

    def path(self, folder: str, name: str) -> Path:
        """The file of this run for `name`, such as reports/gan_training_log.csv."""
        return self.out_dir / folder / f"{self.title}_{name}"

    def _lr_schedule(self, optimizers: list[torch.optim.Optimizer]) -> Callback:
        args = self.args
        if args.lr_schedule == "plateau":
            return callbacks.ReduceLROnPlateau(optimizers, max(1, args.patience // 2))
        total = args.epochs * self.batches_per_epoch if args.lr_schedule == "cosine" else None
        return callbacks.ScheduledLR(optimizers, args.warmup_steps, total)

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
        reason = state.stop_reason or "all epochs completed"
        say(f"done after {state.epoch} epochs and {state.seconds / 60:.1f} minutes: {reason}")
        if state.best_epoch:
            ratio = state.log[state.best_epoch - 1]["fid_ratio"]
            floor = "" if math.isnan(ratio) else f", {ratio:.1f} times that of real digits"  # nan: the floor is not known
            protocol = f"{self.args.eval_samples} samples, mnist extractor, against the training set"
            say(f"best FID {state.best_fid:.3f} at epoch {state.best_epoch}{floor} ({protocol})")
        say("wrote", *(f"  {path}" for path in files if path.exists()))


def _out_dir(args: argparse.Namespace, prefix: str) -> Path:
    """`--out-dir`, or the folder of the last run to resume. Without either: this folder, and for trials one under runs/."""
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
