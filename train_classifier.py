"""Train the digit classifier behind the metrics. Writes classifier.pt and the reference statistics measured with it.

The shipped checkpoints/classifier.pt is pinned, because every published figure depends on it. A new classifier is written
elsewhere by default. scoring/extractor.py accepts it only after its hash is entered there.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import DATA_DIR_HELP, DEVICE_HELP, LEARNING_RATE, OUT_DIR, SEED, ArgumentParser, expanded_path, integer, run_script
from files import UsageError, check_writable
from utils import autocast, choose_device, keyed_generator, provenance, resolve_precision, scoring_device

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor, nn

    from data import Digits
    from loop import Callback, TrainState

HELD_OUT = 5_000  # training digits that select the epoch; the test digits are only reported
DRY_RUN_DIGITS = 1_280


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--epochs", type=integer(1, 10**6), default=40, help="passes over the 55,000 training digits")
    flag("--batch-size", type=integer(1), default=128, help="images in a step")
    flag("--lr", type=LEARNING_RATE, default=3e-3, help="peak learning rate of AdamW (one cycle)")
    flag("--width", type=integer(1), default=16, help="channels at 28x28")
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    flag("--device", default="auto", help=DEVICE_HELP)
    flag("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU that has it, else fp32")
    flag("--seed", type=SEED, default=0, help="seed of weights, order and augmentation")
    flag(
        *OUT_DIR,
        type=expanded_path,
        default=None,
        help="folder for classifier.pt and classifier_statistics.pt (default: runs/classifier; runs/dry-run with --dry-run)",
    )
    flag("--statistics-only", action=switch, default=False, help="only measure the classifier in --out-dir again")
    flag("--dry-run", action=switch, default=False, help=f"one epoch on {DRY_RUN_DIGITS} digits")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    import data
    from scoring.extractor import Extractor
    from scoring.metrics import inception_score
    from scoring.reference import STATISTICS_NAME, write_statistics

    device = choose_device(args.device)
    data_dir = args.data_dir or data.default_data_dir()
    file = Path(args.out_dir or ("runs/dry-run" if args.dry_run else "runs/classifier")) / "classifier.pt"
    check_writable(file.parent)
    if not args.statistics_only:
        train_classifier(args, device, data_dir, file)

    extractor = Extractor(scoring_device(device), file, sha256="")
    test = data.load_digits("mnist", "test", data_dir, extractor.device)
    errors, loss = errors_and_loss(extractor.network, test)
    score = inception_score(extractor(test.images)[1], keyed_generator("cpu", args.seed, "splits"))
    accuracy = 100 * (1 - errors / len(test))
    print(f"test accuracy {accuracy:.2f} %, cross-entropy {loss:.4f}, inception score {score.mean:.3f} +- {score.std:.3f}")
    print(f"{file} ({file.stat().st_size / 1e6:.2f} MB)\n  SHA-256 {extractor.sha256}")
    write_statistics(extractor, data_dir, file.with_name(STATISTICS_NAME))
    print(f"wrote {file.with_name(STATISTICS_NAME)}")


def train_classifier(args: argparse.Namespace, device: torch.device, data_dir: str, file: Path) -> None:
    """Train, and write the averaged weights of the epoch with the fewest errors on the held-out digits to `file`."""
    import torch
    from torch.nn import functional as F

    import data
    from callbacks import EMA
    from engine.guard import Guard, average_over_processes, gradient_norm
    from loop import TrainState, fit
    from models import build

    # Data. The held-out part is the same for every seed.
    digits = data.load_digits("mnist", "train", data_dir, device)
    order = torch.randperm(len(digits), generator=keyed_generator("cpu", "held out"))
    held_out, train = digits.select(order[:HELD_OUT]), digits.select(order[HELD_OUT:])
    if args.dry_run:
        args.epochs, train = 1, train.subset(DRY_RUN_DIGITS, "dry run")

    # Network, optimizer, average
    precision = resolve_precision(args.precision, device)
    torch.manual_seed(args.seed)
    try:
        network = build("classifier", width=args.width).to(device, memory_format=torch.channels_last)
    except ValueError as error:
        raise UsageError(f"{error}; choose another --width") from error
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.02, fused=True)
    steps = max(10, args.epochs * data.batches_per_epoch(train, args.batch_size))  # OneCycleLR divides by fewer
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.2)
    average = EMA(network, decay=0.999)
    state = TrainState()
    guard = Guard(network)

    def train_step(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        rng = keyed_generator("cpu", args.seed, "augment", state.step)
        images = augment(images, rng).contiguous(memory_format=torch.channels_last)
        torch.manual_seed(args.seed + state.step)  # of the dropout
        guard.keep()
        with autocast(device, precision):
            loss = F.cross_entropy(network(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        loss = average_over_processes(loss, optimizer)
        loss = guard.step(loss, gradient_norm(optimizer), optimizer)
        guard.restore()
        schedule.step()
        return {"loss": loss}

    def batches(epoch: int, start: int) -> Iterable[tuple[Tensor, Tensor]]:
        return data.epoch_batches(train, args.batch_size, args.seed, epoch, start)

    recorded = {name: value for name, value in vars(args).items() if name not in ("data_dir", "out_dir")}
    selection = best_epoch_writer(average.model, held_out, file, {"flags": recorded, "versions": provenance()})
    fit(train_step, batches, args.epochs, [average, selection], state)


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Random rotation (12 degrees), shear, scale (12 %) and shift (2 pixels) of [B, 1, 28, 28] in [-1, 1]; no flips."""
    import torch
    from torch.nn import functional as F

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=rng) * 2 - 1) * limit

    angle, shear, scale_x, scale_y = torch.deg2rad(uniform(12.0)), uniform(0.15), 1 + uniform(0.12), 1 + uniform(0.12)
    shift_x, shift_y = uniform(2 / 14), uniform(2 / 14)  # in units of half the image
    cos, sin = torch.cos(angle), torch.sin(angle)
    row_x = torch.stack([cos * scale_x, (cos * shear - sin) * scale_y, shift_x], dim=1)
    row_y = torch.stack([sin * scale_x, (sin * shear + cos) * scale_y, shift_y], dim=1)
    affine = torch.stack([row_x, row_y], dim=1).to(images.device)  # [B, 2, 3]
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # padded with 0, which is the background of images + 1


def best_epoch_writer(network: nn.Module, held_out: Digits, file: Path, meta: dict[str, Any]) -> Callback:
    """A callback that writes `network` after each best epoch: fewest errors on the held-out digits, then lowest loss."""
    from checkpoint import keep_previous, save_model
    from loop import Callback

    class BestEpochWriter(Callback):
        best = (len(held_out) + 1, float("inf"))
        start = time.perf_counter()

        def on_start(self, state: TrainState) -> None:
            keep_previous(file)

        def after_epoch(self, state: TrainState) -> None:
            errors, loss = errors_and_loss(network, held_out)
            wrong = f"held-out errors {errors}/{len(held_out)}  held-out loss {loss:.4f}"
            seconds = time.perf_counter() - self.start
            print(f"epoch {state.epoch + 1}  loss {state.row['loss']:.4f}  {wrong}  {seconds:.0f} s", file=sys.stderr)
            if (errors, loss) < self.best:
                self.best = (errors, loss)
                figures = {"held_out_errors": errors, "held_out_loss": loss}
                save_model(file, "classifier", network, {"epoch": state.epoch + 1, "metrics": figures, **meta})

    return BestEpochWriter()


def errors_and_loss(network: nn.Module, digits: Digits, chunk: int = 250) -> tuple[int, float]:
    """Number of wrong predictions, and mean cross-entropy, of `network` on `digits`."""
    import torch
    from torch.nn import functional as F

    from data import to_model_range

    errors, loss = 0, 0.0
    with torch.no_grad():
        for images, labels in zip(digits.images.split(chunk), digits.labels.split(chunk)):
            logits = network(to_model_range(images).contiguous(memory_format=torch.channels_last))
            errors += int((logits.argmax(1) != labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return errors, loss / len(digits)


if __name__ == "__main__":
    run_script(main)
