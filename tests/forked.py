"""Not a test: scripts in processes of their own, forked from a server that has already imported torch.

A fresh process needs seconds for its imports. A forked one has its own memory, signals and exit code as well.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TIMEOUT = 120.0
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed", "sklearn.datasets", "PIL.Image"])


class Forked:
    """A script that runs in a forked process; its output goes to files."""

    def __init__(self, script: str, args: list[str], env: dict[str, str], cwd: Path = ROOT):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        for file in self.files:
            file.touch()
        self.command = [script, *args]
        self.process = SERVER.Process(target=_main, args=(self.command, env, str(cwd), list(map(str, self.files))))
        self.process.start()

    @property
    def stdout(self) -> str:
        return self.files[0].read_text()

    def send_signal(self, signum: int) -> None:
        os.kill(self.process.pid, signum)

    def result(self) -> subprocess.CompletedProcess:
        """Wait for the end. The exit code is negative after a signal, as with `subprocess`."""
        self.process.join(TIMEOUT)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.command, TIMEOUT)
        result = subprocess.CompletedProcess(self.command, self.process.exitcode, *(file.read_text() for file in self.files))
        self.folder.cleanup()
        return result


def run_forked(script: str, *args: object, **env: str) -> subprocess.CompletedProcess:
    """Run a script in a forked process, to its end."""
    return Forked(script, list(map(str, args)), {**os.environ, **env}).result()


def _main(command: list[str], env: dict[str, str], cwd: str, files: list[str]) -> None:
    """What the forked process does."""
    for descriptor, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest may ignore it
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS") or torch.get_num_threads()))  # torch has read the server's already
    sys.argv = command
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")
