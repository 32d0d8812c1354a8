"""Refuse a model file that torch.load would trust: bombs, damaged members, and pickles of anything but tensors.

torch's reader with `weights_only=True` runs no code. But it would still unpack compressed members of any size, allocate what
a pickle asks for, and hash tuples that repeat each other, which takes exponential time.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import reprlib
import zipfile
from pathlib import Path

MAX_DIRECTORY_BYTES = 2**20  # of the ZIP's list of members: ten thousand tensors
MAX_PICKLE_BYTES = 2**25
MAX_PICKLE_PARTS = 2 * 10**6  # the log of 30,000 epochs: read in seconds
TENSOR_PARTS = re.compile(r"torch._utils _rebuild_tensor_v2|collections OrderedDict|torch [A-Za-z0-9]+Storage")
PICKLE_PARTS = re.compile(  # of pickle's protocol 2, as torch.save writes it
    "PROTO|STOP|MARK|NONE|NEWTRUE|NEWFALSE|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|EMPTY_(DICT|LIST|TUPLE)|SETITEMS?|APPENDS?|"
    "TUPLE[123]?|(LONG_)?BIN(PUT|GET)|GLOBAL|REDUCE|BINPERSID"
)


def check_archive(path: Path, max_bytes: int) -> None:
    """Check the container of a file that `torch.save` should have written.

    Raises:
        zipfile.BadZipFile: compressed or oversized members, a wrong CRC, or another archive in front.
        pickle.UnpicklingError: a pickle of anything but tensors and primitives.
        OSError: the file cannot be read.
    """
    with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
        file.most = path.stat().st_size
        members = archive.infolist()
        if not members or min(member.header_offset for member in members) > 0:
            raise zipfile.BadZipFile("something stands before the archive, in which torch might read another one")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise zipfile.BadZipFile("it has compressed members, which torch never writes")
        if sum(member.file_size for member in members) > min(max_bytes, 2 * path.stat().st_size):
            raise zipfile.BadZipFile("its members claim more bytes than they may have")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        for member in members:
            if member.filename.endswith(".pkl"):
                if member.file_size > MAX_PICKLE_BYTES:
                    raise zipfile.BadZipFile("its description is too long")
                _check_pickle(archive.read(member))


class _Bounded(io.FileIO):
    """A file that reads at most `most` bytes at once. zipfile reads the list of members whole, however long it is."""

    most = MAX_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.most:
            raise zipfile.BadZipFile("it has too many members")
        return super().read(-1 if size is None else size)


def _check_pickle(content: bytes) -> None:
    """Refuse a pickle that names more than tensors are made of, or that repeats a tuple."""
    previous = ""
    tuples = set()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if number > MAX_PICKLE_PARTS:
            raise pickle.UnpicklingError("it has too many parts")
        if not PICKLE_PARTS.fullmatch(name):
            raise pickle.UnpicklingError("it holds more than tensors and primitives")
        if name == "GLOBAL" and not TENSOR_PARTS.fullmatch(str(argument)):
            raise pickle.UnpicklingError(f"it names {reprlib.repr(argument)}")
        if name in ("BINPUT", "LONG_BINPUT") and previous.startswith("TUPLE"):
            tuples.add(argument)
        if name in ("BINGET", "LONG_BINGET") and argument in tuples:
            raise pickle.UnpicklingError("it repeats a tuple")
        previous = name
