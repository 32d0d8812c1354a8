"""How long does one wait? Reading MNIST, `--help`, pictures on demand, and scoring a generator: medians of a few
repeats, after a first one that fills the caches.

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
sys.path.insert(0, str(ROOT))

import torch
from timing import precisions

import data
import flags
import metrics
from checkpoint import load_generator
from evaluation import Extractor, RealDigits, Scorer, load_reference
from utils import choose_device, keyed_generator, run_script


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--model", default=str(ROOT / "checkpoints" / "best_GAN_G.pt"), help="the generator to score")
    flag("--n", type=flags.sample_count, default=10_000, help="samples in a scoring")
    flag("--repeats", type=flags.positive_int, default=3, help="timed repeats")
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
    help_command = [sys.executable, str(ROOT / "train_gan.py"), "--help"]
    digit_model = str(ROOT / "checkpoints" / "best_CGAN_G.pt")
    digit_command = [sys.executable, str(ROOT / "inference.py"), "--model", digit_model, "--digit", "9", "--outdir"]
    infer_command = [sys.executable, str(ROOT / "infer.py"), "--data-dir", str(data_dir), "--out"]

    digits = 500 if device.type == "cpu" else 10_000
    diffusion_model = load_generator(ROOT / "checkpoints" / "best_DIFF.pt", device)

    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, n = {args.n}, {args.repeats} repeats")
    report = {
        "read MNIST's 60,000 training digits": lambda: data.load_digits("mnist", "train", data_dir),
        "train_gan.py --help": lambda: subprocess.run(help_command, check=True, capture_output=True),
        "inference.py --digit 9": lambda: subprocess.run([*digit_command, scratch], check=True, capture_output=True),
        "infer.py (64 digits of each kind)": lambda: subprocess.run(
            [*infer_command, f"{scratch}/infer.png"], check=True, capture_output=True, cwd=ROOT
        ),
        **{
            f"{digits:,} diffusion digits, 15 evaluations, {precision}": functools.partial(
                diffusion_model.sample, digits, steps=15, precision=precision
            )
            for precision in precisions(device)
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
        for name, work in report.items():
            print(f"{name:50s} {median_seconds(work, args.repeats, device):7.2f} s")


def median_seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median wall-clock seconds of `work`, after one run to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    run_script(main)
