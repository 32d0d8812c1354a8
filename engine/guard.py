"""Updates that a number that is not finite cannot get through, decided on the device: nothing waits for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine import distributed


class Guard:
    """Skips an optimizer's step where the loss or the gradient is not finite.

    The decision is a flag on the device, which fused optimizers heed. The networks' buffers (BatchNorm's statistics), which
    the forward pass has changed already, are restored. The loss is returned as nan, so whoever fetches it sees the bad step.

        guard.keep(); for each loss: forward, backward, guard.step(...); guard.restore()
    """

    def __init__(self, *networks: nn.Module):
        self._buffers = [buffer for network in networks for buffer in network.buffers()]
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._finite: Tensor | None = None

    def keep(self) -> None:
        """Remember the buffers, at the beginning of an update."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)
        self._finite = None

    def step(self, loss: Tensor, norm: Tensor, *optimizers: torch.optim.Optimizer) -> Tensor:
        """Take the optimizers' step if `loss` and the gradient's `norm`, scalars on the device, are finite.

        Returns:
            The loss, detached; nan where the step was skipped.

        Raises:
            ValueError: an optimizer would not heed the flag. Fused optimizers of torch do, and `Muon`.
        """
        if not all(o.defaults.get("fused") or getattr(o, "heeds_found_inf", False) for o in optimizers):
            raise ValueError("only a fused optimizer can be held back; give it fused=True")
        finite = loss.isfinite() & norm.isfinite()
        for optimizer in optimizers:
            optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]  # torch.amp's flag: 1 skips the step
            if not _ignores_flag(finite.device) or finite:
                optimizer.step()
        self._finite = finite if self._finite is None else self._finite & finite
        return torch.where(finite, loss.detach(), torch.nan)

    def restore(self) -> None:
        """Restore the buffers if a step was skipped, at the end of an update.

        Each of several processes has seen its own share of the batch, so BatchNorm's statistics are averaged over them.
        """
        assert self._finite is not None, "a step comes before"
        for kept, buffer in zip(self._kept, self._buffers):
            buffer.copy_(torch.where(self._finite, buffer, kept))
        distributed.average([buffer for buffer in self._buffers if buffer.is_floating_point()])


def _ignores_flag(device: torch.device) -> bool:
    """Whether fused optimizers ignore the flag, so that the update waits for it (Apple GPUs: pytorch#186360)."""
    return device.type == "mps"


def average_over_processes(loss: Tensor, *optimizers: torch.optim.Optimizer) -> Tensor:
    """Average loss and gradients over the processes, if there are several, in one message. Returns the detached loss.

    A number that is not finite in one process is then not finite in all of them.
    """
    loss = loss.detach()
    distributed.average([loss, *_gradients(optimizers)])
    return loss


def gradient_norm(*optimizers: torch.optim.Optimizer) -> Tensor:
    """The 2-norm of the gradient of everything that the optimizers train, a scalar on the device."""
    return torch.nn.utils.get_total_norm(_gradients(optimizers), foreach=True)


def clip_gradients(max_norm: float, *optimizers: torch.optim.Optimizer) -> Tensor:
    """Scale the whole gradient down to `max_norm` where it is larger (0: no bound). Returns its norm before."""
    norm = gradient_norm(*optimizers)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(_parameters(optimizers), max_norm, norm, foreach=True)
    return norm


def _parameters(optimizers: tuple[torch.optim.Optimizer, ...]) -> list[Tensor]:
    return [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]


def _gradients(optimizers: tuple[torch.optim.Optimizer, ...]) -> list[Tensor]:
    return [parameter.grad for parameter in _parameters(optimizers) if parameter.grad is not None]
