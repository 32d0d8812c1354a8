"""Draw real digits beside generated ones into one picture."""

from __future__ import annotations

import argparse

from flags import ArgumentParser, panel_count, seed_number
from utils import choose_device, keyed_generator, run_script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--gan-model", default="checkpoints/best_GAN_G.pt", help="checkpoint of the GAN's generator")
    flag("--n", type=panel_count, default=64, help="digits in a panel")
    flag("--out", default="samples/infer_side_by_side.png", help="the picture to write")
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
    generator = load_generator(args.gan_model, device)

    # Real digits and samples, uint8 [n, 1, 28, 28] each
    title, real = real_digits(args)
    samples = to_uint8(generator.sample(args.n, rng=keyed_generator("cpu", args.seed, "infer")))

    # Draw
    panels = {title: real, f"{generator.model_name} (epoch {generator.meta.get('epoch', '?')})": samples}
    plots.write_side_by_side(args.out, panels)
    print(f"wrote {args.out}")


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
