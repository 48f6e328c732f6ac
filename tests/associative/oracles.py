"""Independent answers in NumPy and SciPy, and the data the tests of the mathematics share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_faast.associative import Spectrum, SufficientStatistics

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "vision_readers.safetensors"
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="golden vectors are not here")

#: Few rows, many rows, as many rows as columns.
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 12))


def blobs(n: int, d: int, c: int, *, seed: int = 0, spread: float = 1.0, dtype: torch.dtype = torch.float64):
    """Keys around class means, with labels that hold every class at least twice."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(c, d, generator=generator, dtype=torch.float64)
    labels = torch.randint(c, (n,), generator=generator)
    labels[: 2 * c] = torch.arange(2 * c) % c
    keys = spread * means[labels] + torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.5
    return keys.to(dtype), labels


def multi_hot(n: int, d: int, c: int, *, seed: int = 0):
    """Keys and 0/1 values, several ones a row."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64)
    directions = torch.randn(d, c, generator=generator, dtype=torch.float64)
    values = (keys @ directions + torch.randn(n, c, generator=generator, dtype=torch.float64) > 0.3).long()
    values[0], values[1] = 0, 1
    return keys, values


def with_spectrum(n: int, d: int, condition: float, *, seed: int = 0) -> Tensor:
    """Keys whose singular values fall geometrically from 1 to 1/condition."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((n, d)))
    right, _ = np.linalg.qr(rng.standard_normal((d, d)))
    return torch.from_numpy(left * np.geomspace(1, 1 / condition, d) @ right.T * n**0.5)


def one_hot(labels: Tensor, columns: int | None = None) -> Tensor:
    return torch.nn.functional.one_hot(labels, columns or -1).double()


def statistics_of(keys: Tensor, values: Tensor, weights: Tensor | None = None, **sizes: int) -> SufficientStatistics:
    return SufficientStatistics(**sizes).update(keys, values, weights)


def spectrum_of(keys: Tensor, values: Tensor, weights: Tensor | None = None, *, centered=True, dual=False) -> Spectrum:
    statistics = statistics_of(keys, values, weights)
    if not dual:
        return Spectrum.from_statistics(statistics, centered=centered)
    weights = torch.ones(len(keys)) if weights is None else weights
    return Spectrum.from_rows(statistics, keys, values, weights, centered=centered)


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius distance relative to what is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm()) / (float(expected.norm()) or 1.0)


def svd_solution(keys: Tensor, values: Tensor, rtol: float) -> Tensor:
    """W of the truncated pseudoinverse, by a float64 SVD of the keys themselves."""
    return (torch.linalg.pinv(keys.double(), rtol=rtol) @ values.double()).T


def ridge_solution(keys: Tensor, values: Tensor, mu: float, *, bias: bool) -> tuple[Tensor, Tensor]:
    """W and b of a ridge by least squares on stacked rows: no Gram matrix anywhere."""
    keys, values = keys.double(), values.double()
    key_mean, value_mean = (keys.mean(0), values.mean(0)) if bias else (keys.mean(0) * 0, values.mean(0) * 0)
    d, c = keys.shape[1], values.shape[1]
    stacked = torch.cat([keys - key_mean, mu**0.5 * torch.eye(d, dtype=torch.float64)])
    targets = torch.cat([values - value_mean, torch.zeros(d, c, dtype=torch.float64)])
    weight = torch.from_numpy(np.linalg.lstsq(stacked.numpy(), targets.numpy(), rcond=None)[0]).T
    return weight, value_mean - weight @ key_mean


def hat_matrix_gcv(keys: Tensor, values: Tensor, mu: float, *, bias: bool) -> float:
    """GCV(mu) = (RSS/N) / (tr(I - H)/N)^2 with H formed in full, the mean of a bias among its directions."""
    n = len(keys)
    projector = torch.full((n, n), 1 / n, dtype=torch.float64) * int(bias)
    centred = keys.double() - projector @ keys.double()
    gram = centred.T @ centred + mu * torch.eye(keys.shape[1], dtype=torch.float64)
    left = torch.eye(n, dtype=torch.float64) - projector - centred @ torch.linalg.solve(gram, centred.T)
    residual = left @ values.double()
    return float(residual.square().sum() / n) / float(left.trace() / n) ** 2


class PlainDiscriminant:
    """NUMERICS: class means shrunk by empirical Bayes, within-class scatter, ridge. Straight from the formulas."""

    def __init__(self, keys: Tensor, labels: Tensor, mu: float, weights: Tensor | None = None, k: float | None = None):
        x, y = keys.double().numpy(), labels.numpy()
        w = np.ones(len(x)) if weights is None else weights.double().numpy()
        classes = range(int(y.max()) + 1)
        n, n_c = w.sum(), np.array([w[y == c].sum() for c in classes])
        means = np.stack([np.average(x[y == c], axis=0, weights=w[y == c]) for c in classes])
        grand = np.average(x, axis=0, weights=w)
        apart = x - means[y]
        scatter = (apart * w[:, None]).T @ apart
        sigma = (scatter + mu * np.eye(x.shape[1])) / n
        precision = np.linalg.inv(sigma)
        self.shrinkage = self._shrinkage(n, n_c, means - grand, scatter, precision) if k is None else k
        shrunk = grand + (n_c / (n_c + self.shrinkage))[:, None] * (means - grand)
        self.weight = shrunk @ precision
        self.bias = -0.5 * (self.weight * shrunk).sum(1)
        self.log_prior = np.log(n_c / n)

    @staticmethod
    def _shrinkage(n, n_c, apart, scatter, precision) -> float:
        classes = len(n_c)
        if classes < 3:
            return 0.0
        within = np.trace(precision @ scatter) / (n - classes)
        spread = sum(count * row @ precision @ row for count, row in zip(n_c, apart, strict=True))
        between = (spread - (classes - 1) * within) / (n - (n_c**2).sum() / n)
        return n if between <= 0 else min(within / between, n)

    def scores(self, keys: Tensor) -> Tensor:
        """Discriminants without the prior, relative to their mean over the classes (a common term is free)."""
        return centred_scores(torch.from_numpy(keys.double().numpy() @ self.weight.T + self.bias))


def centred_scores(scores: Tensor) -> Tensor:
    return scores - scores.mean(-1, keepdim=True)
