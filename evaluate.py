"""Score generators against the MNIST test set, beside the floor that real training digits reach at the same size.

The same command after an interruption goes on with the scores that it had.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from flags import ArgumentParser, add_sampling_flags, sample_count, sampling_options, seed_count, seed_number
from utils import (
    ExpectedError,
    check_writable,
    choose_device,
    is_first,
    keyed_generator,
    provenance,
    run_script,
    write_csv,
    write_json,
)

MIN_SAMPLES = 200  # of ten digits, each of which needs more than the five neighbours of precision and recall
SHIPPED = ["checkpoints/best_GAN_G.pt", "checkpoints/best_CGAN_G.pt", "checkpoints/best_DIFF.pt"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--models", nargs="+", default=SHIPPED, help="generator checkpoints to score")
    flag("--n", type=sample_count, default=10_000, help="samples for each seed; also the size of the floor's subsets; above "
         "10000 the reference is the training set, and there is no floor")  # fmt: skip
    flag("--seeds", type=seed_count, default=3, help="sampling seeds: figures are given as their mean and deviation")
    flag("--seed", type=seed_number, default=0, help="the first of the seeds")
    flag("--extractor", choices=("mnist", "inception"), default="mnist",
         help="mnist: the digit classifier that is shipped; inception: the network of published FIDs")  # fmt: skip
    flag("--inception-weights", type=Path, default=None,
         help="file of its weights (default: the canonical ones, 91 MB, downloaded once)")  # fmt: skip
    add_sampling_flags(parser)
    flag("--data-dir", default=None, help="where MNIST/raw lies or is downloaded to (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    flag("--out-dir", default=None, help="folder for metrics.csv, metrics_by_digit.csv and metrics.json (default: reports; "
         "runs/reports where another flag of the protocol differs from its default)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.n < MIN_SAMPLES:
        parser.error(f"--n {args.n} leaves too few samples of a digit; give at least {MIN_SAMPLES}")
    if args.inception_weights and args.extractor != "inception":
        parser.error("--inception-weights needs --extractor inception")
    protocol = ("models", "n", "seeds", "seed", "extractor", "sampler", "steps", "eta", "precision", "guidance")
    default = all(getattr(args, name) == parser.get_default(name) for name in protocol)
    args.out_dir = Path(args.out_dir or ("reports" if default else "runs/reports"))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    import data
    import distributed
    from checkpoint import load_generator
    from evaluation import RealDigits, proportional_labels

    # Load: the checkpoints first, so that a bad one is refused before any work
    device = choose_device(args.device)
    distributed.join(device)
    generators = {path: load_generator(path, device) for path in args.models}
    check_writable(args.out_dir)
    jobs = plan(args, generators)
    extractor = load_extractor(args, device)
    data_dir = args.data_dir or data.default_data_dir()
    with distributed.first_before_others():
        train, test = (data.load_digits("mnist", split, data_dir, device) for split in ("train", "test"))
    target = train if args.n > len(test) else test
    origin = {"versions": provenance(), "extractor_sha256": extractor.sha256}
    devices = device.type if distributed.count() == 1 else f"{distributed.count()} x {device.type}"
    kept = KeptScores(args.out_dir / "scores.unfinished.pt", {**origin, "n": args.n, "device": devices})
    seeds = range(args.seed, args.seed + args.seeds)
    missing = [job for job in jobs for seed in seeds if kept.key(job, seed) not in kept.scores]
    evaluations = args.n * sum(job.evaluations for job in missing)
    print(f"to do: {evaluations:,} network evaluations in {len(missing)} samplings, each of them scored"
          + (f"; {len(kept.scores)} are kept from an interrupted run" if kept.scores else ""))  # fmt: skip

    # Real digits: the marks of the others
    reference = RealDigits(target, test, train, extractor)
    table = Table(args, "mnist test" if target is test else "mnist train", devices)
    score_real_digits(args, reference, table, train, target)

    # The models, with several seeds; where digits can be asked for, it is the reference's own labels
    with tqdm(total=evaluations, unit="eval", unit_scale=True, disable=None if is_first() else True) as bar:
        for job in jobs:
            for seed in seeds:
                if kept.key(job, seed) in kept.scores:
                    continue
                labels = proportional_labels(target, args.n, seed) if job.by_digit else None
                samples, cost = draw(job, args.n, labels, keyed_generator("cpu", seed, "evaluate"), bar)
                figures, digits = reference.score(data.to_uint8(samples), seed, labels)
                kept.add(job, seed, (cost | figures, digits))
            bar.clear()
            table.add(job.name, [kept.scores[kept.key(job, seed)] for seed in seeds], job.description)

    command = shlex.join(["python", Path(__file__).name, *(argv or sys.argv[1:])])
    if is_first():
        table.write(args.out_dir, {"command": command, **origin})
        kept.path.unlink(missing_ok=True)
    distributed.leave()


def load_extractor(args: argparse.Namespace, device):
    """What turns images into the features that are compared."""
    if args.extractor == "inception":
        from inception import InceptionExtractor

        return InceptionExtractor(device, args.inception_weights)
    from evaluation import Extractor

    return Extractor(device)


def score_real_digits(args: argparse.Namespace, reference, table: Table, train, target) -> None:
    """The floor (random training digits, scored like samples), and what the reference digits reach by themselves.

    Against the training set there is no floor: its digits would be compared with themselves.
    """
    from evaluation import FLOOR_SUBSETS

    if target is not train:
        subsets = [train.subset(args.n, "floor", i) for i in range(FLOOR_SUBSETS)]
        scores = [reference.score(part.images, i, part.labels, memorised=False) for i, part in enumerate(subsets)]
        table.add("real training digits", scores, is_floor=True)
    table.add("real training digits" if target is train else "real test digits", [(reference.own_figures(), [])])


class Job(NamedTuple):
    """A row to score: a generator, asked for digits or not, with its options of sampling."""

    name: str
    path: str
    sha256: str
    generator: Any
    by_digit: bool
    options: dict[str, Any]

    @property
    def sampling(self) -> dict[str, Any]:
        """The options in full, as far as they matter here; `precision`, which is also a metric, as `dtype`."""
        if not self.generator.SAMPLE_OPTIONS:
            return {"dtype": "fp32"}
        options = self.generator.sample_options(**self.options, asked=self.by_digit)
        if not self.by_digit:
            options.pop("guidance", None)
        return {"dtype": options.pop("precision", "fp32"), **options}

    @property
    def description(self) -> dict[str, Any]:
        """What stands beside the figures: the options of sampling, the network's size, its file and the file's hash."""
        parameters = sum(parameter.numel() for parameter in self.generator.parameters())
        return {**self.sampling, "parameters": parameters, "checkpoint": self.path, "sha256": self.sha256}

    @property
    def evaluations(self) -> int:
        """Network evaluations per image."""
        options = {name: value for name, value in self.sampling.items() if name != "dtype"}
        return self.generator.evaluations(**options) if options else 1


def plan(args: argparse.Namespace, generators: dict[str, Any]) -> list[Job]:
    """What to score: a diffusion model in both ways, drawing any digit and drawing those that are asked for.

    Raises:
        ExpectedError: a model of other classes than digits.
        UsageError: an option of sampling that it (or every model) refuses.
    """
    from checkpoint import file_sha256

    jobs = []
    refusing = not any(generator.SAMPLE_OPTIONS for generator in generators.values())
    for path, generator in generators.items():
        name, classes = generator.model_name, generator.config.num_classes
        if classes not in (0, 10):
            raise ExpectedError(f"{path} has {classes} classes, and the test set 10; leave it out")
        options = sampling_options(args, generator, path) if generator.SAMPLE_OPTIONS or refusing else {}
        sha256 = file_sha256(path)
        if generator.SAMPLE_OPTIONS and classes:
            jobs.append(Job(name, path, sha256, generator, False, options))
            name += ", by digit"
        jobs.append(Job(name, path, sha256, generator, classes > 0, options))
    return sorted(jobs, key=lambda job: job.by_digit)


class KeptScores:
    """What `RealDigits.score` gave for each sampling, kept in a file until the tables are written.

    `context` is what the figures depend on beside the sampling itself; the scores of another one are dropped, and those of
    code with changes that no commit names.
    """

    def __init__(self, path: Path, context: dict):
        from checkpoint import read_tensors

        self.path, self.context = path, context
        self.scores: dict[str, tuple[dict, list[dict]]] = {}
        try:
            content = read_tensors(path) if path.exists() else {}
            if content.get("context") == context and not context["versions"]["git"].endswith("-dirty"):
                self.scores = {key: self._checked(score) for key, score in content["scores"].items()}
        except (ExpectedError, TypeError, ValueError, KeyError, AttributeError, RuntimeError):
            self.scores = {}  # damaged: what was in it is measured again

    @staticmethod
    def _checked(score: tuple[dict, list[dict]]) -> tuple[dict, list[dict]]:
        """The score, if it is made of figures; else `ValueError`."""
        figures, digits = score
        if not all(type(value) is float for part in (figures, *digits) for value in part.values()) or "fid" not in figures:
            raise ValueError("a score is not made of figures")
        return score

    @staticmethod
    def key(job: Job, seed: int) -> str:
        return f"{job.sha256} {'by digit' if job.by_digit else 'any'} {job.sampling} seed {seed}"

    def add(self, job: Job, seed: int, score: tuple[dict, list[dict]]) -> None:
        from checkpoint import write_tensors

        self.scores[self.key(job, seed)] = score
        if is_first():
            write_tensors(self.path, {"context": self.context, "scores": self.scores})


def draw(job: Job, n: int, labels, rng, bar: tqdm):
    """Samples [n, 1, 28, 28] and what they cost: network evaluations per image, which move the bar, and images/s."""
    import distributed

    sizes: list[int] = []
    start = time.perf_counter()

    def count(module, inputs, output) -> None:
        sizes.append(len(output))
        bar.update(len(output) * distributed.count())

    hook = job.generator.register_forward_hook(count)
    try:
        samples = distributed.sample(job.generator, n, labels, rng, **job.options).cpu()  # waits for the device
    finally:
        hook.remove()
    seconds = time.perf_counter() - start
    return samples, {"evaluations": distributed.total(sum(sizes)) / n, "images_per_second": n / seconds}


class Table:
    """The rows of metrics.csv and metrics_by_digit.csv. The row that is added as the floor is that of the later ratios."""

    def __init__(self, args: argparse.Namespace, reference: str, device: str):
        self.protocol = {"n": args.n, "extractor": args.extractor, "reference": reference, "first_seed": args.seed,
                         "device": device}  # fmt: skip
        self.rows: list[dict] = []
        self.digit_rows: list[dict] = []
        self.floor: dict | None = None
        self.digit_floors: list[dict | None] = [None] * 10

    def add(
        self, model: str, scores: list[tuple[dict, list[dict]]], description: dict | None = None, is_floor: bool = False
    ) -> None:
        """Add and print a model, given what `RealDigits.score` returned for each repetition."""
        figures, by_digit = zip(*scores)
        head = {"model": model, **self.protocol, "repeats": len(scores)}
        row = {**head, **with_ratio(summarise(figures), self.floor), **(description or {})}
        digit_rows = [
            {**head, "digit": digit, **with_ratio(summarise(repeated), self.digit_floors[digit])}
            for digit, repeated in enumerate(zip(*by_digit))
        ]
        if is_floor:
            self.floor, self.digit_floors = row, digit_rows
        self.rows.append(row)
        self.digit_rows += digit_rows
        show(row)
        show_digits(digit_rows)

    def write(self, folder: Path, origin: dict) -> None:
        """Write the tables; metrics.json holds both of them, and where they come from."""
        write_csv(folder / "metrics.csv", self.rows)
        write_csv(folder / "metrics_by_digit.csv", self.digit_rows)
        write_json(folder / "metrics.json", {**origin, "rows": self.rows, "rows_by_digit": self.digit_rows})
        print(f"\nwrote {folder}/metrics.csv, metrics_by_digit.csv and metrics.json")


def summarise(scores: list[dict[str, float]]) -> dict[str, float]:
    """Mean and standard deviation over repetitions: {name: mean, name_std: deviation}."""
    from metrics import estimate

    summary = {}
    for name in scores[0]:
        summary[name], summary[f"{name}_std"] = estimate([score[name] for score in scores])
    return summary


def with_ratio(summary: dict[str, float], floor: dict[str, float] | None) -> dict[str, float]:
    """The summary, after the ratio of its FID to the floor's, where both are known."""
    if floor is None or "fid" not in floor or "fid" not in summary:
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
