"""Train the unconditional DCGAN. Writes checkpoints/, reports/gan_training_log.csv and samples/gan_progress.gif."""

from __future__ import annotations

import argparse

from cli import GAN_CPU, GAN_REFERENCE, ArgumentParser, add_gan_flags, add_training_flags, parse_training_args, run_script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_training_flags(parser)
    add_gan_flags(parser)
    return parse_training_args(parser, argv, GAN_REFERENCE, GAN_CPU)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    from recipes.gan import train_gan  # GANStep.update there is the whole update

    train_gan(args, "dcgan", num_classes=0, prefix="GAN", title="gan")


if __name__ == "__main__":
    run_script(main)
