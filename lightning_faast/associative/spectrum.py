"""One eigendecomposition, from which every regularization and read-out is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_faast.associative.precision import UNIT_ROUNDOFF
from lightning_faast.associative.statistics import SufficientStatistics


@dataclass(frozen=True)
class Spectrum:
    r"""Eigenvectors of the (centred) Gram matrix and what of the values lies along them, all float64.

    With :math:`G = U\,\mathrm{diag}(\lambda) U^\top`, every solution is
    :math:`W^\top = U\,\mathrm{diag}(f)\,U^\top C` for some filter f: :math:`1/(\lambda+\mu)` for ridge, and
    :math:`1/\lambda` above a threshold for the truncated pseudoinverse. Eigenvalues under the rounding floor are
    noise and are dropped.

    Attributes:
        basis: U, [d, r], orthonormal columns.
        eigenvalues: [r], descending, all above ``floor``.
        projected: U^T C, [r, c], of the centred cross products where ``centered``.
        key_mean: [d]; zeros where not centred.
        value_mean: [c]; zeros where not centred.
        count: n.
        value_trace: tr(V^T V), of the centred values where ``centered``.
        floor: The rounding floor, max(d, 4 sqrt(n)) 2^-53 times the largest eigenvalue before centring: what the sums
            of n rows and the decomposition of a d x d matrix can be wrong by.
        dropped: Frobenius norm of the part of U^T C along the eigenvalues that were dropped.
        centered: Whether a bias is fitted, by exact centring (never by a penalised column).
    """

    basis: Tensor
    eigenvalues: Tensor
    projected: Tensor
    key_mean: Tensor
    value_mean: Tensor
    count: float
    value_trace: float
    floor: float
    dropped: float
    centered: bool

    @classmethod
    def from_statistics(cls, statistics: SufficientStatistics, *, centered: bool) -> Spectrum:
        """From the sums alone: d x d, whatever N was."""
        n = statistics.count
        gram, cross = statistics.lower_gram, statistics.cross  # eigh reads no more of it
        trace = statistics.value_trace
        key_mean, value_mean, scale = _means(statistics, centered)
        if centered:
            gram = torch.addr(gram, key_mean, key_mean, alpha=-n)
            cross = torch.addr(cross, key_mean, value_mean, alpha=-n)
            trace = max(0.0, trace - n * float(value_mean @ value_mean))
        # |G_ij|^2 <= G_ii G_jj: where the diagonal is finite, all of it is.
        if not bool(gram.diagonal().sum().isfinite() & cross.sum().isfinite()):
            raise ValueError("The sums have overflowed: scale the keys and values down.")
        eigenvalues, basis = torch.linalg.eigh(gram, UPLO="L")
        eigenvalues, basis = eigenvalues.flip(0), basis.flip(1)
        floor = _floor(gram.shape[0], n, eigenvalues, scale)
        kept = int((eigenvalues > floor).sum())
        dropped = float((basis[:, kept:].T @ cross).norm())
        basis = basis[:, :kept]
        return cls(basis, eigenvalues[:kept], basis.T @ cross, key_mean, value_mean, n, trace, floor, dropped, centered)

    @classmethod
    def from_rows(
        cls, statistics: SufficientStatistics, keys: Tensor, values: Tensor, weights: Tensor, *, centered: bool
    ) -> Spectrum:
        """From the rows themselves by the dual form, N x N: cheaper than d x d where N is well under d.

        Args:
            statistics: The sums of exactly these rows.
            keys: [N, d].
            values: Labels [N] or values [N, c].
            weights: [N].
            centered: As in the class.
        """
        key_mean, value_mean, scale = _means(statistics, centered)
        device = key_mean.device
        root = weights.to(device, torch.float64).sqrt()[:, None]
        rows = (keys.to(device, torch.float64) - key_mean) * root
        eigenvalues, left = torch.linalg.eigh(rows @ rows.T)
        eigenvalues, left = eigenvalues.flip(0), left.flip(1)
        floor = _floor(keys.shape[1], statistics.count, eigenvalues, scale)
        kept = int((eigenvalues > floor).sum())
        eigenvalues, left = eigenvalues[:kept], left[:, :kept]
        basis = rows.T @ (left / eigenvalues.sqrt())
        centred_values = (as_dense(values.to(device), value_mean.shape[0]) - value_mean) * root
        projected = eigenvalues.sqrt()[:, None] * (left.T @ centred_values)
        dropped = 0.0 if kept >= len(rows) - int(centered) else floor**0.5 * float(centred_values.norm())
        trace = float(centred_values.square().sum())
        n = statistics.count
        return cls(basis, eigenvalues, projected, key_mean, value_mean, n, trace, floor, dropped, centered)

    @property
    def rank(self) -> int:
        """Number of eigenvalues above the rounding floor, r."""
        return len(self.eigenvalues)

    @property
    def largest(self) -> float:
        """The largest eigenvalue, 0 where there is none."""
        return float(self.eigenvalues[0]) if self.rank else 0.0

    @property
    def full(self) -> bool:
        """Whether nothing was dropped that the data may hold: r = d, or a map through every training row exists."""
        return self.rank == self.basis.shape[0] or self.interpolates

    @property
    def interpolates(self) -> bool:
        """Whether a map through every training row exists: r = n - 1 with a bias, r = n without."""
        return self.rank >= round(self.count) - int(self.centered)

    def coordinates(self, keys: Tensor) -> Tensor:
        """Centred keys in the basis, [R, d] -> [R, r]."""
        return (keys.to(self.basis) - self.key_mean) @ self.basis


def as_dense(values: Tensor, columns: int) -> Tensor:
    """Values as float64 [N, c]: labels as one-hot rows (small sets of rows only)."""
    if values.ndim == 2:
        return values.to(torch.float64)
    return torch.nn.functional.one_hot(values.long(), columns).to(torch.float64)


def _means(statistics: SufficientStatistics, centered: bool) -> tuple[Tensor, Tensor, float]:
    """Means of keys and values (zeros where not centred), and the squared mean's part of the Gram's scale."""
    n = statistics.count
    if not n > 0:
        raise RuntimeError("No rows were seen: there is nothing to solve. Call update(keys, values) or fit first.")
    if not centered:
        return torch.zeros_like(statistics.key_sum), torch.zeros_like(statistics.value_sum), 0.0
    key_mean = statistics.key_sum / n
    return key_mean, statistics.value_sum / n, n * float(key_mean @ key_mean)


def _floor(d: int, n: float, eigenvalues: Tensor, mean_scale: float) -> float:
    roundings = max(d, 4 * math.sqrt(n))
    floor = roundings * UNIT_ROUNDOFF * (max(0.0, float(eigenvalues[0])) + mean_scale)
    return max(floor, torch.finfo(torch.float64).tiny)
