"""Train the diffusion model. Writes checkpoints/, reports/diffusion_training_log.csv and samples/diffusion_progress.gif."""

from __future__ import annotations

import argparse

from cli import (
    DIFFUSION_CPU,
    DIFFUSION_REFERENCE,
    ArgumentParser,
    add_diffusion_flags,
    add_training_flags,
    parse_training_args,
    run_script,
)
from diffusion.options import SamplingOptions


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_training_flags(parser)
    add_diffusion_flags(parser)
    args = parse_training_args(parser, argv, DIFFUSION_REFERENCE, DIFFUSION_CPU)
    if not args.resume:  # a resumed run has its own flags
        try:
            options = SamplingOptions(sampler=args.sampler, steps=args.steps, guidance=args.guidance, eta=args.eta)
            options.resolved(args.timesteps, num_classes=10, with_labels=True)
        except ValueError as error:
            parser.error(f"the samples cannot be drawn in this way: --{error}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    from recipes.ddpm import train_ddpm  # DiffusionStep.update there is the whole update

    train_ddpm(args)


if __name__ == "__main__":
    run_script(main)
