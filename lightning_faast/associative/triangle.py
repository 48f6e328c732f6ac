"""Symmetric matrices as packed lower triangles."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_triangle(matrix: Tensor) -> Tensor:
    """The lower triangle of a symmetric [d, d] matrix, row by row, [d(d+1)/2]."""
    return matrix[torch.ones_like(matrix, dtype=torch.bool).tril_()]


def unpack_triangle(packed: Tensor, d: int) -> Tensor:
    """The symmetric float64 [d, d] matrix of a packed lower triangle.

    Raises:
        ValueError: Where the length is not d(d+1)/2.
    """
    if packed.shape != (d * (d + 1) // 2,):
        raise ValueError(f"A packed triangle of width {d} has {d * (d + 1) // 2} entries, got {tuple(packed.shape)}.")
    matrix = torch.zeros(d, d, dtype=torch.float64, device=packed.device)
    matrix[torch.ones_like(matrix, dtype=torch.bool).tril_()] = packed.to(torch.float64)
    return matrix + matrix.tril(-1).T
