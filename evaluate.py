"""Score generators against the MNIST test set, beside the floor that real training digits reach at the same size."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import (
    DATA_DIR_HELP,
    DEVICE_HELP,
    OUT_DIR,
    SEED,
    ArgumentParser,
    add_sampling_flags,
    expanded_path,
    integer,
    run_script,
    sampling_options,
)
from files import check_outputs, find_default, is_first

if TYPE_CHECKING:
    import torch

    from data import Digits
    from scoring.scorer import FullScorer
    from scoring.table import Table

MIN_SAMPLES = 200  # of ten digits, each of which needs more than the five neighbours of precision and recall
TABLES = ("metrics.csv", "metrics_by_digit.csv", "metrics.json")
SHIPPED = ["checkpoints/best_GAN_G.pt", "checkpoints/best_CGAN_G.pt", "checkpoints/best_DIFF.pt"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag(
        "--models",
        nargs="+",
        type=expanded_path,
        default=None,
        help="generator checkpoints to score (default: the shipped ones)",
    )
    flag(
        "--n",
        type=integer(10, 10**6),
        default=10_000,
        help="samples for each seed, and size of the floor's subsets; above 10000 the reference is the training set, and "
        "there is no floor",
    )
    flag("--seeds", type=integer(1, 1000), default=3, help="sampling seeds: figures are given as their mean and deviation")
    flag("--seed", type=SEED, default=0, help="the first of the seeds")
    flag(
        "--extractor",
        choices=("mnist", "inception"),
        default="mnist",
        help="mnist: the shipped digit classifier; inception: the network of published FIDs",
    )
    flag(
        "--inception-weights",
        type=expanded_path,
        default=None,
        help="file of its weights (default: the canonical ones, 91 MB, downloaded once)",
    )
    add_sampling_flags(parser)
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    flag("--device", default="auto", help=DEVICE_HELP)
    flag(
        *OUT_DIR,
        type=expanded_path,
        default=None,
        help="folder for metrics.csv, metrics_by_digit.csv and metrics.json (default: reports; runs/reports if another "
        "flag of the protocol differs from its default)",
    )
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

    import torch
    from tqdm import tqdm

    import data
    from checkpoint import load_generator
    from engine import distributed
    from scoring.scorer import FullScorer, proportional_labels
    from scoring.table import Scores, Table, plan
    from scoring.two_sample import NEEDED
    from utils import choose_device, provenance, resolve_precision, sampling_rng, scoring_device

    # Load the checkpoints first, so that a bad one is refused before any work
    device = choose_device(args.device)
    resolve_precision(args.precision or "fp32", device)  # refuses what the device cannot do
    distributed.join(device)
    models = args.models or [find_default(model) for model in SHIPPED]
    generators = {model: load_generator(model, device) for model in models}
    check_outputs(*(("the table", args.out_dir / table, (".csv", ".json")) for table in TABLES))
    jobs = plan(generators, options_of(args, generators))
    scoring = scoring_device(device)
    extractor = load_extractor(args, scoring)
    data_dir = args.data_dir or data.default_data_dir()
    with distributed.first_before_others():
        train, test = (data.load_digits("mnist", split, data_dir, scoring) for split in ("train", "test"))
    target = train if args.n > len(test) else test
    origin = {"versions": provenance(), "extractor_sha256": extractor.sha256}
    evaluations = args.seeds * args.n * sum(job.evaluations for job in jobs)
    print(f"to do: {evaluations:,} network evaluations in {args.seeds * len(jobs)} samplings, each of them scored")
    enough = args.n * args.seeds >= NEEDED
    if not enough:
        print(f"the two-sample test is left out: it needs {NEEDED:,} samples of a model (--n times --seeds)")

    # Real digits, beside which the models stand
    scorer = FullScorer(target, test, train, extractor)
    protocol = {
        "n": args.n,
        "extractor": args.extractor,
        "reference": "mnist test" if target is test else "mnist train",
        "first_seed": args.seed,
        "device": device.type if distributed.count() == 1 else f"{distributed.count()} x {device.type}",
    }
    table = Table(protocol)
    score_real_digits(args, scorer, table, train, target, scorer.told_apart() if enough else {})

    # Models, with several seeds. A class-conditional one draws the reference's own labels.
    with tqdm(total=evaluations, unit="eval", unit_scale=True, disable=None if is_first() else True) as bar:
        for job in jobs:
            scores: list[Scores] = []
            drawn: list[torch.Tensor] = []  # of all seeds, as many as the two-sample test needs
            for seed in range(args.seed, args.seed + args.seeds):
                labels = proportional_labels(target, args.n, seed) if job.with_labels else None
                samples, cost = job.draw(args.n, labels, sampling_rng(seed), bar)
                images = data.to_uint8(samples)
                figures, digits = scorer.score(images, seed, labels)
                scores.append((cost | figures, digits))
                drawn.append(images[: max(0, NEEDED - sum(map(len, drawn)))])
            bar.clear()
            table.add(job.name, scores, job.description, scorer.told_apart(torch.cat(drawn)))

    command = shlex.join(["python", Path(__file__).name, *(argv or sys.argv[1:])])
    if is_first():
        table.write(args.out_dir, {"command": command, **origin})
    distributed.leave()


def options_of(args: argparse.Namespace, generators: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of `sample` of each generator. If none has any, a typed option is refused with `UsageError`."""
    none_has = not any(generator.SAMPLE_OPTIONS for generator in generators.values())
    return {
        file: sampling_options(args, generator, file) if generator.SAMPLE_OPTIONS or none_has else {}
        for file, generator in generators.items()
    }


def load_extractor(args: argparse.Namespace, device: torch.device) -> Any:
    """The network whose features are compared."""
    if args.extractor == "inception":
        from scoring.inception import InceptionExtractor

        return InceptionExtractor(device, args.inception_weights)
    from scoring.extractor import Extractor

    return Extractor(device)


def score_real_digits(
    args: argparse.Namespace,
    scorer: FullScorer,
    table: Table,
    train: Digits,
    target: Digits,
    told_apart: dict[str, float],
) -> None:
    """The floor (random training digits, scored like samples), and the figures of the reference digits themselves.

    `told_apart` is the two-sample test of real digits against real digits.

    Against the training set there is no floor: its digits would be compared with themselves.
    """
    from scoring.reference import FLOOR_SUBSETS

    if target is not train:
        subsets = [train.subset(args.n, "floor", i) for i in range(FLOOR_SUBSETS)]
        scores = [scorer.score(part.images, i, part.labels, memorised=False) for i, part in enumerate(subsets)]
        table.add("real training digits", scores, together=told_apart, is_floor=True)
    table.add("real training digits" if target is train else "real test digits", [(scorer.own_figures(), [])])


if __name__ == "__main__":
    run_script(main)
