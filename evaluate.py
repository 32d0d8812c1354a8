"""Score generators against the MNIST test set, beside the floor that real training digits reach at the same size."""

from __future__ import annotations

import argparse
import sys

from flags import ArgumentParser, positive_int, sample_count, seed_number
from utils import ExpectedError, choose_device, keyed_generator, run_script, write_csv


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--models", nargs="+", default=["checkpoints/best_GAN_G.pt"], help="generator checkpoints to score")
    flag("--n", type=sample_count, default=10_000, help="samples for each seed; also the size of the floor's subsets")
    flag("--seeds", type=positive_int, default=3, help="sampling seeds: figures are given as their mean and deviation")
    flag("--seed", type=seed_number, default=0, help="the first of the seeds")
    flag("--data-dir", default=None, help="where MNIST/raw lies or is downloaded to (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    flag("--out", default=None, help="the table to write (default: reports/metrics.csv; runs/metrics.csv where "
         "another flag of the protocol differs from its default)")  # fmt: skip
    args = parser.parse_args(argv)
    protocol = ("models", "n", "seeds", "seed")
    default = all(getattr(args, name) == parser.get_default(name) for name in protocol)
    args.out = args.out or ("reports/metrics.csv" if default else "runs/metrics.csv")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    import data
    import metrics
    from checkpoint import load_generator
    from evaluation import FLOOR_SUBSETS, Extractor, TestSet

    # Load: the checkpoints first, so that a bad one is refused before any work
    device = choose_device(args.device)
    generators = {path: load_generator(path, device) for path in args.models}
    data_dir = args.data_dir or data.default_data_dir()
    train = data.load_digits("mnist", "train", data_dir, device)
    test = data.load_digits("mnist", "test", data_dir, device)
    if args.n > len(test):
        raise ExpectedError(f"--n {args.n} is more than the {len(test)} test digits; the figures would lose their floor")
    reference = TestSet(test, train, Extractor(device))

    # The floor: random training digits, scored like samples
    rows = []
    subsets = [train.subset(args.n, "floor", i).images for i in range(FLOOR_SUBSETS)]
    floor = summarise([reference.score(images, i, memorised=False) for i, images in enumerate(subsets)])
    protocol = {"n": args.n, "extractor": "mnist", "reference": "mnist test"}
    rows.append({"model": "real training digits", **protocol, "repeats": FLOOR_SUBSETS, **floor})
    show(rows[-1])

    # The models, with several seeds
    for path, generator in generators.items():
        scores = []
        for seed in range(args.seed, args.seed + args.seeds):
            samples = generator.sample(args.n, rng=keyed_generator("cpu", seed, "evaluate"))
            scores.append(reference.score(data.to_uint8(samples), seed))
        summary = summarise(scores)
        ratio = metrics.Estimate(summary["fid"] / floor["fid"], summary["fid_std"] / floor["fid"])
        row = {"model": generator.model_name, **protocol, "repeats": args.seeds, "fid_ratio": ratio.mean}
        rows.append({**row, "fid_ratio_std": ratio.std, **summary, "checkpoint": path})
        show(rows[-1])

    write_csv(args.out, rows)
    print(f"wrote {args.out} (mnist extractor, {args.n} samples, against the {len(test)} test digits)")


def summarise(scores: list[dict[str, float]]) -> dict[str, float]:
    """Mean and standard deviation over repetitions: {name: mean, name_std: deviation}."""
    from metrics import estimate

    summary = {}
    for name in scores[0]:
        summary[name], summary[f"{name}_std"] = estimate([score[name] for score in scores])
    return summary


def show(row: dict) -> None:
    """Print a row, a figure with its deviation to a line."""
    print(f"\n{row['model']}  (n = {row['n']}, {row['repeats']} repeats)")
    for name, value in row.items():
        if f"{name}_std" in row:
            print(f"  {name:26s} {value:9.4f} +- {row[f'{name}_std']:.4f}")
    sys.stdout.flush()


if __name__ == "__main__":
    run_script(main)
