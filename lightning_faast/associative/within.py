"""The inverse of the penalized within-class scatter, from the eigenvalues of the total one."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

#: Smallest squared pivot of the small factorization at which its digits are still good; under it the large one is used.
_SMALLEST_PIVOT = 1e-6


class WithinInverse(Protocol):
    """A = (S_w + mu I)^-1 in the basis of the total scatter, r x r."""

    def times(self, columns: Tensor) -> Tensor:
        """A Y, of columns [r, k]."""
        ...

    def lengths(self, rows: Tensor) -> Tensor:
        """x^T A x of rows [R, r], [R]."""
        ...

    @property
    def trace(self) -> float:
        """Sum of the diagonal."""
        ...


def within_inverse(eigenvalues: Tensor, mu: float, means: Tensor, counts: Tensor, floor: float) -> WithinInverse:
    r"""A for :math:`S_w = \mathrm{diag}(\lambda) - \sum_c n_c m_c m_c^\top`.

    Args:
        eigenvalues: lambda [r] of the total scatter.
        mu: The ridge.
        means: Class means in the basis [r, c], relative to the grand mean.
        counts: n_c [c].
        floor: The rounding floor of the eigenvalues.

    Raises:
        ValueError: Where the penalized scatter is singular.
    """
    diagonal, scaled = eigenvalues + mu, means * counts.sqrt()
    if 2 * len(counts) < len(eigenvalues):
        low_rank = _LowRank.factorized(1 / diagonal, scaled)
        if low_rank is not None:
            return low_rank
    factor, info = torch.linalg.cholesky_ex(torch.diag(diagonal) - scaled @ scaled.T)
    if not int(info):
        inverse = torch.cholesky_inverse(factor)
        # The norm is at most sqrt(r) over the smallest eigenvalue, which is noise under the rounding floor.
        if float(inverse.norm()) * floor < math.sqrt(max(1, len(inverse))):
            return _Dense(inverse)
    raise ValueError(
        f"The within-class scatter is singular at ridge {mu:.3g}: use a larger Ridge, GCV(), or readout='regression'."
    )


class _LowRank:
    r"""A as a diagonal and a correction of rank c (Woodbury), so that few classes cost nothing beside a decomposition.

    With D = diag(1/(lambda + mu)), B = [sqrt(n_c) m_c] and K = I - B^T D B: A = D + D B K^-1 B^T D.
    """

    def __init__(self, diagonal: Tensor, projected: Tensor, factor: Tensor) -> None:
        self._diagonal = diagonal  # of D, [r]
        self._projected = projected  # D B, [r, c]
        self._factor = factor  # Cholesky factor of K, [c, c]

    @classmethod
    def factorized(cls, diagonal: Tensor, scaled: Tensor) -> _LowRank | None:
        """None where K is so near to singular that the difference in it has lost its digits."""
        projected = diagonal[:, None] * scaled
        small = torch.eye(scaled.shape[1]).to(scaled) - scaled.T @ projected
        factor, info = torch.linalg.cholesky_ex(small)
        if int(info) or float(factor.diagonal().min()) ** 2 < _SMALLEST_PIVOT:
            return None
        return cls(diagonal, projected, factor)

    def times(self, columns: Tensor) -> Tensor:
        inner = torch.cholesky_solve(self._projected.T @ columns, self._factor)
        return self._diagonal[:, None] * columns + self._projected @ inner

    def lengths(self, rows: Tensor) -> Tensor:
        inner = torch.linalg.solve_triangular(self._factor, (rows @ self._projected).T, upper=False)
        return rows.square() @ self._diagonal + inner.square().sum(0)

    @property
    def trace(self) -> float:
        inner = torch.linalg.solve_triangular(self._factor, self._projected.T, upper=False)
        return float(self._diagonal.sum() + inner.square().sum())


class _Dense:
    """A itself, where there are as many classes as dimensions."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix

    def times(self, columns: Tensor) -> Tensor:
        return self._matrix @ columns

    def lengths(self, rows: Tensor) -> Tensor:
        return ((rows @ self._matrix) * rows).sum(1)

    @property
    def trace(self) -> float:
        return float(self._matrix.trace())
