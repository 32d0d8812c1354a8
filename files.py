"""Errors, progress lines, and files that are written whole or not at all: the leaf that every other module may import."""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


# --------------------------------------------------------------------------------------------------------------------
# Errors, and who may print


class ExpectedError(Exception):
    """A failure that the user can repair. It is shown as one line, `error: what, and what to do`, with exit code 1."""


class UsageError(ExpectedError):
    """An argument that cannot be used. It is shown in the same way, with exit code 2."""


class Interrupted(BaseException):
    """A SIGINT or SIGTERM that ends the run. `hint` says how to continue; the exit code is 128 + `signum`."""

    def __init__(self, signum: int, hint: str = ""):
        super().__init__(signum, hint)
        self.signum = signum
        self.hint = hint


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch means that the memory is full."""
    messages = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(words in str(error) for words in messages)


def is_first() -> bool:
    """Whether this process writes and prints: the only process, or torchrun's process number 0."""
    return os.environ.get("RANK", "0") == "0"


def say(*lines: object) -> None:
    """Print progress. When the reader has closed the pipe, the work goes on."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --------------------------------------------------------------------------------------------------------------------
# Atomic files, locks


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`. Without an error it is flushed to disk and then renamed to `path`.

    A reader sees the whole old file or the whole new one, also when this process is killed. Permissions follow the umask.
    Temporary files that killed processes left behind are removed.

    Raises:
        ExpectedError: `path` cannot be written, or is no ordinary file.
    """
    wanted = path
    path = Path(os.path.realpath(path))  # a symbolic link stays one
    temporary = None
    try:
        if path.exists() and not path.is_file():
            raise ExpectedError(f"cannot write {wanted}, which is no ordinary file; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
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


def _prefix(path: Path) -> str:
    """The beginning of the names of temporary files for `path`, short enough for any file system."""
    return f".{path.stem[:100]}."


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files for `path` whose process has ended."""
    prefix = _prefix(path)
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*{glob.escape(path.suffix)}"):
        pid = leftover.name.removeprefix(prefix).split(".")[0]
        if pid.isdecimal() and not _is_another_running(int(pid)):
            leftover.unlink(missing_ok=True)


def _is_another_running(pid: int) -> bool:
    if pid == os.getpid():
        return False  # this process has no temporary file yet: an earlier process had the same number
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process, or no valid number
        return True
    return True


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, and remove it afterwards. It keeps two runs from writing the same files.

    Raises:
        ExpectedError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # a system without such locks
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without such locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = os.fstat(file.fileno()).st_nlink > 0  # 0: the last holder has just removed the file
            except BlockingIOError:
                free = False
            if not free:
                raise ExpectedError(f"another training is writing to {path.parent}; wait for it, or give another --out-dir")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Create the folder and try to write there, before hours of work.

    Raises:
        ExpectedError: the folder cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ExpectedError(f"cannot write in {folder} ({error.strerror or error}); choose another folder") from error


# --------------------------------------------------------------------------------------------------------------------
# Tables


def write_csv(path: str | os.PathLike[str], rows: list[dict]) -> None:
    """Write rows under the union of their columns. Floats get six digits; a missing or nan figure is an empty cell."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    with atomic_path(path) as temporary:
        temporary.write_text(buffer.getvalue())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def earlier_rows(path: str | os.PathLike[str], columns: set[str]) -> list[dict[str, str]]:
    """The rows of an earlier `write_csv`, as text. Empty when there is no file, or when one of the `columns` is missing."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        return list(reader) if columns <= set(reader.fieldnames or ()) else []


def write_json(path: str | os.PathLike[str], content: object) -> None:
    """Write dicts, lists and primitives as indented JSON. A figure that is not finite becomes null."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(plain(content), indent=1) + "\n")
