"""Train the unconditional DCGAN; writes checkpoints/, reports/gan_training_log.csv and samples/gan_progress.gif."""

from __future__ import annotations

import argparse

from flags import ArgumentParser, add_gan_flags, add_training_flags, parse_training_args
from utils import run_script

REFERENCE = {"loss": "bce", "lr": 1e-4, "beta1": 0.5, "d_lr": None, "lr_schedule": "constant", "width": 64}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_training_flags(parser)
    add_gan_flags(parser)
    return parse_training_args(parser, argv, REFERENCE)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    from adversarial import train_gan

    train_gan(args, "dcgan", num_classes=0, prefix="GAN", title="gan")


if __name__ == "__main__":
    run_script(main)
