"""Train the conditional DCGAN. Writes checkpoints/, reports/cgan_training_log.csv and samples/cgan_progress.gif."""

from __future__ import annotations

import argparse

from cli import CGAN_REFERENCE, GAN_CPU, ArgumentParser, add_gan_flags, add_training_flags, parse_training_args, run_script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_training_flags(parser)
    add_gan_flags(parser)
    return parse_training_args(parser, argv, CGAN_REFERENCE, GAN_CPU)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    from data import NUM_CLASSES
    from recipes.gan import train_gan  # GANStep.update there is the whole update

    train_gan(args, "cdcgan", num_classes=NUM_CLASSES, prefix="CGAN", title="cgan")


if __name__ == "__main__":
    run_script(main)
