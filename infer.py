"""Draw real digits, GAN digits and diffusion digits side by side into one picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import (
    DATA_DIR_HELP,
    DEVICE_HELP,
    SEED,
    ArgumentParser,
    add_sampling_flags,
    expanded_path,
    integer,
    run_script,
    sampling_options,
)
from files import PICTURES, UsageError, check_outputs, find_default
from utils import choose_device, sampling_rng

if TYPE_CHECKING:
    from torch import Tensor


GAN_MODEL, DIFF_MODEL = "checkpoints/best_GAN_G.pt", "checkpoints/best_DIFF.pt"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--gan-model", type=expanded_path, default=None, help=f"checkpoint of the GAN's generator (default: {GAN_MODEL})")
    flag("--diff-model", type=expanded_path, default=None, help=f"checkpoint of the diffusion model (default: {DIFF_MODEL})")
    flag("--n", type=integer(1, 1024), default=64, help="digits in a panel")
    flag(
        "--out",
        type=expanded_path,
        default="samples/infer_side_by_side.png",
        help="the picture to write: .png, .jpg or .pdf",
    )
    flag(
        "--denoising-gif",
        type=expanded_path,
        default=None,
        help="also write a GIF of the diffusion samples, from noise to digits",
    )
    add_sampling_flags(parser, guidance=False)
    flag("--seed", type=SEED, default=0, help="seed of the noise and of the choice of real digits")
    flag("--device", default="auto", help=DEVICE_HELP)
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    flag(
        "--dataset",
        choices=("auto", "mnist", "digits"),
        default="auto",
        help="the real digits; auto: MNIST if it is in --data-dir, else scikit-learn's embedded digits; mnist: download it "
        "if it is missing",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    from checkpoint import load_generator
    from data import to_uint8
    from figures.images import write_side_by_side

    # Load
    device = choose_device(args.device)
    args.gan_model = args.gan_model or find_default(GAN_MODEL)
    args.diff_model = args.diff_model or find_default(DIFF_MODEL)
    gan, diffusion = (load_generator(path, device) for path in (args.gan_model, args.diff_model))
    options = sampling_options(args, diffusion, args.diff_model)
    if args.denoising_gif and "watch" not in diffusion.SAMPLE_OPTIONS:
        raise UsageError(
            f"{args.diff_model} holds a {diffusion.model_name}, which does not denoise; leave --denoising-gif out"
        )

    check_outputs(("--out", args.out, PICTURES), ("--denoising-gif", args.denoising_gif, (".gif",)))

    # Real digits and samples, uint8 [n, 1, 28, 28] each
    title, real = real_digits(args)
    gan_samples = to_uint8(gan.sample(args.n, rng=sampling_rng(args.seed)))
    denoising = None
    if args.denoising_gif:
        options["watch"] = denoising = Denoising(diffusion.config.timesteps)
    diffusion_samples = to_uint8(diffusion.sample(args.n, rng=sampling_rng(args.seed), **options))

    # Draw
    panels = [
        (title, real),
        (describe(gan, args.gan_model), gan_samples),
        (describe(diffusion, args.diff_model), diffusion_samples),
    ]
    write_side_by_side(args.out, panels)
    print(f"wrote {args.out}")
    if denoising:
        denoising.write(args.denoising_gif, diffusion_samples)
        print(f"wrote {args.denoising_gif}")


def describe(generator: Any, file: str) -> str:
    """The title of a generator's panel."""
    epoch = generator.meta.get("epoch")
    return f"{generator.model_name}: {Path(file).stem}, epoch {epoch if type(epoch) is int else '?'}"


class Denoising:
    """Keeps up to 30 evenly spaced stages of a sampling, as the `watch` of `sample`, and draws them."""

    STAGES = 30

    def __init__(self, timesteps: int):
        self.times_of_a_stage = timesteps / self.STAGES
        self.kept: dict[int, tuple[Any, list[Tensor]]] = {}  # stage -> its first level, and the noisy images there

    def __call__(self, x: Tensor, level: Any) -> None:
        from data import to_uint8

        first, chunks = self.kept.setdefault(int(level.time / self.times_of_a_stage), (level, []))
        if level == first:
            chunks.append(to_uint8(x))

    def write(self, file: str, digits: Tensor) -> None:
        """Write the GIF of those stages and of the final `digits`, uint8 [n, 1, 28, 28]."""
        import torch

        from figures.images import captioned, image_grid, write_gif

        frames = [(f"t = {level.time}, noise {level.sigma:.2f}", torch.cat(chunks)) for level, chunks in self.kept.values()]
        frames.append(("digits", digits))
        pictures = [captioned(image_grid(images), caption) for caption, images in frames]
        write_gif(file, torch.stack([torch.from_numpy(picture) for picture in pictures]), seconds=4.0)


def real_digits(args: argparse.Namespace) -> tuple[str, Tensor]:
    """Title and images, uint8 [n, 1, 28, 28], of random real digits from a test split."""
    import data

    data_dir = args.data_dir or data.default_data_dir()
    name = args.dataset
    if name == "auto":
        name = "mnist" if data.has_mnist(data_dir) else "digits"
        if name == "digits":
            print(f"MNIST is not in {data_dir}: the real digits shown are scikit-learn's (--dataset mnist downloads MNIST)")
    digits = data.load_digits(name, "test", data_dir)
    count = min(args.n, len(digits))
    if count < args.n:
        print(f"there are only {count} of these real digits: all are shown")
    title = "real digits (MNIST test set)" if name == "mnist" else "real digits (scikit-learn, 8x8 enlarged)"
    return title, digits.subset(count, "infer", args.seed).images


if __name__ == "__main__":
    run_script(main)
