"""How much to regularize: fixed, by the paper's rule, by generalized cross-validation, or by leave-one-out scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_faast.associative.spectrum import Spectrum

#: Grid points a decade of ridge.
_PER_DECADE = 12
#: The grid goes from so many times the rounding floor ...
_ABOVE_FLOOR = 10.0
#: ... to so many times the largest eigenvalue, where the fit is the mean of the values and nothing else.
_ABOVE_LARGEST = 100.0
#: The ridges, in decades around the mean eigenvalue, that Automatic tries first, and its last step.
_COARSE = (-1.0, -0.5, 0.0, 0.5, 1.0)
_FINE = 0.25
#: A fit that can pass through every row and keeps less than this share of its degrees of freedom all but does.
_INTERPOLATING = 0.05


@dataclass(frozen=True)
class Choice:
    """A regularization with its value.

    Attributes:
        kind: ``"ridge"`` (``value`` is mu, in the units of the Gram's eigenvalues) or ``"truncation"`` (``value`` is
            the tolerance rtol on the keys' singular values, relative to the largest).
        value: mu or rtol.
        at_edge: Whether the criterion was best at an edge of its grid, so that ``value`` is the documented fallback.
        grid: The values tried [m], where there was a search.
        scores: The criterion at each [m]; lower is better.
    """

    kind: str
    value: float
    at_edge: bool = False
    grid: Tensor | None = field(default=None, repr=False, compare=False)
    scores: Tensor | None = field(default=None, repr=False, compare=False)

    def filter(self, spectrum: Spectrum) -> Tensor:
        """The factors f [r] of W^T = U diag(f) U^T C."""
        eigenvalues = spectrum.eigenvalues
        if self.kind == "ridge":
            return 1 / (eigenvalues + self.value)
        kept = eigenvalues > self.value**2 * spectrum.largest  # rtol is on singular values: squared on the Gram's side
        return torch.where(kept, 1 / eigenvalues, 0.0)

    def __str__(self) -> str:
        name = "ridge" if self.kind == "ridge" else "truncation rtol"
        return f"{name} {self.value:.3g}" + (" (grid edge: fallback)" if self.at_edge else "")


class Regularization(ABC):
    """A rule that chooses the regularization from one eigendecomposition."""

    #: Whether a bias may be fitted beside it.
    allows_bias: bool = True
    #: Whether the rule yields a ridge, which the discriminant read-out needs.
    is_ridge: bool = True
    #: Whether ``choose`` needs leave-one-out scores, and so a reservoir.
    needs_rows: bool = False
    #: What its ``evaluate`` returns: the mean of a named or own metric, or ``"nats"``, all of a discriminant's negative
    #: log posterior, for which the reservoir must hold every row.
    metric: str | Callable[[Tensor, Tensor], float] = "log_loss"

    @abstractmethod
    def choose(self, spectrum: Spectrum, evaluate: Callable[[Choice], float] | None = None) -> Choice:
        """Choose a value.

        Args:
            spectrum: The decomposed statistics.
            evaluate: The loss of a choice on leave-one-out scores, where there are any.
        """


@dataclass(frozen=True)
class Ridge(Regularization):
    r"""Fixed ridge: :math:`W^\top = (G + \mu I)^{-1} C`.

    Args:
        mu: Ridge, >= 0, in the units of the Gram's eigenvalues (scikit-learn's ``alpha``).
    """

    mu: float

    def __post_init__(self) -> None:
        if not (self.mu >= 0 and math.isfinite(self.mu)):
            raise ValueError(f"mu must be a finite number, at least 0, got {self.mu}.")

    def choose(self, spectrum: Spectrum, evaluate: Callable[[Choice], float] | None = None) -> Choice:
        """The given mu.

        Raises:
            ValueError: For mu = 0 where the Gram is singular.
        """
        if self.mu == 0 and spectrum.rank < spectrum.basis.shape[0]:
            raise ValueError(
                f"Ridge(0) on keys of rank {spectrum.rank} in {spectrum.basis.shape[0]} dimensions is singular: use a "
                "ridge above 0, GCV(), or Truncation(1e-6) for the minimum-norm solution."
            )
        return Choice("ridge", self.mu)


@dataclass(frozen=True)
class Truncation(Regularization):
    r"""Truncated pseudoinverse: singular values of the keys under ``rtol`` times the largest are dropped.

    Equal to ``torch.linalg.pinv(keys, rtol=rtol) @ values``. On the Gram's side the tolerance is squared.

    Args:
        rtol: Tolerance on the singular values of the keys, in [0, 1).
    """

    rtol: float
    is_ridge = False

    def __post_init__(self) -> None:
        if not 0 <= self.rtol < 1:
            raise ValueError(f"rtol must be in [0, 1), got {self.rtol}.")

    def choose(self, spectrum: Spectrum, evaluate: Callable[[Choice], float] | None = None) -> Choice:
        """The given tolerance."""
        return Choice("truncation", self.rtol)


@dataclass(frozen=True)
class PaperRule(Regularization):
    r"""The rule of the FAAST paper (arXiv 2605.04651): truncation at :math:`\epsilon = N^{-\alpha}`, without a bias.

    Args:
        alpha: 0.8 in the paper for vision, 0.5 to 1.2 by task for language models.
    """

    alpha: float = 0.8
    allows_bias = False
    is_ridge = False

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha must be a finite number above 0, got {self.alpha}.")

    def choose(self, spectrum: Spectrum, evaluate: Callable[[Choice], float] | None = None) -> Choice:
        """The tolerance n^-alpha."""
        return Choice("truncation", max(spectrum.count, 1.0) ** -self.alpha)


@dataclass(frozen=True)
class GCV(Regularization):
    r"""Ridge by generalized cross-validation (Golub, Heath, Wahba 1979), from the sums alone.

    .. math::
        \mathrm{GCV}(\mu) = \frac{\mathrm{RSS}(\mu)/N}{(\mathrm{dof}(\mu)/N)^2}

    over a fixed logarithmic grid from ten times the rounding floor to a hundred times the largest eigenvalue, in the
    form that keeps its digits where N < d. Where the score is best at an edge of the grid it has not found a minimum:

    - at the lower edge of a fit that cannot pass through every row (N > r + 1) the data is all but free of noise, and
      the lowest grid point is used;
    - otherwise (one example a class, no signal) :math:`\mu` is ``fallback`` times the mean eigenvalue
      :math:`\mathrm{tr}(G)/r`. A fit that can pass through every row (N <= r + 1) has its lower edge where it all but
      does, with dof/N under 0.05: there GCV compares two numbers near zero.

    Both are reported as ``at_edge``.

    Args:
        fallback: The ridge used at an edge, in mean eigenvalues.
    """

    fallback: float = 1.0

    def __post_init__(self) -> None:
        if not (self.fallback > 0 and math.isfinite(self.fallback)):
            raise ValueError(f"fallback must be a finite number above 0, got {self.fallback}.")

    def choose(self, spectrum: Spectrum, evaluate: Callable[[Choice], float] | None = None) -> Choice:
        """The grid point of lowest GCV.

        Raises:
            ValueError: Where the weights sum to less than the number of directions they span.
        """
        _refuse_light_weights(spectrum)
        if spectrum.rank == 0:  # every key is the same: only the mean can be fitted, at any ridge
            return Choice("ridge", 1.0, at_edge=True)
        grid = ridge_grid(spectrum)
        scores = gcv_scores(spectrum, grid)
        best = int(scores.argmin())
        mu = grid[best]
        interpolating = (
            spectrum.interpolates and float(residual_dof(spectrum, mu[None])) < _INTERPOLATING * spectrum.count
        )
        if 0 < best < len(grid) - 1 and not interpolating:
            return Choice("ridge", float(mu), grid=grid, scores=scores)
        if best == 0 and not spectrum.interpolates:
            return Choice("ridge", float(mu), at_edge=True, grid=grid, scores=scores)
        fallback = max(self.fallback * float(spectrum.eigenvalues.mean()), float(grid[0]))
        return Choice("ridge", fallback, at_edge=True, grid=grid, scores=scores)


@dataclass(frozen=True)
class Automatic(Regularization):
    r"""The default: by leave-one-out likelihood while the sample holds every row, by :class:`GCV` beyond.

    GCV judges the squared error of a regression on one-hot values; a discriminant is used for its likelihood. With few
    rows the two differ, and every row's exact leave-one-out score is at hand:

    .. math::
        \min_{\mu, T} \sum_i -\log p_{-i}(y_i \mid x_i; \mu, T)
        + \tfrac12 \Big(\log_{10} \frac{\mu}{\bar\lambda}\Big)^2 + \mathrm{prior}(T)

    The prior (around the mean eigenvalue, one standard deviation a decade) decides where some twenty rows do not; the
    temperature's is that of the calibration. The ridges tried are half a decade apart, then a quarter. GCV, which needs
    the sums alone, is used for more rows than the sample holds, without a reservoir, for a regression read-out, and
    where no row can be left out (one example a class): the solution never depends on which rows were sampled.
    """

    metric = "nats"

    def choose(self, spectrum: Spectrum, evaluate: Callable[[Choice], float] | None = None) -> Choice:
        """The ridge of highest posterior probability, or GCV's."""
        _refuse_light_weights(spectrum)
        if evaluate is None or spectrum.rank == 0:
            return GCV().choose(spectrum)
        mean = float(spectrum.eigenvalues.mean())
        found: dict[float, float] = {}

        def objective(decade: float) -> float:
            if decade not in found:
                nats = evaluate(Choice("ridge", mean * 10**decade)) + decade**2 / 2
                found[decade] = nats if math.isfinite(nats) else math.inf
            return found[decade]

        best = min(_COARSE, key=objective)
        for step in (_COARSE[1] - _COARSE[0], _FINE):
            while objective(following := min((best - step, best + step), key=objective)) < objective(best):
                best = following
        if not math.isfinite(found[best]):
            return GCV().choose(spectrum)
        decades = sorted(found)
        grid, scores = (torch.tensor(v, dtype=torch.float64) for v in (decades, [found[d] for d in decades]))
        return Choice("ridge", mean * 10**best, grid=mean * 10**grid, scores=scores)


@dataclass(frozen=True)
class LeaveOneOut(Regularization):
    """Ridge of lowest loss on the leave-one-out scores of the reservoir: the task's own metric decides.

    Costs one Cholesky factorization a candidate where the read-out is a discriminant. At an edge of the grid the
    choice is reported as ``at_edge`` and kept: unlike GCV it measures the metric itself.

    Args:
        metric: ``"log_loss"`` (at each candidate's own temperature), ``"error"`` (1 - accuracy), ``"squared_error"``,
            or a callable that maps predictions [R, c] and targets ([R] labels or [R, c] values) to a loss.
        candidates: Number of ridges tried.
    """

    metric: str | Callable[[Tensor, Tensor], float] = "log_loss"
    candidates: int = 25
    needs_rows = True

    def __post_init__(self) -> None:
        if isinstance(self.metric, str) and self.metric not in ("log_loss", "error", "squared_error"):
            raise ValueError(f"metric must be 'log_loss', 'error', 'squared_error' or a callable, got {self.metric!r}.")
        if self.candidates < 2:
            raise ValueError(f"candidates must be at least 2, got {self.candidates}.")

    def choose(self, spectrum: Spectrum, evaluate: Callable[[Choice], float] | None = None) -> Choice:
        """The candidate of lowest leave-one-out loss."""
        if spectrum.rank == 0:
            return Choice("ridge", 1.0, at_edge=True)
        if evaluate is None:
            raise ValueError("LeaveOneOut needs a reservoir: use reservoir_size above 0, or GCV().")
        grid = ridge_grid(spectrum)
        grid = grid[torch.linspace(0, len(grid) - 1, self.candidates).round().long()]
        scores = torch.tensor([evaluate(Choice("ridge", float(mu))) for mu in grid], dtype=torch.float64)
        if not scores.isfinite().any():
            raise ValueError("LeaveOneOut: the metric is not finite at any ridge; look at its targets, or use GCV().")
        scores = torch.where(scores.isfinite(), scores, torch.inf)
        # Metrics such as the error have plateaus: of equal neighbours the middle one is furthest from both cliffs.
        lowest = torch.nonzero(scores <= scores.min()).flatten().tolist()
        run = [i for i in lowest if i - lowest[0] == lowest.index(i)]
        best = run[len(run) // 2]
        return Choice("ridge", float(grid[best]), at_edge=best in (0, len(grid) - 1), grid=grid, scores=scores)


def _refuse_light_weights(spectrum: Spectrum) -> None:
    if spectrum.rank + int(spectrum.centered) > spectrum.count + 0.5:
        raise ValueError(
            f"The weights sum to {spectrum.count:.3g}, fewer rows than the rank {spectrum.rank} of the keys: a "
            "weight of k counts as k equal rows. Scale the weights so that they sum to the number of rows."
        )


def ridge_grid(spectrum: Spectrum) -> Tensor:
    """The grid of ridges [m], ascending, float64: it scales with the eigenvalues, and stays above rounding."""
    low, high = math.log10(_ABOVE_FLOOR * spectrum.floor), math.log10(_ABOVE_LARGEST * spectrum.largest)
    steps = max(2, math.ceil((high - low) * _PER_DECADE))
    return torch.logspace(low, high, steps, dtype=torch.float64, device=spectrum.eigenvalues.device)


def residual_sum_of_squares(spectrum: Spectrum, mu: Tensor) -> Tensor:
    r"""RSS(mu) [m] of a ridge fit, in the form that keeps its digits.

    :math:`\max(0, \mathrm{tr}(V^\top V) - \sum_i b_i/\lambda_i) + \sum_i b_i \mu^2 / (\lambda_i (\lambda_i+\mu)^2)`,
    the first term exactly 0 where a map through every row exists. The textbook form (tr V^T V - 2 ... + ...) cancels.
    """
    eigenvalues, mu = spectrum.eigenvalues, mu[:, None]
    explained = spectrum.projected.square().sum(1) / eigenvalues
    unreachable = 0.0 if spectrum.interpolates else max(0.0, spectrum.value_trace - float(explained.sum()))
    return unreachable + (explained * (mu / (eigenvalues + mu)) ** 2).sum(1)


def residual_dof(spectrum: Spectrum, mu: Tensor) -> Tensor:
    """Degrees of freedom that a ridge leaves, tr(I - H) [m]; the mean that centring takes out is one parameter."""
    rows_left = 0.0 if spectrum.interpolates else spectrum.count - int(spectrum.centered) - spectrum.rank
    return rows_left + (mu[:, None] / (spectrum.eigenvalues + mu[:, None])).sum(1)


def gcv_scores(spectrum: Spectrum, mu: Tensor) -> Tensor:
    """GCV(mu) [m]."""
    n = spectrum.count
    return (residual_sum_of_squares(spectrum, mu) / n) / (residual_dof(spectrum, mu) / n) ** 2
