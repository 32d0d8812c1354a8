"""Muon: descent along a momentum whose matrices are made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

torch.optim.Muon takes only matrices, one by one, always in bfloat16, and the guard cannot hold it back. This one also takes
convolutions, and updates many matrices at once.
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
            directions = torch._foreach_lerp(gradients, averages, group["momentum"])
            matrices = [_wide(direction) for direction in directions]
            for numbers in _batches(matrices, together=any(weight.is_cuda for weight in weights)):
                batch = _padded([matrices[i] for i in numbers], self.dtype)
                for i, update in zip(numbers, orthogonal(batch).float() * -step_size):
                    rows, columns = matrices[i].shape
                    _wide(weights[i]).add_(update[:rows, :columns], alpha=columns**0.5)

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


def _wide(tensor: Tensor) -> Tensor:
    """A tensor [rows, ...] as a matrix with no more rows than columns, without a copy.

    Its columns stand in the order of the memory, channels last or not. That order does not matter to orthogonality.
    """
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    matrix = tensor.view(len(tensor), -1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _batches(matrices: list[Tensor], together: bool) -> Iterable[list[int]]:
    """The numbers of the matrices that are made orthogonal together: those of one shape, or all.

    All together is 4 times the arithmetic, and a tenth of the kernels. That is faster on a GPU, and slower on a CPU.
    """
    groups = defaultdict(list)
    for i, matrix in enumerate(matrices):
        groups[None if together else matrix.shape].append(i)
    return groups.values()


def _padded(matrices: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Matrices of any shapes as one tensor [n, rows, columns]. Their zeros stay zeros in `orthogonal`."""
    rows, columns = (max(sizes) for sizes in zip(*(matrix.shape for matrix in matrices)))
    batch = matrices[0].new_zeros(len(matrices), rows, columns, dtype=dtype)
    for place, matrix in zip(batch, matrices):
        place[: matrix.shape[0], : matrix.shape[1]] = matrix
    return batch
