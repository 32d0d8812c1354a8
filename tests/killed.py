"""Not a test: test_killed.py starts a trainer through it. At the n-th visit of a place, the trainer sends itself a signal.

With "twice", it gets two SIGINT during a call that keeps Python busy for minutes.

python tests/killed.py SIGKILL PLACE N train_gan.py [its flags]
"""

from __future__ import annotations

import hashlib
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from models import DDPM, Generator
from recipes.ddpm import DiffusionStep
from recipes.gan import GANStep
from scoring import metrics

PLACES = {
    "step": [(GANStep, "__call__"), (DiffusionStep, "__call__")],
    "sampling": [(Generator, "sample"), (DDPM, "sample")],
    "evaluation": [(Generator, "forward"), (DDPM, "forward")],
    "scoring": [(metrics, "inception_score")],
    "writing": [(Path, "write_bytes")],
    "flushing": [(os, "fsync")],
    "renaming": [(Path, "replace")],
}


def deadly(function: Callable, visits: int, signum: str) -> Callable:
    """The function, which sends the signal at its last visit. If it writes a file, half of the file is written before."""
    count = 0

    def visited(*args, **options):
        nonlocal count
        count += 1
        if count == visits:
            if function.__name__ == "write_bytes":
                function(args[0], args[1][: len(args[1]) // 2])
            print("signal at", time.time(), flush=True)
            if signum == "twice":
                command = f"sleep 0.3; kill -INT {os.getpid()}"
                subprocess.Popen(["sh", "-c", f"kill -INT {os.getpid()}; {command}"])
                time.sleep(0.2)
                hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # like a slow step: Python handles no signal until it ends
                return function(*args, **options)
            os.kill(os.getpid(), signal.Signals[signum])
        return function(*args, **options)

    return visited


def main() -> None:
    signum, place, visits, script, *sys.argv[1:] = sys.argv[1:]
    for owner, name in PLACES[place]:
        setattr(owner, name, deadly(getattr(owner, name), int(visits), signum))
    sys.argv[0] = script
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main()
