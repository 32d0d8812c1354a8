"""Muon: descent along a momentum whose matrices are made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

torch.optim.Muon takes only matrices, one by one, always in bfloat16, and the guard cannot hold it back. This one also takes
convolutions, and updates all matrices of one shape at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: steep at zero, so that small singular values grow fast
RMS = 0.2  # root mean square of an update, in learning rates: about Adam's (Liu et al. 2025, arXiv 2502.16982, section 2.2)


class Muon(torch.optim.Optimizer):
    """An optimizer for the matrices [rows, columns] and convolutions [rows, ...] between a network's first and last layer.

    Args:
        lr: learning rate. The root mean square of an update's entries is a fifth of it, whatever the shape.
        momentum: share of the old average in the new one, in [0, 1). The update looks ahead (Nesterov).
        precision: of the iteration, `fp32` or `bf16`. bf16 is exact enough, and faster where the device has it.

    Raises:
        ValueError: a parameter with fewer than two dimensions.
    """

    heeds_found_inf = True  # see Guard.step

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, precision: str = "fp32"):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        if any(p.ndim < 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon is for matrices and convolutions; leave vectors and scalars to Adam")

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: Guard calls it after the backward pass
        """One update; none where `found_inf`, a flag on the device that Guard sets, is 1."""
        held_back = getattr(self, "found_inf", None)
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            averages = [self._average(p) for p in weights]
            gradients = [p.grad for p in weights]
            step_size = RMS * group["lr"]
            if held_back is not None:
                gradients = [torch.where(held_back > 0, m, g) for m, g in zip(averages, gradients)]  # averages stay
                step_size = step_size * (1 - held_back)
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            directions = list(torch._foreach_lerp(gradients, averages, group["momentum"]))
            for same in _by_shape(weights, directions):
                matrices = torch.stack([direction.flatten(1) for _, direction in same])
                updates = orthogonal(matrices.to(self.dtype)).float() * (-step_size * max(matrices.shape[1:]) ** 0.5)
                for (weight, _), update in zip(same, updates):
                    weight.add_(update.reshape(weight.shape))

    def _average(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def orthogonal(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> the same shape: the singular vectors are kept, the singular values are brought near to 1.

    A Newton-Schulz iteration, which needs only matrix products. Singular values end between 0.7 and 1.2, except those
    that are tiny beside the largest one of their matrix.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-20)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x if wide is matrices else x.mT


def _by_shape(weights: list[Tensor], directions: list[Tensor]) -> Iterable[list[tuple[Tensor, Tensor]]]:
    groups = defaultdict(list)
    for weight, direction in zip(weights, directions):
        groups[weight.shape].append((weight, direction))
    return groups.values()
