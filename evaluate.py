"""Score generators against the MNIST test set, beside the floor that real training digits reach at the same size."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from flags import ArgumentParser, add_sampling_flags, positive_int, sample_count, sampling_options, seed_number
from utils import ExpectedError, choose_device, keyed_generator, run_script, write_csv

MIN_SAMPLES = 200  # of ten digits, each of which needs more than the five neighbours of precision and recall
SHIPPED = ["checkpoints/best_GAN_G.pt", "checkpoints/best_CGAN_G.pt", "checkpoints/best_DIFF.pt"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--models", nargs="+", default=SHIPPED, help="generator checkpoints to score")
    flag("--n", type=sample_count, default=10_000, help="samples for each seed; also the size of the floor's subsets")
    flag("--seeds", type=positive_int, default=3, help="sampling seeds: figures are given as their mean and deviation")
    flag("--seed", type=seed_number, default=0, help="the first of the seeds")
    add_sampling_flags(parser)
    flag("--data-dir", default=None, help="where MNIST/raw lies or is downloaded to (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    flag("--out-dir", default=None, help="folder for metrics.csv and metrics_by_digit.csv (default: reports; runs/reports "
         "where another flag of the protocol differs from its default)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.n < MIN_SAMPLES:
        parser.error(f"--n {args.n} leaves too few samples of a digit; give at least {MIN_SAMPLES}")
    protocol = ("models", "n", "seeds", "seed", "sampler", "steps", "guidance")
    default = all(getattr(args, name) == parser.get_default(name) for name in protocol)
    args.out_dir = Path(args.out_dir or ("reports" if default else "runs/reports"))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    import data
    from checkpoint import load_generator
    from evaluation import FLOOR_SUBSETS, Extractor, TestSet, proportional_labels

    # Load: the checkpoints first, so that a bad one is refused before any work
    device = choose_device(args.device)
    generators = {path: load_generator(path, device) for path in args.models}
    options = {path: sampling_options(args, generators[path], path) for path in diffusion_models(args, generators)}
    data_dir = args.data_dir or data.default_data_dir()
    train = data.load_digits("mnist", "train", data_dir, device)
    test = data.load_digits("mnist", "test", data_dir, device)
    if args.n > len(test):
        raise ExpectedError(f"--n {args.n} is more than the {len(test)} test digits; the figures would lose their floor")
    reference = TestSet(test, train, Extractor(device))
    table = Table(args.n)

    # Real digits: the floor (random training digits, scored like samples), and what the test digits reach themselves
    scores = []
    for i in range(FLOOR_SUBSETS):
        subset = train.subset(args.n, "floor", i)
        scores.append(reference.score(subset.images, i, subset.labels, memorised=False))
    table.add("real training digits", scores)
    table.add("real test digits", [(reference.own_figures(), [])])

    # The models, with several seeds; where digits can be asked for, it is the test set's own labels
    for path, generator in generators.items():
        for name, by_digit in ways_to_sample(generator).items():
            scores = []
            for seed in range(args.seed, args.seed + args.seeds):
                labels = proportional_labels(test, args.n, seed) if by_digit else None
                rng = keyed_generator("cpu", seed, "evaluate")
                with count_evaluations(generator) as evaluated:
                    samples = generator.sample(args.n, labels, rng, **options.get(path, {}))
                figures, digits = reference.score(data.to_uint8(samples), seed, labels)
                scores.append(({"evaluations": sum(evaluated) / args.n, **figures}, digits))
            table.add(name, scores, path)

    table.write(args.out_dir)


def diffusion_models(args: argparse.Namespace, generators: dict) -> list[str]:
    """The paths of the models that have options of sampling.

    Raises:
        ExpectedError: there are none, and an option was typed.
    """
    found = [path for path, generator in generators.items() if generator.SAMPLE_OPTIONS]
    for path, generator in generators.items():
        if not found:
            sampling_options(args, generator, path)
    return found


def ways_to_sample(generator) -> dict[str, bool]:
    """The rows of a generator: name -> whether digits are asked for. A diffusion model has both, in one network."""
    name = generator.model_name
    if "guidance" in generator.SAMPLE_OPTIONS and generator.config.num_classes:
        return {name: False, f"{name}, by digit": True}
    return {name: generator.config.num_classes > 0}


@contextlib.contextmanager
def count_evaluations(generator) -> Iterator[list[int]]:
    """The sizes of the batches that go through the network meanwhile."""
    sizes: list[int] = []
    hook = generator.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    try:
        yield sizes
    finally:
        hook.remove()


class Table:
    """The rows of metrics.csv and metrics_by_digit.csv. The row that is added first is the floor of the later ratios."""

    def __init__(self, n: int):
        self.protocol = {"n": n, "extractor": "mnist", "reference": "mnist test"}
        self.rows: list[dict] = []
        self.digit_rows: list[dict] = []

    def add(self, model: str, scores: list[tuple[dict, list[dict]]], checkpoint: str = "") -> None:
        """Add and print a model, given what `TestSet.score` returned for each repetition."""
        figures, by_digit = zip(*scores)
        floor = self.rows[0] if self.rows else None
        head = {"model": model, **self.protocol, "repeats": len(scores)}
        self.rows.append({**head, **with_ratio(summarise(figures), floor), "checkpoint": checkpoint})
        show(self.rows[-1])
        digit_floors = self.digit_rows[:10]
        for digit, repeated in enumerate(zip(*by_digit)):
            floor = digit_floors[digit] if digit_floors else None
            self.digit_rows.append({**head, "digit": digit, **with_ratio(summarise(repeated), floor)})
        if by_digit[0]:
            show_digits(self.digit_rows[-10:])

    def write(self, folder: Path) -> None:
        write_csv(folder / "metrics.csv", self.rows)
        write_csv(folder / "metrics_by_digit.csv", self.digit_rows)
        print(f"\nwrote {folder}/metrics.csv and metrics_by_digit.csv")


def summarise(scores: list[dict[str, float]]) -> dict[str, float]:
    """Mean and standard deviation over repetitions: {name: mean, name_std: deviation}."""
    from metrics import estimate

    summary = {}
    for name in scores[0]:
        summary[name], summary[f"{name}_std"] = estimate([score[name] for score in scores])
    return summary


def with_ratio(summary: dict[str, float], floor: dict[str, float] | None) -> dict[str, float]:
    """The summary, after the ratio of its FID to the floor's, where both are known."""
    if floor is None or "fid" not in summary:
        return summary
    return {"fid_ratio": summary["fid"] / floor["fid"], "fid_ratio_std": summary["fid_std"] / floor["fid"], **summary}


def show(row: dict) -> None:
    """Print a row, a figure with its deviation to a line."""
    print(f"\n{row['model']}  (n = {row['n']}, {row['repeats']} repeats)")
    for name, value in row.items():
        if f"{name}_std" in row:
            deviation = f" +- {row[f'{name}_std']:.4f}" if row["repeats"] > 1 else ""
            print(f"  {name:26s} {value:9.4f}{deviation}")
    sys.stdout.flush()


def show_digits(rows: list[dict]) -> None:
    """Print the figures of each digit of a model, a digit to a line."""
    names = ("fid_ratio", "precision", "recall", "label_accuracy")
    for row in rows:
        figures = (f"{name} {row[name]:.3f}" for name in names if name in row)
        print(f"  digit {row['digit']}  ", "   ".join(figures), flush=True)


if __name__ == "__main__":
    run_script(main)
