"""Device choice, keyed random generators, atomic file writing and the exit codes: small, nothing model-specific.

torch is imported inside the functions, so that a script can parse its arguments (and print `--help`) without it.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import functools
import glob
import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch


AGAIN = "Nothing is half written; the same command can be given again."
# How often OpenMP's threads look whether the others have come, before they sleep. By default (300,000 times) they keep the
# core that another one waits for, where cores are shared; this is as fast on quiet cores (benchmarks/README.md).
SPINS = "10000"
BUSY = (1, 2, 3, 6, 7, 8)  # columns of /proc/stat, see proc(5): user, nice, system, irq, softirq, steal
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # in torch's messages


class ExpectedError(Exception):
    """A failure that the user can mend: shown as one line `error: what, and what to do`, exit code 1, no traceback."""


class UsageError(ExpectedError):
    """An argument that the command line takes, and that cannot be used: the same line, exit code 2."""


class Interrupted(BaseException):
    """A SIGINT or SIGTERM that ends the run. `hint` says how to continue; the exit code is 128 + the signal's number."""

    def __init__(self, signum: int, hint: str = ""):
        super().__init__(signum, hint)
        self.signum, self.hint = signum, hint


def is_first() -> bool:
    """Whether this process is the one of torchrun's that writes and speaks, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` and turn expected failures into the documented exit codes: 0, 1, 2, 130, 143."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is first imported, so not yet
    previous = signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path may hold any bytes
    try:
        code = _exit_code(main)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # A thread of gloo's may still hold a tensor; to let go of it, it asks for an interpreter that is gone, and aborts
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _exit_code(main: Callable[[], None]) -> int:
    """Run `main`; the code to leave with, after a line that says why, where it is not 0."""
    try:
        main()
    except ExpectedError as error:
        return _error_line(error)
    except OSError as error:  # a full disk, a missing permission: the message names the file
        return _error_line(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        return _error_line(ExpectedError("out of memory; lower --batch-size, --width or the number of samples"))
    except Interrupted as stop:
        if is_first():
            print(f"stopped by signal {stop.signum}. {stop.hint or AGAIN}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print(f"stopped by signal {signal.SIGINT.value}. {AGAIN}", file=sys.stderr)
        return 130
    return 0


def _interrupt(signum: int, _frame: object) -> None:
    raise Interrupted(signum)


def say(*lines: object) -> None:
    """Print progress; where nobody reads it any more (a closed pipe), the work goes on."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _error_line(error: Exception) -> int:
    if is_first():
        print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


def choose_device(name: str = "auto") -> torch.device:
    """The torch device called `name`; `auto` is the GPU where there is one, else the CPU.

    Raises:
        UsageError: the device does not exist on this machine.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's processes have a GPU each
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here ({first_line}); try --device cpu") from error
    if device.type == "cpu":
        _keep_freed_memory()
    else:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: figures are compared across devices
    return device


def _keep_freed_memory() -> None:
    """Stop glibc from handing each freed activation back to the kernel, only to fault its pages in again a step later."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # mallopt(3)
    with contextlib.suppress(OSError, AttributeError):  # another C library: its own policy stands
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 * 2**20)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 256 * 2**20)


def ask_for_huge_pages() -> None:
    """Have torch ask Linux for pages of 2 MB, unless `THP_MEM_ALLOC_ENABLE` is set: to be called before the first tensor.

    The U-Net's step is a little faster so, and takes a fifth more memory at a batch of 128; the GANs' steps are not.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def busy_seconds() -> tuple[float, float]:
    """Processor time that this process has taken, and that the cores it may use have been busy, both in seconds.

    The latter is infinite where the system does not tell.
    """
    try:
        cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        tick = os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):  # not Linux
        return time.process_time(), math.inf
    ticks = (int(line[column]) for line in lines if line[0] in cores for column in BUSY)
    return time.process_time(), sum(ticks) / tick


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` by a fixed rule: bf16 on a GPU that has it, fp32 elsewhere."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and has_bf16(device) else "fp32"


@functools.cache
def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16, or (a CPU, to torch 2.10) does not tell."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return not capabilities or any("bf16" in name and has for name, has in capabilities.items())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bfloat16 for `precision='bf16'`, a context that does nothing for `fp32`."""
    import torch

    if precision == "bf16" and not has_bf16(device):
        _note_emulation(device.type)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@functools.cache
def _note_emulation(kind: str) -> None:
    """Say once that bf16 is slow here: on a CPU, an emulated convolution can take a hundred times as long."""
    print(f"note: this {kind} has no bf16 instructions: --precision fp32 can be many times faster", file=sys.stderr)


def make_deterministic() -> None:
    """Ask PyTorch for deterministic kernels: on CUDA this costs speed; on the CPU they are deterministic anyway."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def keyed_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator seeded by `key` alone, such as (seed, "noise", step).

    Keys instead of one running stream: a run that resumes at step 1000 draws what an uninterrupted one would draw
    there, and no random state has to be saved.
    """
    import torch

    return reseeded(torch.Generator(device), *key)


def reseeded(generator: torch.Generator, *key: int | str) -> torch.Generator:
    """The generator, at the beginning of what `keyed_generator` draws with that key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`; on leaving without an error it is flushed to disk and renamed to `path`.

    A reader (or a run that is killed) sees the whole old file or the whole new one. Permissions follow the umask. What
    killed processes left of their own attempts is swept away.
    """
    wanted, path = path, Path(os.path.realpath(path))  # a link stays one
    temporary = None
    try:
        if path.exists() and not path.is_file():
            raise ExpectedError(f"cannot write {wanted}, which is no ordinary file; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        handle, name = tempfile.mkstemp(prefix=f"{_prefix(path)}{os.getpid()}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp made it private
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ExpectedError(f"cannot write {wanted} ({error.strerror or error}); its previous version is kept") from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which is gone afterwards: of two runs that write the same files, the second is refused.

    Raises:
        ExpectedError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # a system without such locks
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without them
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = os.fstat(file.fileno()).st_nlink > 0  # else its last holder has just removed it
            except BlockingIOError:
                free = False
            if not free:
                raise ExpectedError(f"another training is writing to {path.parent}; wait for it, or give another --out-dir")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike) -> None:
    """Make the folder and try to write there: before hours of work, not after them.

    Raises:
        ExpectedError: it cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ExpectedError(f"cannot write in {folder} ({error.strerror or error}); choose another folder") from error


def _prefix(path: Path) -> str:
    """What the names of temporary files for `path` begin with: short enough for any file system."""
    return f".{path.stem[:100]}."


def _sweep(path: Path) -> None:
    """Remove the temporary files for `path` of processes that are gone."""
    prefix = _prefix(path)
    for left in path.parent.glob(f"{glob.escape(prefix)}*{glob.escape(path.suffix)}"):
        pid = left.name.removeprefix(prefix).split(".")[0]
        if pid.isdecimal() and not _is_another_running(int(pid)):
            left.unlink(missing_ok=True)


def _is_another_running(pid: int) -> bool:
    if pid == os.getpid():
        return False  # this one has no file open yet: it is an earlier process of the same number
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, or no process at all
        return True
    return True


def write_csv(path: str | os.PathLike, rows: list[dict]) -> None:
    """Write rows under the union of their columns, floats with six digits; a missing or nan figure is left empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    with atomic_path(path) as temporary:
        temporary.write_text(buffer.getvalue())


def earlier_rows(path: str | os.PathLike, columns: set[str]) -> list[dict[str, str]]:
    """The rows that an earlier run wrote with `write_csv`, as text; none where there is no file, or a column is missing."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        return list(reader) if columns <= set(reader.fieldnames or ()) else []


def write_json(path: str | os.PathLike, content: object) -> None:
    """Write dicts, lists and primitives as indented JSON; a figure that is not finite becomes null."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(plain(content), indent=1) + "\n")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def provenance() -> dict[str, str]:
    """Versions of Python and torch, and the commit of the code (`-dirty` with local changes; `unknown` outside git)."""
    import platform

    import torch

    return {"python": platform.python_version(), "torch": str(torch.__version__), "git": _git_commit()}


def _git_commit() -> str:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
