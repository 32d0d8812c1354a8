"""Train the diffusion model; writes checkpoints/, reports/diffusion_training_log.csv and samples/diffusion_progress.gif."""

from __future__ import annotations

import argparse

from flags import (
    DEFAULT_STEPS,
    DIFFUSION_REFERENCE,
    MAX_ETA,
    ArgumentParser,
    add_diffusion_flags,
    add_training_flags,
    parse_training_args,
)
from utils import run_script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_training_flags(parser)
    add_diffusion_flags(parser)
    args = parse_training_args(parser, argv, DIFFUSION_REFERENCE)
    if args.steps is None:
        args.steps = min(DEFAULT_STEPS, args.timesteps)
    if args.steps > args.timesteps and not args.resume:  # a resumed run has its own timesteps
        parser.error(f"--steps {args.steps} is more than the --timesteps {args.timesteps} that there are to visit")
    if args.eta is not None and args.eta > MAX_ETA[args.sampler] and not args.resume:
        parser.error(f"--eta {args.eta} is more than {args.sampler} can do; give at most {MAX_ETA[args.sampler]}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    from denoising import train_ddpm

    train_ddpm(args)


if __name__ == "__main__":
    run_script(main)
