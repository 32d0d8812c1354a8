"""Updates that no bad number gets through, without waiting for the device to say so."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import distributed


class Guard:
    """Holds back an update of which the loss or the gradient is not finite.

    Whether it is, is decided on the device: a flag keeps the fused optimizer from its step, and the networks' buffers
    (BatchNorm's statistics, which the forward pass has touched already) are put back. The loss is then returned as nan, so
    that whoever fetches it sees that this step was bad. A step is

        guard.keep(); forward passes and `guard.update`, once for each loss; guard.restore()

    where the last of them is not needed without buffers.
    """

    def __init__(self, *networks: nn.Module):
        self._buffers = [buffer for network in networks for buffer in network.buffers()]
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._good: Tensor | None = None

    def keep(self) -> None:
        """Remember the buffers: at the beginning of a step."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)
        self._good = None

    def update(self, loss: Tensor, *optimizers: torch.optim.Optimizer, clip: float = 0.0) -> Tensor:
        """Backward pass, clipping of the whole gradient to the norm `clip` (0: no bound), and step of fused `optimizers`.

        Gradient and loss are averaged over the processes, if there are several: what is not finite in one, is so in all.
        Returns the loss, detached; nan where the update was held back.

        Raises:
            ValueError: an optimizer is not a fused one, which alone can be held back.
        """
        if not all(optimizer.defaults.get("fused") for optimizer in optimizers):
            raise ValueError("only a fused optimizer can be held back")
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        loss = loss.detach()
        distributed.average([loss, *(p.grad for p in parameters)])
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm, foreach=True)
        good = loss.isfinite() & norm.isfinite()
        for optimizer in optimizers:
            optimizer.found_inf = 1 - good.float()  # a flag of torch.amp's: where it is 1, a fused step changes nothing
            optimizer.step()
        self._good = good if self._good is None else self._good & good
        return torch.where(good, loss, torch.nan)

    def restore(self) -> None:
        """Put the buffers back if an update was held back: at the end of a step.

        Of several processes, each has seen its share of the batch: BatchNorm's statistics are averaged over them.
        """
        for kept, buffer in zip(self._kept, self._buffers):
            buffer.copy_(torch.where(self._good, buffer, kept))
        distributed.average([buffer for buffer in self._buffers if buffer.is_floating_point()])
