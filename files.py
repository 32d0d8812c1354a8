"""Errors, progress lines, processes, paths, and files that are written whole or not at all: the leaf of all imports.

Text files are UTF-8 whatever the locale says, and a file name may hold any bytes.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import io
import json
import math
import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator


# --------------------------------------------------------------------------------------------------------------------
# Errors


class ExpectedError(Exception):
    """A failure that the user can repair. It is shown as one line, `error: what, and what to do`, with exit code 1."""


class UsageError(ExpectedError):
    """An argument that cannot be used. It is shown in the same way, with exit code 2."""


class Interrupted(BaseException):
    """A signal that ends the run. `hint` says how to continue; the exit code is 128 + `signum`."""

    def __init__(self, signum: int, hint: str = ""):
        super().__init__(signum, hint)
        self.signum = signum
        self.hint = hint


def stop_signals() -> list[signal.Signals]:
    """The signals that ask this process to stop: SIGINT, SIGTERM, and SIGHUP (a closed terminal).

    A SIGHUP that is ignored, as `nohup` arranges, stays so. Only the main thread can handle signals, so others have none.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    found = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch means that the memory is full."""
    messages = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(words in str(error) for words in messages)


# --------------------------------------------------------------------------------------------------------------------
# Processes: who prints and writes


class Processes(NamedTuple):
    """This process among those of torchrun. Without torchrun it is the first of one."""

    rank: int = 0
    total: int = 1
    local_rank: int = 0  # on this machine: its number of the GPU


def processes() -> Processes:
    """Read torchrun's variables. They count only together: one that another job has left behind means nothing.

    Raises:
        UsageError: they contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    texts = [os.environ.get(name, "") for name in names]
    if not texts[0] or not texts[1]:
        return Processes()
    try:
        found = Processes(int(texts[0]), int(texts[1]), int(texts[2] or 0))
    except ValueError:
        found = Processes(-1)
    if not 0 <= found.rank < found.total or found.local_rank < 0:
        given = ", ".join(f"{name}={text}" for name, text in zip(names, texts))
        raise UsageError(f"{given} do not fit together; start several processes with torchrun, or unset these variables")
    return found


def is_first() -> bool:
    """Whether this process writes and prints."""
    try:
        return processes().rank == 0
    except UsageError:
        return True  # somebody has to say so


def say(*lines: object) -> None:
    """Print progress at once, one line for each argument."""
    print(*lines, sep="\n", flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Paths and text


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path, with `~` expanded. A `~name` that is no user stays as it is."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises for such a name


def find_default(path: str) -> str:
    """A default input: `path` in the current folder, else beside the scripts. Prints the file that is used."""
    if not Path(path).exists() and (beside := Path(__file__).parent / path).exists():
        path = str(beside)
    say(f"using {path}")
    return path


PICTURES = (".png", ".jpg", ".jpeg", ".pdf")


def check_outputs(*outputs: tuple[str, str | os.PathLike[str] | None, tuple[str, ...]]) -> None:
    """Check the files that a script will write, before its work: (its name in a message, path or None, suffixes).

    Raises:
        UsageError: another suffix, a folder or a device in the way, or the same file twice.
        ExpectedError: a folder cannot be written.
    """
    taken: dict[Path, str] = {}
    for name, path, suffixes in outputs:
        if path is None:
            continue
        file = Path(os.path.realpath(expanded(path)))  # of a symbolic link the target is written
        if Path(path).suffix.lower() not in suffixes:
            raise UsageError(f"{name} {path} must end in {', '.join(suffixes)}, which decides the format")
        if file.exists() and not file.is_file():
            raise UsageError(f"{name} {path} is {'a folder' if file.is_dir() else 'no ordinary file'}; give another name")
        if file in taken:
            raise UsageError(f"{taken[file]} and {name} are the same file, {path}; give two")
        taken[file] = name
    for file in taken:
        check_writable(file.parent)


@contextlib.contextmanager
def network_timeout() -> Iterator[None]:
    """Give up a download whose server is silent for half a minute. Libraries that set no timeout would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30.0)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def cannot_read(path: str | os.PathLike[str], error: BaseException, otherwise: str) -> ExpectedError:
    """Why a file cannot be read, and what to do. `otherwise`: what is wrong with its content; what to do."""
    if is_out_of_memory(error):
        return ExpectedError(f"there is not enough memory to read {path}; close other programs")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        return ExpectedError(f"{path} cannot be read ({error.strerror}); ask for the permission to read it")
    if isinstance(error, FileNotFoundError):
        return ExpectedError(f"{path} does not exist; {otherwise.rpartition('; ')[2]}")
    if isinstance(error, (IsADirectoryError, NotADirectoryError)):
        return ExpectedError(f"{path} cannot be read ({error.strerror}); give the path of a file")
    if isinstance(error, OSError) and error.errno is not None:
        return ExpectedError(f"{path} cannot be read ({error.strerror}); look at the disk, and try again")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ExpectedError(f"{path} {otherwise.format(reason=reason)}")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file."""
    return expanded(path).read_text(encoding="utf-8", errors="surrogateescape")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file atomically. A file name in it may hold any bytes, which are written as they are."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


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
    path = Path(os.path.realpath(expanded(path)))  # a symbolic link stays one
    temporary = None
    try:
        if path.exists() and not path.is_file():
            raise ExpectedError(f"cannot write {wanted}, which is no ordinary file; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        handle, name = tempfile.mkstemp(prefix=f"{_prefix(path)}{os.getpid()}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        if sys.platform != "win32":  # where mkstemp's file has the permissions of its folder
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
    if sys.platform == "win32":
        return True  # os.kill would end the process there: its leftovers stay
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
    if sys.platform == "win32":
        yield  # it has no such locks
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
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
        expanded(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=expanded(folder)).close()
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
    write_text(path, buffer.getvalue())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def earlier_rows(path: str | os.PathLike[str], columns: set[str]) -> list[dict[str, str]]:
    """The rows of an earlier `write_csv`, as text. Empty when there is no file, or when one of the `columns` is missing."""
    if not expanded(path).exists():
        return []
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    return list(reader) if columns <= set(reader.fieldnames or ()) else []


def write_json(path: str | os.PathLike[str], content: object) -> None:
    """Write dicts, lists and primitives as indented JSON. A figure that is not finite becomes null."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_text(path, json.dumps(plain(content), indent=1) + "\n")
