"""Self-describing model files and resumable training state: plain tensors and primitives, read without unpickling code.

A model file is `{"format", "model", "config", "weights", "meta"}`; a training file is `{"format", "training", ...}`.
Both are torch ZIP files, read with `weights_only=True` after their container was checked. Equal runs give equal model files:
nothing in those names a path or a time.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import pickletools
import re
import reprlib
import sys
import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from models import build
from utils import ExpectedError, atomic_path, say

FORMAT = 1
MAX_MODEL_BYTES = 256 * 2**20  # far above every model of this project: bounds what a hostile file can allocate
MAX_TRAINING_BYTES = 8 * 2**30
MAX_DIRECTORY_BYTES = 2**20  # of the ZIP's list of members: ten thousand tensors
MAX_PICKLE_BYTES = 2**25
MAX_PICKLE_PARTS = 2 * 10**6  # the log of 30,000 epochs: read in seconds
TENSOR_PARTS = re.compile(r"torch._utils _rebuild_tensor_v2|collections OrderedDict|torch [A-Za-z0-9]+Storage")
PICKLE_PARTS = re.compile(  # of pickle's protocol 2, as torch.save writes it
    "PROTO|STOP|MARK|NONE|NEWTRUE|NEWFALSE|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|EMPTY_(DICT|LIST|TUPLE)|SETITEMS?|APPENDS?|"
    "TUPLE[123]?|(LONG_)?BIN(PUT|GET)|GLOBAL|REDUCE|BINPERSID"
)
RANDOM_FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_)


def save_model(path: str | os.PathLike, name: str, model: nn.Module, meta: dict, half: bool = True) -> None:
    """Write `model` as a self-describing file; `half` stores its floating-point weights in float16.

    Raises:
        ExpectedError: a weight is not finite (the file on disk is kept), or the file cannot be written.
    """
    weights = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    for key, value in weights.items():
        if value.is_floating_point():
            weights[key] = value.half() if half else value
            if not torch.isfinite(weights[key]).all():
                raise ExpectedError(f"weight {key!r} of {name} is not finite, so {path} was not written; lower --lr")
    config = {field: getattr(model.config, field) for field in model.config.__dataclass_fields__}
    content = {"format": FORMAT, "model": name, "config": config, "weights": weights, "meta": meta}
    write_tensors(path, content)


def load_generator(path: str | os.PathLike, device: torch.device | str = "cpu") -> nn.Module:
    """The generator in a checkpoint, in eval mode on `device`: any model that can be sampled, no architecture flags.

    The network has `.model_name` and `.meta` as they stand in the file.

    Raises:
        ExpectedError: the file is missing, damaged, of another kind, or does not fit the model that it names.
    """
    model = load_model(path, device)
    if not hasattr(model, "sample"):
        raise ExpectedError(f"{path} holds a {model.model_name}, which cannot be sampled; give a generator's file (…_G.pt)")
    return model


def load_model(path: str | os.PathLike, device: torch.device | str = "cpu") -> nn.Module:
    """Any model of the registry, in eval mode on `device`, in float32; errors as for `load_generator`."""
    content = read_tensors(path, MAX_MODEL_BYTES)
    if not has_format(content, {"model", "config", "weights", "meta"}):
        raise ExpectedError(f"{path} is not a model checkpoint of format {FORMAT}; it may be another program's")
    name, config, weights = content["model"], content["config"], content["weights"]
    try:
        if not isinstance(name, str) or not all(isinstance(content[part], dict) for part in ("config", "weights", "meta")):
            raise ValueError("its entries have the wrong types")
        with torch.device("meta"), _NoInitialisation():  # checks names and shapes before any memory is taken
            _check_weights(build(name, **config).state_dict(), weights)
        model = build(name, **config)
        model.load_state_dict(weights)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ExpectedError(f"{path} does not fit its model ({error}); train or download it again") from error
    model.model_name, model.meta = name, content["meta"]
    return model.to(device).eval()


def write_tensors(path: str | os.PathLike, content: dict) -> None:
    """Write a dict of tensors and primitives atomically; equal content gives equal bytes."""
    buffer = io.BytesIO()  # a stream, not a path: torch would write the file's name into the archive
    torch.save(_with_shared_strings(content), buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _with_shared_strings(value: object) -> object:
    """The same content with one object for equal strings: pickle writes an object's repetition as a reference."""
    if isinstance(value, dict):
        return {_with_shared_strings(key): _with_shared_strings(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_with_shared_strings, value))
    return sys.intern(value) if type(value) is str else value


def read_tensors(path: str | os.PathLike, max_bytes: int = MAX_TRAINING_BYTES) -> dict:
    """The dict in a file written by `write_tensors`, on the CPU; never runs code from the file.

    Raises:
        ExpectedError: the file is missing, no torch ZIP file, damaged (CRC), too large, or holds anything but a dict
            of tensors and primitives.
    """
    path = Path(path)
    if not path.is_file():
        raise ExpectedError(f"{path} does not exist (or is no file); train the model first, or give another path")
    try:
        _check_container(path, max_bytes)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can make the reader raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ExpectedError(f"{path} is damaged or no checkpoint ({reason}); train or download it again") from error
    if not isinstance(content, dict):
        raise ExpectedError(f"{path} is no checkpoint of this project: it holds a {type(content).__name__}")
    return content


def has_format(content: dict, entries: set[str]) -> bool:
    """Whether a file's content is of this version's format and has these entries."""
    return type(content.get("format")) is int and content["format"] == FORMAT and entries <= content.keys()


def keep_previous(path: Path) -> None:
    """Before a new run replaces `path`: keep what is there as `….previous.pt`, and say so."""
    if path.exists():
        previous = path.with_suffix(f".previous{path.suffix}")
        with atomic_path(previous) as temporary:
            temporary.write_bytes(path.read_bytes())
        say(f"this run will replace {path}; what is there is kept as {previous}")


def file_sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _check_container(path: Path, max_bytes: int) -> None:
    """Refuse what torch.load would trust: compressed (hence possibly exploding) or oversized members, wrong CRCs, and a
    pickle of anything but tensors and primitives."""
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
    """A file that gives no more than `most` bytes at once: zipfile reads a list of members whole, however long it is."""

    most = MAX_DIRECTORY_BYTES

    def read(self, size: int = -1) -> bytes:
        if size > self.most:
            raise zipfile.BadZipFile("it has too many members")
        return super().read(size)


def _check_pickle(content: bytes) -> None:
    """Refuse a pickle that names more than tensors are made of, or repeats a tuple.

    torch's own reader runs no code, but it would still make a bytearray of any size, and hash tuples of tuples that
    repeat each other, which takes exponential time.
    """
    previous, tuples = "", set()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if number > MAX_PICKLE_PARTS:
            raise pickle.UnpicklingError("it has too many parts")
        if not PICKLE_PARTS.fullmatch(name):
            raise pickle.UnpicklingError("it holds more than tensors and primitives")
        if name == "GLOBAL" and not TENSOR_PARTS.fullmatch(argument):
            raise pickle.UnpicklingError(f"it names {reprlib.repr(argument)}")
        if name in ("BINPUT", "LONG_BINPUT") and previous.startswith("TUPLE"):
            tuples.add(argument)
        if name in ("BINGET", "LONG_BINGET") and argument in tuples:
            raise pickle.UnpicklingError("it repeats a tuple")
        previous = name


class _NoInitialisation(TorchFunctionMode):
    """Parameters stay as they are made: random numbers on the meta device would import torch's compiler, 1.6 seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init" or function in RANDOM_FILLS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _check_weights(expected: dict, weights: dict) -> None:
    """`ValueError` unless `weights` has the expected names, shapes and kinds, and only finite numbers."""
    if missing := sorted(expected.keys() - weights.keys()):
        raise ValueError(f"weights missing: {', '.join(missing[:3])}")
    if extra := sorted(map(str, weights.keys() - expected.keys())):
        raise ValueError(f"unknown weights: {', '.join(extra[:3])}")
    for key, like in expected.items():
        check_tensor(f"weight {key}", like, weights[key])


def check_tensor(name: str, like: torch.Tensor, value: object) -> None:
    """`ValueError` unless `value` is a tensor of the shape and kind of `like`, with finite numbers of its own."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.shape != like.shape:
        raise ValueError(f"{name} must be a tensor of shape {list(like.shape)}")
    if value.is_floating_point() != like.is_floating_point() or value.is_complex():
        raise ValueError(f"{name} has type {value.dtype}")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise ValueError(f"{name} repeats its numbers")
    if not torch.isfinite(value.to(like.dtype)).all():
        raise ValueError(f"{name} is not finite")
