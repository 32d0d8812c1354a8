"""A training update as one CUDA graph: recorded once, then launched as a whole.

An update of these small networks is a thousand kernels of a few microseconds each. Python cannot launch them as fast as a
GPU runs them. On a CPU, and with several processes, the update stays an ordinary call.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine import distributed

ORDINARY_CALLS = 3  # before the recording: they choose the kernels and create the optimizers' state


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage before the block, and not inside. An older graph that is destroyed there would spoil a recording."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Recording(NamedTuple):
    """A graph, the tensors that it reads its inputs from, and those that it leaves its results in."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    results: dict[str, Tensor]


class RecordedUpdate:
    """Calls `update(*inputs, variant)` -> tensors by name; on a GPU it replays a recording, one for each `variant`.

    What a recording needs of `update`:

    - decisions in Python depend on `variant` alone, and the inputs keep their shapes;
    - every other tensor that it reads keeps its place in memory, and nothing waits for the device;
    - random numbers come from `rng`, a generator on the device that is seeded before every call.

    The learning rates of the `optimizers`, which are capturable, may change between calls.
    """

    def __init__(
        self,
        update: Callable[..., dict[str, Tensor]],
        rng: torch.Generator,
        optimizers: dict[str, torch.optim.Optimizer],
    ):
        self.update = update
        self.rng = rng
        self.optimizers = optimizers
        self.active = rng.device.type == "cuda" and distributed.count() == 1
        self._calls: dict[Any, int] = {}
        self._recordings: dict[Any, Recording] = {}
        self._rates: list[Tensor] = []  # learning rates on the device, where the graphs read them
        # A stream of its own: PyTorch frees a stream's cuBLAS workspace with any graph recorded there (pytorch#193402)
        self._stream = torch.cuda.Stream(rng.device) if self.active else None

    def __call__(self, *inputs: Tensor, variant: Any = None) -> dict[str, Tensor]:
        if not self.active:
            return self.update(*inputs, variant)
        calls = self._calls[variant] = self._calls.get(variant, 0) + 1
        if calls <= ORDINARY_CALLS:
            return self._call(*inputs, variant)
        if variant not in self._recordings:
            self._recordings[variant] = self._record(*inputs, variant)
        recording = self._recordings[variant]
        for kept, given in zip(recording.inputs, inputs):
            kept.copy_(given)
        for rate, group in zip(self._rates, self._groups()):
            rate.fill_(group["lr"])
        recording.graph.replay()
        return {name: result.clone() for name, result in recording.results.items()}

    def _call(self, *arguments: Any) -> dict[str, Tensor]:
        """An ordinary call, on a side stream, as PyTorch requires before a recording."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = self.update(*arguments)
        torch.cuda.synchronize()
        return results

    def _record(self, *arguments: Any) -> Recording:
        *inputs, variant = arguments
        kept = tuple(tensor.clone() for tensor in inputs)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.rng)
        with no_garbage_collection(), self._rates_on_device(), torch.cuda.graph(graph, stream=self._stream):
            results = self.update(*kept, variant)
        return Recording(graph, kept, results)

    @contextlib.contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Learning rates as tensors: a Python number would be recorded with its present value."""
        groups = self._groups()
        numbers = [group["lr"] for group in groups]
        self._rates = self._rates or [torch.tensor(number, device=self.rng.device) for number in numbers]
        try:
            for group, rate in zip(groups, self._rates):
                group["lr"] = rate
            yield
        finally:
            for group, number in zip(groups, numbers):
                group["lr"] = number

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
