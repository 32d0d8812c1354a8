"""What happens beside the training steps: EMA, FID monitor, early stopping, learning rate, checkpoints, GIF, CSV, bar."""

from __future__ import annotations

import copy

import torch
from torch import nn

from training import Callback, TrainState


class EMA(Callback):
    """Exponential moving average of a network's weights and buffers, in `self.model` (eval mode).

    The decay warms up as min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten. BatchNorm's
    running statistics are averaged too: with parameters alone, `running_mean` and `running_var` would keep their
    initial values (0 and 1) and the averaged network would be another function.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.source, self.decay = model, decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._pairs = _tensors(self.model), _tensors(model)

    @torch.no_grad()
    def after_step(self, state: TrainState) -> None:
        decay = min(self.decay, (1 + state.step) / (10 + state.step))
        (averages, counters), (values, counts) = self._pairs
        torch._foreach_lerp_(averages, values, 1 - decay)
        for counter, count in zip(counters, counts):
            counter.copy_(count)

    def state_dict(self) -> dict:
        return self.model.state_dict()

    def load_state_dict(self, saved: dict) -> None:
        self.model.load_state_dict(saved)


def _tensors(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The floating-point tensors of a network's state, and its integer ones (BatchNorm's counters)."""
    tensors = [*model.parameters(), *model.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
