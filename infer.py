"""Draw real digits, GAN digits and diffusion digits side by side into one picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from flags import ArgumentParser, add_sampling_flags, panel_count, sampling_options, seed_number
from utils import UsageError, choose_device, keyed_generator, run_script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--gan-model", default="checkpoints/best_GAN_G.pt", help="checkpoint of the GAN's generator")
    flag("--diff-model", default="checkpoints/best_DIFF.pt", help="checkpoint of the diffusion model")
    flag("--n", type=panel_count, default=64, help="digits in a panel")
    flag("--out", default="samples/infer_side_by_side.png", help="the picture to write")
    flag("--denoising-gif", default=None, help="also write a GIF of how the diffusion digits emerge from noise")
    add_sampling_flags(parser, guidance=False)
    flag("--seed", type=seed_number, default=0, help="seed of the noise and of the choice of real digits")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--dataset", choices=("auto", "mnist", "digits"), default="auto",
         help="the real digits; auto: MNIST where it lies in --data-dir, else scikit-learn's embedded digits; mnist: "
         "downloads it if it is missing")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    import plots
    from checkpoint import load_generator
    from data import to_uint8

    # Load
    device = choose_device(args.device)
    gan, diffusion = (load_generator(path, device) for path in (args.gan_model, args.diff_model))
    options = sampling_options(args, diffusion, args.diff_model)
    if args.denoising_gif and "watch" not in diffusion.SAMPLE_OPTIONS:
        raise UsageError(
            f"{args.diff_model} holds a {diffusion.model_name}, which does not denoise; leave --denoising-gif out"
        )

    # Real digits and samples, uint8 [n, 1, 28, 28] each
    title, real = real_digits(args)
    gan_samples = to_uint8(gan.sample(args.n, rng=noise_source(args)))
    denoising = None
    if args.denoising_gif:
        options["watch"] = denoising = Denoising(diffusion.config.timesteps)
    diffusion_samples = to_uint8(diffusion.sample(args.n, rng=noise_source(args), **options))

    # Draw
    panels = [(title, real), (describe(gan, args.gan_model), gan_samples),
              (describe(diffusion, args.diff_model), diffusion_samples)]  # fmt: skip
    plots.write_side_by_side(args.out, panels)
    print(f"wrote {args.out}")
    if denoising:
        denoising.write(args.denoising_gif, diffusion_samples)
        print(f"wrote {args.denoising_gif}")


def noise_source(args: argparse.Namespace):
    """The generator of a panel's noise."""
    return keyed_generator("cpu", args.seed, "infer")


def describe(generator, path: str) -> str:
    """The title of a generator's panel."""
    epoch = generator.meta.get("epoch")
    return f"{generator.model_name}: {Path(path).stem}, epoch {epoch if type(epoch) is int else '?'}"


class Denoising:
    """Remembers up to 30 evenly spaced stages of a sampling, as the `watch` of `sample`, and draws them."""

    STAGES = 30

    def __init__(self, timesteps: int):
        self.times_of_a_stage = timesteps / self.STAGES
        self.kept: dict[int, tuple] = {}  # stage -> its first level, and the chunks of noisy images there

    def __call__(self, x, level) -> None:
        from data import to_uint8

        first, chunks = self.kept.setdefault(int(level.time / self.times_of_a_stage), (level, []))
        if level == first:
            chunks.append(to_uint8(x))

    def write(self, path: str, digits) -> None:
        """Write the GIF of those stages and of the uint8 `digits` [n, 1, 28, 28] that they end in."""
        import torch

        import plots

        frames = [(f"t = {level.time}, noise {level.sigma:.2f}", torch.cat(chunks)) for level, chunks in self.kept.values()]
        frames.append(("digits", digits))
        pictures = [plots.captioned(plots.image_grid(images), caption) for caption, images in frames]
        plots.write_gif(path, torch.stack([torch.from_numpy(picture) for picture in pictures]), seconds=4.0)


def real_digits(args: argparse.Namespace):
    """Title and uint8 [n, 1, 28, 28] of random real digits from the test split, or what stands in for it offline."""
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
