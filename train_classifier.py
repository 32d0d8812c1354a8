"""Train the digit classifier behind the metrics and write classifier.pt beside its reference statistics.

The shipped checkpoints/classifier.pt is pinned: every published figure depends on it. A new one goes elsewhere by
default, and evaluation.py refuses it until its hash is entered there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import training
from utils import ExpectedError, autocast, choose_device, keyed_generator, provenance, resolve_precision, run_script

HELD_OUT = 5_000  # training digits that select the epoch; the test digits are only reported


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=training.HelpFormatter)
    flag = parser.add_argument
    flag("--epochs", type=training.positive_int, default=40, help="passes over the 55,000 training digits")
    flag("--batch-size", type=training.positive_int, default=128, help="images in a step")
    flag("--lr", type=training.positive_float, default=3e-3, help="peak learning rate of AdamW (one cycle)")
    flag("--width", type=training.positive_int, default=16, help="channels at 28x28")
    flag("--data-dir", default=None, help="where MNIST/raw lies or is downloaded to (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    flag("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU that has it, else fp32")
    flag("--seed", type=training.natural, default=0, help="seed of weights, order and augmentation")
    flag("--out-dir", default="runs/classifier", help="folder for classifier.pt and classifier_statistics.pt")
    flag("--dry-run", action=argparse.BooleanOptionalAction, default=False, help="one epoch on 1,280 digits")
    return parser.parse_args(argv)


def augment(images, rng):
    """Random rotation (12 degrees), shear, scale (12 %) and shift (2 pixels) of [B, 1, 28, 28] in [-1, 1]; no flips."""
    import torch
    from torch.nn import functional as F

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(len(images), generator=rng) * 2 - 1) * limit

    angle, shear, scale_x, scale_y = torch.deg2rad(uniform(12.0)), uniform(0.15), 1 + uniform(0.12), 1 + uniform(0.12)
    shift_x, shift_y = uniform(2 / 14), uniform(2 / 14)  # in units of half the image
    cos, sin = torch.cos(angle), torch.sin(angle)
    row_x = torch.stack([cos * scale_x, (cos * shear - sin) * scale_y, shift_x], dim=1)
    row_y = torch.stack([sin * scale_x, (sin * shear + cos) * scale_y, shift_y], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1).to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # grid_sample pads with 0: shift the background there


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    import torch
    from torch.nn import functional as F

    import data
    from callbacks import EMA
    from checkpoint import file_sha256, load_model, save_model
    from models import build

    # Data: 5,000 training digits are held out to select the epoch
    device = choose_device(args.device)
    precision = resolve_precision(args.precision, device)
    data_dir = args.data_dir or data.default_data_dir()
    digits = data.load_digits("mnist", "train", data_dir, device)
    order = torch.randperm(len(digits), generator=keyed_generator("cpu", "held out"))
    held_out, train = (data.Digits(digits.images[i], digits.labels[i], "mnist", "train") for i in (order[:HELD_OUT], order[HELD_OUT:]))
    if args.dry_run:
        args.epochs, train, held_out = 1, train.subset(1280, "dry run"), held_out.subset(500, "dry run")

    # Network, optimizer, average
    torch.manual_seed(args.seed)
    network = build("classifier", width=args.width).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.02, fused=True)
    steps = args.epochs * data.batches_per_epoch(train, args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.2)
    average = EMA(network, decay=0.999)
    state = training.TrainState()

    def train_step(images, labels):
        rng = keyed_generator("cpu", args.seed, "augment", state.step)
        images = augment(images, rng).contiguous(memory_format=torch.channels_last)
        torch.manual_seed(args.seed + state.step)  # dropout
        with autocast(device, precision):
            loss = F.cross_entropy(network(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return {"loss": loss.detach()}

    # Select on the held-out digits: fewest errors, then the lowest loss
    path = Path(args.out_dir) / "classifier.pt"

    class Selection(training.Callback):
        best = (HELD_OUT + 1, float("inf"))

        def after_epoch(self, state):
            errors, loss = errors_and_loss(average.model, held_out)
            print(f"epoch {state.epoch + 1}/{args.epochs}  loss {state.mean_losses()['loss']:.4f}  "
                  f"held-out errors {errors}/{len(held_out)}  loss {loss:.4f}  {time.time() - start:.0f} s", flush=True)  # fmt: skip
            if (errors, loss) < self.best:
                self.best = (errors, loss)
                meta = {"epoch": state.epoch + 1, "metrics": {"held_out_errors": errors, "held_out_loss": loss},
                        "flags": {k: v for k, v in vars(args).items() if k not in ("data_dir", "out_dir")},
                        "versions": provenance()}  # fmt: skip
                save_model(path, "classifier", average.model, meta)

    start = time.time()
    training.fit(
        train_step,
        lambda epoch, first: data.epoch_batches(train, args.batch_size, args.seed, epoch, first),
        args.epochs,
        [average, Selection()],
        state,
    )

    # Report
    test = data.load_digits("mnist", "test", data_dir, device)
    errors, loss = errors_and_loss(load_model(path, device), test)
    print(f"test accuracy {100 * (1 - errors / len(test)):.2f} %  (loss {loss:.4f})")
    print(f"wrote {path}  ({path.stat().st_size / 1e6:.2f} MB, SHA-256 {file_sha256(path)})")


def errors_and_loss(network, digits, chunk: int = 500):
    """Number of wrong answers and mean cross-entropy of `network` on `digits`."""
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
