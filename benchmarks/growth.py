"""How the cost of a training grows: images/s and peak memory over batch size, width, processes, and other work beside it.

Every figure is of a trainer in a process of its own, which trains three short epochs on a part of MNIST. The second epoch is
timed: it neither warms up nor scores. Several processes share the machine. On a CPU each has its part of the cores, so they
gain nothing there. The other work is processes that keep one core busy each.

The results are written to --out. Run nothing else on the machine meanwhile.

    python benchmarks/growth.py
    python benchmarks/growth.py --trainers diffusion --widths 16 --processes 1 2
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cli import CUDA_DEVICE_HELP, DATA_DIR_HELP, ArgumentParser, expanded_path, integer, run_script
from diffusion.options import PRECISIONS
from files import ExpectedError, check_outputs, expanded, write_csv

WIDTHS = {"gan": 32, "cgan": 32, "diffusion": 16}  # the defaults
SCRIPTS = {name: f"train_{name}.py" for name in WIDTHS}


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--trainers", nargs="+", choices=WIDTHS, default=[*WIDTHS], help="which trainers to run")
    flag("--batch-sizes", nargs="+", type=integer(1), default=[32, 64, 128, 256], help="at the default width")
    flag("--widths", nargs="+", type=integer(1), default=[16, 32, 64], help="at batch 128")
    flag("--processes", nargs="+", type=integer(1), default=[1, 2], help="of torchrun, at batch 128")
    flag("--busy", nargs="+", type=integer(0), default=[0, 1], help="processes of other work, at batch 128")
    flag("--images", type=integer(1), default=5120, help="in each of the three epochs")
    flag("--precision", choices=("auto", *PRECISIONS), default="auto", help="of the trainings")
    flag(
        "--environment",
        nargs="+",
        type=variable,
        default=[],
        metavar="NAME=VALUE",
        help="environment variables of the trainings, such as OMP_NUM_THREADS=1",
    )
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    flag("--device", default="auto", help=CUDA_DEVICE_HELP)
    flag("--out", type=expanded, default=Path("runs/growth.csv"), help="the table to write")
    args = parser.parse_args(argv)
    check_outputs(("--out", args.out, (".csv",)))

    rows: list[dict[str, Any]] = []
    for trainer, width, batch, processes, busy in settings(args):
        with others(busy):
            rate, memory = measure(args, trainer, width, batch, processes)
        rows.append(
            {
                "trainer": trainer,
                "width": width,
                "batch_size": batch,
                "processes": processes,
                "busy": busy,
                "images_per_second": rate,
                "peak_memory_mb": memory,
            }
        )
        setting = f"{trainer:9s}  width {width:3d}  batch {batch:4d}  processes {processes}  busy others {busy}"
        print(f"{setting}  {rate:7.0f} images/s  {memory:6.0f} MB at most in a process", flush=True)
        write_csv(args.out, rows)
    print(f"wrote {args.out}")


def variable(text: str) -> tuple[str, str]:
    """argparse type: NAME=VALUE."""
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def settings(args: argparse.Namespace) -> Iterator[tuple[str, int, int, int, int]]:
    """(trainer, width, batch size, processes, busy others), each once. One of them varies; the rest have their defaults."""
    for trainer in args.trainers:
        width = WIDTHS[trainer]
        varied = [(width, batch, 1, 0) for batch in args.batch_sizes]
        varied += [(other, 128, 1, 0) for other in args.widths]
        varied += [(width, 128, processes, 0) for processes in args.processes]
        varied += [(width, 128, 1, busy) for busy in args.busy]
        yield from ((trainer, *setting) for setting in dict.fromkeys(varied))


@contextlib.contextmanager
def others(n: int) -> Iterator[None]:
    """Keep `n` cores busy, with a process each."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(args: argparse.Namespace, trainer: str, width: int, batch: int, processes: int) -> tuple[float, float]:
    """Images/s of the second epoch, and the largest resident memory of a process in MB.

    Raises:
        ExpectedError: the trainer failed. The message ends with the trainer's own error line.
    """
    program = [sys.executable]
    environment = {**os.environ, **dict(args.environment)}
    if processes > 1:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with tempfile.TemporaryDirectory() as folder:
        command: list[object] = [*program, ROOT / SCRIPTS[trainer]]
        command += ["--limit", args.images, "--width", width, "--batch-size", batch, "--epochs", 3]
        command += ["--eval-every", 3, "--eval-samples", 100, "--no-early-stop"]
        command += ["--precision", args.precision, "--device", args.device, "--out-dir", folder]
        command += ["--steps", 1] if trainer == "diffusion" else []  # of the GIF's frames, which are not the question
        command += ["--data-dir", args.data_dir] if args.data_dir else []
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            child = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=errors, env=environment)
            try:
                memory = peak_memory(child)
            finally:
                if child.returncode is None:  # interrupted: it would train on
                    child.terminate()
                    child.wait()
            if child.returncode:
                errors.seek(0)
                said = [line.removeprefix("error: ") for line in errors if line.startswith("error: ")]
                raise ExpectedError(f"{SCRIPTS[trainer]} failed: {said[-1] if said else f'exit code {child.returncode}'}")
        with (Path(folder) / "reports" / f"{trainer}_training_log.csv").open(encoding="utf-8") as file:
            first, second, _ = csv.DictReader(file)
    images, seconds = (float(second[name]) - float(first[name]) for name in ("images", "seconds"))
    return images / seconds, memory


def peak_memory(child: subprocess.Popen) -> float:
    """Wait for the child. Returns the largest resident memory, in MB, of the child and of its own children.

    nan: Windows does not tell.
    """
    if sys.platform == "win32":
        child.wait()
        return math.nan
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    run_script(main)
