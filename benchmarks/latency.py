"""How long does one wait? For each script's `--help`, a dry run of each trainer, pictures on demand, reading MNIST, and
scoring a generator: medians of a few repeats, after a first one that fills the caches.

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
import flags
import metrics
from checkpoint import load_generator
from evaluation import Extractor, RealDigits, Scorer, load_reference
from utils import UsageError, choose_device, keyed_generator, run_script


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--model", default=str(ROOT / "checkpoints" / "best_GAN_G.pt"), help="the generator to score")
    flag("--n", type=flags.sample_count, default=10_000, help="samples in a scoring")
    flag("--repeats", type=flags.positive_int, default=3, help="timed repeats")
    flag("--only", nargs="+", default=[""], metavar="TEXT", help="the lines that contain one of these (default: all)")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args()

    device = choose_device(args.device)
    data_dir = args.data_dir or data.default_data_dir()
    generator, extractor = load_generator(args.model, device), Extractor(device)
    scorer = Scorer(extractor, load_reference("train", extractor), args.n, seed=0)
    images = data.to_uint8(generator.sample(args.n, rng=keyed_generator("cpu", 0)))
    features, _ = extractor(images)
    train, test = (data.load_digits("mnist", split, data_dir, device) for split in ("train", "test"))
    reference = RealDigits(test, test, train, extractor)
    digits = 500 if device.type == "cpu" else 10_000
    diffusion_model = load_generator(ROOT / "checkpoints" / "best_DIFF.pt", device)

    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, n = {args.n}, {args.repeats} repeats")
    report = {
        "read MNIST's 60,000 training digits": lambda: data.load_digits("mnist", "train", data_dir),
        **{
            f"{n:,} diffusion digits, 15 evaluations, {precision}": functools.partial(
                diffusion_model.sample, n, steps=15, precision=precision
            )
            for precision in precisions(device)
            for n in (64, digits)
        },
        "a scoring of the monitor: sample, FID, IS": lambda: scorer(generator),
        "  of that: sample": lambda: generator.sample(args.n, rng=keyed_generator("cpu", 0)),
        "  of that: features": lambda: extractor(images),
        "a scoring of evaluate.py: every figure": lambda: reference.score(images, 0),
        "  of that: precision, recall, density, coverage": lambda: metrics.fidelity(reference.features, features),
        "  of that: KID": lambda: metrics.kernel_distance(reference.features, features, keyed_generator("cpu", 0)),
        "  of that: nearest training digits": lambda: metrics.nearest_neighbours(images, train.images),
    }
    with tempfile.TemporaryDirectory() as scratch:
        works = scripts(scratch, data_dir, device) | report
        names = [name for name in works if any(text in name for text in args.only)]
        if not names:
            raise UsageError(f"--only {' '.join(args.only)}: no line contains that")
        for name in names:
            print(f"{name:50s} {median_seconds(works[name], args.repeats):7.2f} s", flush=True)


def scripts(scratch: str, data_dir: str | Path, device: torch.device) -> dict[str, Callable[[], object]]:
    """Whole processes, imports included, which write into `scratch`."""

    def command(*arguments: object) -> Callable[[], object]:
        line = [sys.executable, *map(str, arguments)]
        return functools.partial(subprocess.run, line, check=True, capture_output=True, cwd=ROOT)

    here, digits = ["--device", device], ["--data-dir", Path(data_dir).resolve()]
    trial = ["--dry-run", *here, *digits, "--out-dir", scratch]
    return {
        **{f"{script} --help": command(script, "--help") for script in SCRIPTS},
        **{f"{script} --dry-run": command(script, *trial) for script in TRAINERS},
        "inference.py --digit 9": command("inference.py", *here, "--digit", "9", "--outdir", scratch),
        "infer.py (64 digits of each kind)": command("infer.py", *here, *digits, "--out", f"{scratch}/infer.png"),
    }


def median_seconds(work: Callable[[], object], repeats: int) -> float:
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
