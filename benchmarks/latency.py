"""How long a user waits: for each script's `--help`, a dry run of each trainer, pictures, reading MNIST, and scorings.

Each line is the median of a few repeats, after a first run that fills the caches. The result is printed.

    python benchmarks/latency.py
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAINERS = ("train_gan.py", "train_cgan.py", "train_diffusion.py")
SCRIPTS = (*TRAINERS, "train_classifier.py", "evaluate.py", "infer.py", "inference.py", "report.py")
sys.path.insert(0, str(ROOT))

import torch
from timing import precisions, wait_for_device

import data
from checkpoint import load_generator
from cli import CUDA_DEVICE_HELP, DATA_DIR_HELP, ArgumentParser, expanded_path, integer, run_script
from files import UsageError
from scoring import metrics
from scoring.extractor import Extractor
from scoring.reference import load_reference
from scoring.scorer import FullScorer, Scorer
from utils import choose_device, keyed_generator

Work = Callable[[], object]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--model", type=expanded_path, default=str(ROOT / "checkpoints" / "best_GAN_G.pt"), help="the generator to score")
    flag("--n", type=integer(10, 10**6), default=10_000, help="samples in a scoring")
    flag("--repeats", type=integer(1), default=3, help="timed repeats")
    flag("--only", nargs="+", default=[""], metavar="TEXT", help="the lines that contain one of these (default: all)")
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    flag("--device", default="auto", help=CUDA_DEVICE_HELP)
    args = parser.parse_args(argv)

    device = choose_device(args.device, apple=False)
    data_dir = args.data_dir or data.default_data_dir()
    generator = load_generator(args.model, device)
    extractor = Extractor(device)
    monitor = Scorer(extractor, load_reference("train", extractor), args.n, seed=0)
    images = data.to_uint8(generator.sample(args.n, rng=keyed_generator("cpu", 0)))
    features, _ = extractor(images)
    train, test = (data.load_digits("mnist", split, data_dir, device) for split in ("train", "test"))
    full = FullScorer(test, test, train, extractor)
    digits = 500 if device.type == "cpu" else 10_000
    diffusion_model = load_generator(ROOT / "checkpoints" / "best_DIFF.pt", device)

    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, n = {args.n}, {args.repeats} repeats")
    here: dict[str, Work] = {
        "read MNIST's 60,000 training digits": lambda: data.load_digits("mnist", "train", data_dir),
        **{
            f"{n:,} diffusion digits, 15 evaluations, {precision}": functools.partial(
                diffusion_model.sample, n, steps=15, precision=precision
            )
            for precision in precisions(device)
            for n in (64, digits)
        },
        "a scoring of the monitor: sample, FID, IS": lambda: monitor(generator),
        "  of that: sample": lambda: generator.sample(args.n, rng=keyed_generator("cpu", 0)),
        "  of that: features": lambda: extractor(images),
        "a scoring of evaluate.py: every figure": lambda: full.score(images, 0),
        "  of that: precision, recall, density, coverage": lambda: metrics.fidelity(full.features, features),
        "  of that: KID": lambda: metrics.kernel_distance(full.features, features, keyed_generator("cpu", 0)),
        "  of that: nearest training digits": lambda: metrics.nearest_neighbours(images, train.images),
    }
    with tempfile.TemporaryDirectory() as scratch:
        works = scripts(scratch, data_dir, device) | here
        names = [name for name in works if any(text in name for text in args.only)]
        if not names:
            raise UsageError(f"--only {' '.join(args.only)}: no line contains that")
        for name in names:
            print(f"{name:50s} {median_seconds(works[name], args.repeats):7.2f} s", flush=True)


def scripts(scratch: str, data_dir: str | Path, device: torch.device) -> dict[str, Work]:
    """Scripts as whole processes, imports included. They write into `scratch`."""

    def command(*arguments: object) -> Work:
        line = [sys.executable, *map(str, arguments)]
        return functools.partial(subprocess.run, line, check=True, capture_output=True, cwd=ROOT)

    here = ["--device", device]
    digits = ["--data-dir", Path(data_dir).resolve()]
    trial = ["--dry-run", *here, *digits, "--out-dir", scratch]
    return {
        **{f"{script} --help": command(script, "--help") for script in SCRIPTS},
        **{f"{script} --dry-run": command(script, *trial) for script in TRAINERS},
        "inference.py --digit 9": command("inference.py", *here, "--digit", "9", "--outdir", scratch),
        "infer.py (64 digits of each kind)": command("infer.py", *here, *digits, "--out", f"{scratch}/infer.png"),
    }


def median_seconds(work: Work, repeats: int) -> float:
    """Median wall-clock seconds of `work`, after one run to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        wait_for_device()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    run_script(main)
