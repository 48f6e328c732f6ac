"""Classifiers from class means and one covariance: nearest class mean, linear discriminant with OAS shrinkage."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_faast.associative.linear import LinearLearner
from lightning_faast.associative.processes import reduced
from lightning_faast.associative.reservoir import Reservoir
from lightning_faast.associative.statistics import SufficientStatistics

#: A scatter under so many units in the last place of the keys' own sum of squares is rounding.
_ROUNDING = 64 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class _Moments:
    """Means and scatter of labelled keys, float64, around the mean of all keys.

    Attributes:
        center: [d], the mean of all keys.
        means: Class means less ``center`` [c, d].
        counts: [c].
        within: Within-class scatter [d, d].
        varies: Whether keys vary within classes, beyond rounding.
    """

    center: Tensor
    means: Tensor
    counts: Tensor
    within: Tensor
    varies: bool

    @classmethod
    def of(cls, statistics: SufficientStatistics) -> _Moments:
        gram, counts = statistics.gram, statistics.class_counts
        center = statistics.key_sum / statistics.count
        means = statistics.cross.T / counts[:, None] - center
        total = gram - statistics.count * torch.outer(center, center)
        within = total - (means.T * counts) @ means
        varies = len(counts) < statistics.count and float(within.trace()) > _ROUNDING * float(gram.trace())
        return cls(center, means, counts, within, varies)

    def variance(self) -> float:
        """Pooled within-class variance of one key element; of the class means where nothing varies within classes.

        Raises:
            ValueError: Where all keys are equal.
        """
        n, (c, d) = float(self.counts.sum()), self.means.shape
        if self.varies:
            return float(self.within.trace()) / ((n - c) * d)
        between = float((self.means.square().sum(1) * self.counts).sum()) / (max(n - 1, 1) * d)
        if not between > _ROUNDING * float(self.center.square().mean()):
            raise ValueError("All keys are equal: there is nothing to tell classes apart by. Look at the encoder.")
        return between


class _MeansLearner(LinearLearner):
    """Learns from the same sums as :class:`FastWeights`."""

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        class_embeddings: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features, class_embeddings)
        self._figures: dict[str, float] = {}
        self.reset()

    def reset(self) -> None:
        """Forget every row seen; the solved weights stay until the next solve."""
        d, c = self._declared
        self.statistics = SufficientStatistics(c, d)

    def update(
        self, keys: Tensor, values: Tensor, weights: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Add rows to the statistics.

        Args:
            keys: [..., d], any floating dtype.
            values: Labels [...] or [..., 1].
            weights: Optional, one non-negative weight a row [...].
            positions: Of no account: sums know no order.

        Raises:
            ValueError: As :meth:`SufficientStatistics.update`, and for values that are no labels.
        """
        lead = keys.shape[:-1]
        keys, labels = self._rows_of(keys, values)
        if weights is not None:
            if weights.shape != lead:
                raise ValueError(f"weights must be {tuple(lead)}, one a row, got {tuple(weights.shape)}.")
            weights = weights.reshape(-1)
        self.statistics.update(keys, labels, weights)

    def reduce(self, add: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Replace the sums of this process by those of all."""
        self.statistics, _ = reduced(self.statistics, Reservoir(0), add, gather, self.weight.device)

    @property
    def rows(self) -> int:
        """Rows in the statistics."""
        return self.statistics.rows

    @torch.inference_mode(False)
    @torch.no_grad()
    def solve(self) -> None:
        """Solve weight and bias from the statistics.

        Raises:
            RuntimeError: Where no row was seen.
            ValueError: For a class without rows, or keys that are all equal.
        """
        if not self.statistics.rows:
            raise RuntimeError(
                "No rows were seen: there is nothing to solve. Call fit, or update with at least one row."
            )
        self._refuse_empty_classes(self.statistics.class_counts)
        self._publish_linear(*self._solved(_Moments.of(self.statistics)))

    @abstractmethod
    def _solved(self, moments: _Moments) -> tuple[Tensor, Tensor]:
        """Weight [c, d] and bias [c] for keys as they are; sets the figures."""

    def learned_state(self) -> dict[str, Tensor]:
        """The statistics."""
        return self.statistics.state_dict()

    def load_learned_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`learned_state`.

        Raises:
            ValueError: For missing entries, or widths that do not agree.
        """
        self.statistics.load_state_dict(state)

    @property
    def bytes_to_update(self) -> int:
        """Bytes of the sums (G as a packed triangle)."""
        return self.statistics.num_bytes

    def figures(self) -> dict[str, float]:
        """Figures of the last solve by the names under which they are logged."""
        if not self._figures:
            raise RuntimeError(f"{type(self).__name__} was not solved in this process: call fit(keys, labels).")
        return dict(self._figures)


class NearestClassMean(_MeansLearner):
    r"""The class whose mean is nearest: one spherical covariance, classes equally likely.

    .. math:: w_c = m_c/\sigma^2 \qquad b_c = -|m_c|^2/(2\sigma^2)

    with :math:`\sigma^2` the pooled within-class variance of one element of the keys. Where no key varies within its
    class (one row a class), it is the variance between the classes: the answer does not depend on it, only how sure the
    probabilities are.

    Args:
        in_features: Width d of the keys; from the first batch where not given.
        out_features: Number of classes c; from the labels where not given.
        class_embeddings: Refused: values are labels.

    Attributes:
        weight: [c, d].
        bias: [c].
        statistics: The sums, as those of :class:`FastWeights`.

    Example:
        >>> import torch
        >>> from lightning_faast.associative import NearestClassMean
        >>> keys = torch.randn(300, 16)
        >>> labels = (keys[:, 0] > 0).long()
        >>> NearestClassMean().fit(keys[:200], labels[:200]).score(keys[200:], labels[200:]) > 0.7
        True
    """

    def _solved(self, moments: _Moments) -> tuple[Tensor, Tensor]:
        variance = moments.variance()
        self._figures = {"variance": variance}
        weight = moments.means / variance
        return weight, -(weight * (moments.means / 2 + moments.center)).sum(1)

    def summary(self) -> str:
        """Variance within classes."""
        return f"nearest class mean, variance {self.figures()['variance']:.3g}"


class LinearDiscriminant(_MeansLearner):
    r"""Linear discriminant analysis: one covariance for all classes, shrunk by OAS; class prior by frequency.

    .. math::
        \Sigma = (1-s)\, S + s\, \mu I \qquad \mu = \frac{\mathrm{tr}\, S}{d} \qquad
        s = \min\left(1,\ \frac{\mathrm{tr}(S^2)/d^2 + \mu^2}{(N+1)\,(\mathrm{tr}(S^2)/d^2 - \mu^2/d)}\right)

    .. math:: w_c = \Sigma^{-1} m_c \qquad b_c = -\tfrac12 m_c^\top \Sigma^{-1} m_c + \log(n_c/N)

    with S the within-class scatter over N. These are ``sklearn.covariance.oas`` of the keys less their class means, and
    scikit-learn's ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)``. Where no key varies within its class (one
    row a class), the covariance is that of :class:`NearestClassMean`, and s is 1.

    Args:
        in_features: Width d of the keys; from the first batch where not given.
        out_features: Number of classes c; from the labels where not given.
        class_embeddings: Refused: values are labels.

    Attributes:
        weight: [c, d].
        bias: [c].
        statistics: The sums, as those of :class:`FastWeights`.

    Example:
        >>> import torch
        >>> from lightning_faast.associative import LinearDiscriminant
        >>> keys = torch.randn(300, 16)
        >>> labels = (keys[:, 0] > 0).long()
        >>> LinearDiscriminant().fit(keys[:200], labels[:200]).score(keys[200:], labels[200:]) > 0.7
        True

    References:
        Chen, Wiesel, Eldar and Hero, Shrinkage Algorithms for MMSE Covariance Estimation, 2010.
    """

    def _solved(self, moments: _Moments) -> tuple[Tensor, Tensor]:
        shrinkage, weight = self._shrunk(moments)
        self._figures = {"shrinkage": shrinkage}
        log_prior = (moments.counts / moments.counts.sum()).log()
        return weight, log_prior - (weight * (moments.means / 2 + moments.center)).sum(1)

    def _shrunk(self, moments: _Moments) -> tuple[float, Tensor]:
        """s, and rows Sigma^-1 m_c."""
        if not moments.varies:
            return 1.0, moments.means / moments.variance()
        n, d = float(moments.counts.sum()), len(moments.center)
        scatter = moments.within / n
        mean_variance = float(scatter.trace()) / d
        squares = float(scatter.square().sum()) / d**2
        below = (n + 1) * (squares - mean_variance**2 / d)
        shrinkage = 1.0 if below <= 0 else min((squares + mean_variance**2) / below, 1.0)
        covariance = (1 - shrinkage) * scatter
        covariance.diagonal().add_(shrinkage * mean_variance)
        factor = torch.linalg.cholesky(covariance)
        return shrinkage, torch.cholesky_solve(moments.means.T, factor).T

    def summary(self) -> str:
        """How much the covariance is shrunk."""
        return f"linear discriminant, shrinkage {self.figures()['shrinkage']:.3g}"
