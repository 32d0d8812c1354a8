"""Device, precision, seeds and provenance.

torch is imported inside the functions, so that a script parses its arguments (and prints `--help`) without it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from files import UsageError, processes

if TYPE_CHECKING:
    import torch


# --------------------------------------------------------------------------------------------------------------------
# Device and precision


def choose_device(name: str = "auto", apple: bool = True) -> torch.device:
    """The torch device called `name`. `auto` is the CUDA GPU where there is one, else the CPU.

    `apple=False`: refuse Apple's GPUs.

    Raises:
        UsageError: the device does not exist on this machine.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{processes().local_rank}"  # each of torchrun's processes has its own GPU
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", *(["mps"] if apple else [])):
            raise RuntimeError(f"only cpu{', cuda and mps' if apple else ' and cuda'} are supported")
        if device.type != "mps":
            torch.zeros(1, device=device)
        elif not torch.backends.mps.is_available():
            raise RuntimeError("PyTorch finds no Apple GPU")
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here ({first_line}); try --device cpu") from error
    if device.type == "cpu":
        _keep_freed_memory()
    elif device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: figures are compared across devices
    return device


def scoring_device(device: torch.device) -> torch.device:
    """Where the samples of a model on `device` are scored. The metrics need float64, which Apple's GPUs do not have."""
    import torch

    return torch.device("cpu") if device.type == "mps" else device


def _keep_freed_memory() -> None:
    """Stop glibc from returning freed activations to the kernel, which would have to map their pages again a step later.

    Another system or C library (musl) has no such settings: its own policy stands.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # mallopt(3)
        mallopt(mmap_threshold, 32 * 2**20)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 256 * 2**20)


def ask_for_huge_pages() -> None:
    """Let torch ask Linux for pages of 2 MB, unless `THP_MEM_ALLOC_ENABLE` is set. Call it before the first tensor.

    The U-Net's step becomes a little faster and takes a fifth more memory at batch 128. The GANs' steps do not gain.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` becomes bf16 on a CUDA GPU that has it, and fp32 elsewhere. Errors as for `autocast`."""
    if name != "auto":
        autocast(device, name)
        return name
    return "bf16" if device.type == "cuda" and has_bf16(device) else "fp32"


@functools.cache
def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16. A CPU that does not tell (torch 2.10) counts as having them."""
    import torch

    if device.type == "mps":
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return not capabilities or any("bf16" in name and has for name, has in capabilities.items())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bfloat16 for `precision='bf16'`; a context that does nothing for `fp32`.

    Raises:
        UsageError: bf16 on an Apple GPU, where nobody has tried it.
    """
    import torch

    if precision == "bf16" and device.type == "mps":
        raise UsageError("an Apple GPU computes in fp32 here; give --precision fp32")
    if precision == "bf16" and not has_bf16(device):
        _note_emulation(device.type)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@functools.cache
def _note_emulation(kind: str) -> None:
    """Say once that bf16 is slow here: on a CPU, an emulated convolution can take a hundred times as long."""
    print(f"note: this {kind} has no bf16 instructions: --precision fp32 can be many times faster", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------------------
# Seeds


def make_deterministic() -> None:
    """Ask PyTorch for deterministic kernels. On CUDA this costs speed; on a CPU the kernels are deterministic anyway."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def keyed_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator on `device`, seeded by `key` alone, such as (seed, "noise", step).

    A run that resumes at step 1000 draws what an uninterrupted run would draw there. No random state has to be saved.
    """
    import torch

    return reseeded(torch.Generator(device), *key)


def reseeded(generator: torch.Generator, *key: int | str) -> torch.Generator:
    """The same generator, set to the beginning of the sequence of `keyed_generator` with that key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sampling_rng(seed: int) -> torch.Generator:
    """The generator that every script samples with: the same model, seed, labels and options mean the same pictures."""
    return keyed_generator("cpu", seed, "samples")


def sampling_key(rng: torch.Generator | None) -> int:
    """The one number that a call of `sample` draws from `rng`. None: torch's global generator."""
    import torch

    return int(torch.randint(2**62, (), generator=rng))


NOISE_BLOCK = 32  # images that share a generator: enough to be fast, few enough that a single image wastes little


class SamplingNoise:
    """The random numbers of one call of `sample`. Those of image i depend on the key and on i, not on the other images.

    Args:
        key: of the call; `purpose` tells several streams of one call apart.
        images: the numbers of the images, a range of step 1.
        device: where the numbers are drawn. Another device draws other numbers.
    """

    def __init__(self, key: int, purpose: str, images: range, device: torch.device | str):
        blocks = range(images.start // NOISE_BLOCK, -(-images.stop // NOISE_BLOCK))
        self.device = device
        self.generators = [keyed_generator(device, key, purpose, block) for block in blocks]
        first = images.start % NOISE_BLOCK
        self.rows = slice(first, first + len(images))

    def normal(self, *shape: int) -> torch.Tensor:
        """The next standard normal numbers, float32 [images, *shape]."""
        import torch

        numbers = torch.empty(len(self.generators) * NOISE_BLOCK, *shape, dtype=torch.float32, device=self.device)
        for block, generator in zip(numbers.split(NOISE_BLOCK), self.generators):
            block.normal_(generator=generator)
        return numbers[self.rows]

    def integers(self, below: int) -> torch.Tensor:
        """The next uniform integers in 0..below-1, int64 [images]."""
        import torch

        numbers = torch.empty(len(self.generators) * NOISE_BLOCK, dtype=torch.int64, device=self.device)
        for block, generator in zip(numbers.split(NOISE_BLOCK), self.generators):
            block.random_(below, generator=generator)
        return numbers[self.rows]


# --------------------------------------------------------------------------------------------------------------------
# Provenance


def provenance() -> dict[str, str]:
    """Versions of Python and torch, and the commit of the code (`-dirty` with local changes; `unknown` outside git)."""
    import platform

    import torch

    return {"python": platform.python_version(), "torch": str(torch.__version__), "git": _git_commit()}


def _git_commit() -> str:
    here = Path(__file__).resolve().parent
    if not (here / ".git").exists():  # a copy inside of somebody else's repository: not that one's commit
        return "unknown"
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
