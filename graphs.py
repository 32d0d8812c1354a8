"""A training step as one CUDA graph: recorded once, then launched as a whole.

A step of these small networks is a thousand kernels of a few microseconds each, which Python cannot launch as fast as a
GPU runs them. Everywhere else, and of several processes, a step stays the call that it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import distributed

ORDINARY_CALLS = 3  # before the recording: they choose the kernels and make the optimizers' state


class Recording(NamedTuple):
    """A graph, the tensors that it reads its inputs from, and those that it leaves its results in."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    results: dict[str, Tensor]


class Replayed:
    """`update(*inputs, variant)` -> tensors by name, on a GPU replayed from a recording: each `variant` from one of its own.

    So whatever the host decides must depend on the variant alone; the inputs keep their shapes; any other tensor that is
    read stays where it is; nothing waits for the device; random numbers come from `rng`, a generator on the device that is
    seeded before every call. The learning rates of the `optimizers`, which are capturable ones, may change between calls.
    """

    def __init__(
        self,
        update: Callable[..., dict[str, Tensor]],
        rng: torch.Generator,
        optimizers: dict[str, torch.optim.Optimizer],
    ):
        self.update, self.rng, self.optimizers = update, rng, optimizers
        self.active = rng.device.type == "cuda" and distributed.count() == 1
        self._calls: dict[Any, int] = {}
        self._recordings: dict[Any, Recording] = {}
        self._rates: list[Tensor] = []  # on the device, where the graphs read them
        # Its own: newer versions of PyTorch free a stream's cuBLAS workspace with any graph recorded there (pytorch#193402)
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
        """The ordinary call, on a stream of its own, as PyTorch wants the calls before a recording."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = self.update(*arguments)
        torch.cuda.synchronize()
        return results

    def _record(self, *arguments: Any) -> Recording:
        *inputs, variant = arguments
        kept, graph = tuple(tensor.clone() for tensor in inputs), torch.cuda.CUDAGraph()
        graph.register_generator_state(self.rng)
        with self._rates_on_device(), torch.cuda.graph(graph, stream=self._stream):
            results = self.update(*kept, variant)
        return Recording(graph, kept, results)

    @contextlib.contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """A number would be recorded as what it is now."""
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
