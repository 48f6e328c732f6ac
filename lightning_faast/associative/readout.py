"""How a solution becomes one linear layer: regression, or a penalized discriminant for classes.

Every read-out is built from one :class:`Spectrum` and works in its basis, so that N, not d, decides the cost where N is
small. Each yields a :class:`LinearMap` and, for a sample of the training rows, the exact scores that the solved map
would give each row had that row not been seen (:class:`LeaveOneOutScores`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_faast.associative.regularization import Choice
from lightning_faast.associative.spectrum import Spectrum, as_dense
from lightning_faast.associative.within import within_inverse

#: Logit of a class without examples under ``empty_classes="mask"``: its probability is exactly 0 in every dtype, and
#: unlike -inf it survives half precision, histograms and fine-tuning.
MASKED_LOGIT = -1e4


#: k of one row a class, where nothing tells within from between: near what two rows a class lead to (1.0 to 2.4 on
#: CLINC150 and CIFAR-10 keys).
ONE_SHOT_SHRINKAGE = 2.0
#: Denominators that are 0 where a fit passes through a row, or tells two classes apart without error. Below this they
#: are rounding: a leave-one-out score is then undefined, and a scale is as good as any that is finite and positive.
_TINY = 1e-9


@dataclass(frozen=True)
class LinearMap:
    """scores = x W^T + b; logits = scores / temperature + log_prior. All float64.

    Attributes:
        weight: W [c, d].
        bias: b [c].
        log_prior: [c]; zeros for regression, whose scores hold the class frequencies already.
    """

    weight: Tensor
    bias: Tensor
    log_prior: Tensor


@dataclass(frozen=True)
class LeaveOneOutScores:
    """What the solved map would say of training rows it had not seen. All float64.

    Attributes:
        scores: [R, c], before temperature and prior.
        log_prior: [R, c].
        values: [R] labels or [R, c] values.
        weights: [R, 1] or [R, c]; 0 where leaving the row out is undefined (the last row of its class).
    """

    scores: Tensor
    log_prior: Tensor
    values: Tensor
    weights: Tensor


class Readout(Protocol):
    """What every read-out offers."""

    def linear(self) -> LinearMap:
        """The solved map."""
        ...

    @property
    def error_bound(self) -> float:
        """Bound on the relative error (Frobenius) of W that rounding of the sums can cause; infinite where unknown."""
        ...

    def leave_one_out(self, coordinates: Tensor, values: Tensor, weights: Tensor) -> LeaveOneOutScores:
        """Scores of rows that are among the training rows, each as if it had not been seen.

        Args:
            coordinates: Their :meth:`Spectrum.coordinates`, [R, r].
            values: Labels [R] or values [R, c].
            weights: [R].
        """
        ...


class Regression:
    r"""y = W x + b, the paper's read-out: W^T = U diag(f) U^T C, the bias by exact centring.

    Leave-one-out scores follow from the residuals: :math:`y_i - r_i/(1 - h_i)`, exact for a fixed ridge; for a
    truncated solution, exact with the retained subspace held fixed.
    """

    def __init__(self, spectrum: Spectrum, choice: Choice) -> None:
        self.spectrum = spectrum
        self.choice = choice
        self.filter = choice.filter(spectrum)
        self._coefficients = self.filter[:, None] * spectrum.projected  # U^T W^T, [r, c]

    def linear(self) -> LinearMap:
        """The solved map."""
        s = self.spectrum
        weight = (s.basis @ self._coefficients).T.contiguous()
        return LinearMap(weight, s.value_mean - weight @ s.key_mean, torch.zeros_like(s.value_mean))

    @property
    def error_bound(self) -> float:
        r"""As in :class:`Readout`.

        Rounding changes G by E and C by F, with :math:`\|E\| \le` floor and, as the values are not in the Gram's
        scale, :math:`\|F\| \le \mathrm{floor} \sqrt{\mathrm{tr}(V^\top V)/\lambda_1}`. To first order a filter f
        spreads E by its divided differences; between kept and dropped directions these are one over the gap.
        """
        s, kept = self.spectrum, int((self.filter > 0).sum())
        size = float(self._coefficients.norm())
        if not kept or not size:
            return 0.0 if s.full else math.inf
        eigenvalues = s.eigenvalues
        smallest, largest = float(eigenvalues[kept - 1]), s.largest
        rounding, cut = s.floor, math.hypot(float(s.projected[kept:].norm()), s.dropped)
        values = rounding * math.sqrt(s.value_trace / largest) / size
        if self.choice.kind == "ridge":
            mu = self.choice.value
            spread = rounding / (smallest + mu)
            if not s.full:  # directions under the floor are in the exact solution, at most to this
                spread = max(spread, rounding / mu)
                lost = (s.dropped / mu + values * size / mu) / size
            else:
                lost = rounding / smallest if s.rank < len(s.basis) else 0.0  # the subspace may be turned
            first_order = spread + lost + values / (smallest + mu)
        else:
            threshold = self.choice.value**2 * largest
            if threshold < rounding and not s.full:
                return math.inf  # eigenvalues that ought to be kept cannot be told from rounding
            following = float(eigenvalues[kept]) if kept < s.rank else 0.0 if s.full else rounding
            gap = smallest - following
            if min(smallest - threshold, threshold - following if kept < s.rank else math.inf) < rounding:
                return math.inf  # on which side of the threshold an eigenvalue lies cannot be told
            spread = rounding * (1 / smallest + 1 / gap)
            first_order = spread + rounding * cut / (smallest * gap * size) + values / smallest
        return 2 * first_order / (1 - spread) if spread < 1 else math.inf

    def leave_one_out(self, coordinates: Tensor, values: Tensor, weights: Tensor) -> LeaveOneOutScores:
        """As in :class:`Readout`."""
        s = self.spectrum
        x = coordinates
        dense = as_dense(values.to(x.device), s.value_mean.shape[0])
        fitted = x @ self._coefficients + s.value_mean
        leverage = (x.square() * self.filter).sum(1, keepdim=True) + (1 / s.count if s.centered else 0.0)
        weights = weights.to(x)[:, None]
        remaining = 1 - weights * leverage
        defined = remaining > _TINY  # else the fit passes through the row whatever its value
        scores = (fitted - weights * leverage * dense) / torch.where(defined, remaining, 1.0)
        return LeaveOneOutScores(scores, torch.zeros_like(scores), values.to(x.device), weights * defined)


class Discriminant:
    r"""Penalized discriminant (Hastie, Buja, Tibshirani 1995) with class means shrunk by empirical Bayes.

    With class means m_c, their average g, within-class scatter S_w and the ridge mu,

    .. math::
        \Sigma = (S_w + \mu I)/N,\quad m_c^* = g + \tfrac{n_c}{n_c + k}(m_c - g),\quad
        w_c = \Sigma^{-1} (m_c^* - g),\quad b_c = -\tfrac12 (m_c^* - g)^\top w_c - g^\top w_c .

    k is the ratio of within to between variance by one-way analysis of variance in the metric of Sigma, found from the
    same sums (James and Stein's shrinkage); it needs at least three classes and is 0 for fewer. With one row a class
    there is no variance within, and k is 2.

    Args:
        spectrum: Centred.
        choice: A ridge.
        counts: Rows of each class [c].
        prior: Class prior [c], or None for the training frequencies.
        shrink_means: Whether k is estimated, or 0.
    """

    def __init__(
        self, spectrum: Spectrum, choice: Choice, counts: Tensor, prior: Tensor | None, shrink_means: bool
    ) -> None:
        self.spectrum = spectrum
        self.counts = counts
        self.prior = prior
        n, mu = spectrum.count, choice.value
        self._present = counts > 0
        safe = torch.where(self._present, counts, 1.0)
        self._means = spectrum.projected / safe  # [r, c], relative to the grand mean g
        self._precision = within_inverse(spectrum.eigenvalues, mu, self._means, counts, spectrum.floor)  # A
        self._solved = self._precision.times(self._means)  # A m_c
        self._inner = self._means.T @ self._solved  # m_c^T A m_j, [c, c]
        self.shrinkage = self._estimate_shrinkage(n, mu) if shrink_means else 0.0

    def _estimate_shrinkage(self, n: float, mu: float) -> float:
        """K = within variance / between variance, capped at N (no difference between the means is detectable)."""
        classes = int(self._present.sum())
        if classes < 3 or not self.spectrum.rank:
            return 0.0
        if n <= classes:
            return ONE_SHOT_SHRINKAGE
        scatter_trace = self.spectrum.rank - mu * self._precision.trace  # tr(A S_w)
        within = n * max(scatter_trace, 0.0) / (n - classes)
        spread = n * float((self.counts * self._inner.diagonal()).sum())
        between = (spread - (classes - 1) * within) / (n - float(self.counts.square().sum()) / n)
        return n if between <= 0 else min(within / between, n)

    def linear(self) -> LinearMap:
        """The solved map."""
        s = self.spectrum
        shrink = self.counts / (self.counts + self.shrinkage).clamp(min=torch.finfo(torch.float64).tiny)
        weight = s.count * (s.basis @ (self._solved * shrink)).T.contiguous()
        bias = -0.5 * s.count * shrink.square() * self._inner.diagonal() - weight @ s.key_mean
        log_prior = _log_prior(self.counts, self.prior)
        shown = log_prior > MASKED_LOGIT
        return LinearMap(below_average(weight.T, shown).T.contiguous(), below_average(bias, shown), log_prior)

    @property
    def error_bound(self) -> float:
        """As in :class:`Readout`."""
        return _metric_bound(self.spectrum, self._precision.trace, self._solved)

    def leave_one_out(self, coordinates: Tensor, values: Tensor, weights: Tensor) -> LeaveOneOutScores:
        r"""As in :class:`Readout`; mu, k and the class prior are those of the fit.

        With u = x - m_c and f = w n_c/(n_c - w),
        :math:`(S_w + \mu I - f u u^\top)^{-1} = A + f (Au)(Au)^\top/(1 - f u^\top A u)`,
        :math:`m_c' = (n_c m_c - w x)/(n_c - w)` and :math:`g' = (N g - w x)/(N - w)`. Were the prior counted anew
        without the row, its own class would be the rarest of a balanced set, and every estimate too low.
        """
        s = self.spectrum
        x = coordinates  # relative to g
        labels = _as_labels(values.to(x.device))
        w = weights.to(x)
        rows = torch.arange(len(x), device=x.device)
        own = self.counts[labels]
        left = own - w
        defined = left > _TINY * own
        left = torch.where(defined, left, 1.0)
        n_left = s.count - w

        x_a_m = x @ self._solved  # x^T A m_j, [R, c]
        x_a_x = self._precision.lengths(x)  # [R]
        own_inner = self._inner[labels]  # m_c^T A m_j, [R, c]
        x_a_own, own_a_own = x_a_m[rows, labels], own_inner[rows, labels]
        u_a_m = x_a_m - own_inner
        u_a_x = x_a_x - x_a_own
        f = w * own / left
        remaining = 1 - f * (x_a_x - 2 * x_a_own + own_a_own)
        defined = defined & (remaining > _TINY)
        gain = f / torch.where(defined, remaining, 1.0)

        # The same products under A' = (S_w' + mu I)^-1.
        xm = x_a_m + (gain * u_a_x)[:, None] * u_a_m
        xx = x_a_x + gain * u_a_x.square()
        mm = self._inner.diagonal() + gain[:, None] * u_a_m.square()
        # The row's own class has another mean: m_c' = (1 + t) m_c - t x.
        t = w / left
        xm_own, mm_own = xm[rows, labels], mm[rows, labels]
        xm[rows, labels] = (1 + t) * xm_own - t * xx
        mm[rows, labels] = (1 + t).square() * mm_own - 2 * t * (1 + t) * xm_own + t.square() * xx
        # All is read relative to g' = -shift x.
        shift = (w / n_left)[:, None]
        counts = self.counts.repeat(len(x), 1)
        counts[rows, labels] = left
        shrink = counts / (counts + self.shrinkage).clamp(min=torch.finfo(torch.float64).tiny)
        x_delta = (1 + shift) * (xm + shift * xx[:, None])
        delta_delta = mm + 2 * shift * xm + shift.square() * xx[:, None]
        scores = n_left[:, None] * (shrink * x_delta - 0.5 * shrink.square() * delta_delta)
        log_prior = _log_prior(self.counts, self.prior)
        scores = below_average(scores, log_prior > MASKED_LOGIT)
        return LeaveOneOutScores(scores, log_prior.expand_as(scores), labels, (w * defined)[:, None])


class PairedDiscriminants:
    r"""One two-class discriminant for each column of binary values; a logit above 0 means "more likely 1 than 0".

    For a column with n_1 ones of mean m_1 and n_0 zeros of mean m_0, delta = m_1 - m_0, the within-class scatter is the
    total one less :math:`(n_1 n_0/N) \delta\delta^\top`, so that all columns share one decomposition:

    .. math::
        w = N \frac{A \delta}{1 - (n_1 n_0/N) \delta^\top A \delta},\quad A = (S_t + \mu I)^{-1},\quad
        b = -\tfrac12 (m_1 + m_0)^\top w,\quad \text{log-prior} = \log(\pi_1/\pi_0) .

    Args:
        spectrum: Centred.
        choice: A ridge.
        counts: Ones in each column [c].
        prior: Probability of a one in each column [c], or None for the training frequencies.
    """

    def __init__(self, spectrum: Spectrum, choice: Choice, counts: Tensor, prior: Tensor | None) -> None:
        self.spectrum = spectrum
        self.counts = counts
        self.prior = prior
        self._present = varies(counts, spectrum.count)
        self._inverse = 1 / (spectrum.eigenvalues + choice.value)  # A in the basis
        self._ones_mean = spectrum.projected / torch.where(counts > 0, counts, 1.0)  # relative to the grand mean
        self._inner = (self._ones_mean.square() * self._inverse[:, None]).sum(0)  # m_1^T A m_1, [c]

    def linear(self) -> LinearMap:
        """The solved map."""
        s = self.spectrum
        ones, zeros = self.counts, s.count - self.counts
        safe_zeros = torch.where(self._present, zeros, 1.0)
        # n_1 m_1 + n_0 m_0 = 0 around the grand mean: delta = m_1 N / n_0, m_1 + m_0 = m_1 (1 - n_1 / n_0).
        ratio = s.count / safe_zeros
        denominator = (1 - (ones * safe_zeros / s.count) * ratio.square() * self._inner).clamp(min=_TINY)
        scale = torch.where(self._present, s.count * ratio / denominator, 0.0)
        weight = (s.basis @ (self._inverse[:, None] * self._ones_mean * scale)).T.contiguous()
        bias = -0.5 * (1 - ones / safe_zeros) * scale * self._inner - weight @ s.key_mean
        return LinearMap(weight, bias, _log_odds(ones, zeros, self.prior))

    @property
    def error_bound(self) -> float:
        """As in :class:`Readout`, of the direction of each row of W."""
        return _metric_bound(self.spectrum, float(self._inverse.sum()), self._inverse[:, None] * self._ones_mean)

    def leave_one_out(self, coordinates: Tensor, values: Tensor, weights: Tensor) -> LeaveOneOutScores:
        """As in :class:`Readout`; mu and the prior are those of the fit."""
        s = self.spectrum
        x = coordinates  # relative to the grand mean
        ones = values.to(x) > 0.5
        w = weights.to(x)[:, None]
        n, n_left = s.count, s.count - w
        # Without the row the total scatter is S_t - (w N / (N - w)) x x^T.
        x_a_x = (x.square() * self._inverse).sum(1, keepdim=True)
        f = w * n / n_left
        remaining = 1 - f * x_a_x
        defined = remaining > _TINY
        gain = f / torch.where(defined, remaining, 1.0)
        x_a_m = (x * self._inverse) @ self._ones_mean
        xx = x_a_x + gain * x_a_x.square()
        xm = x_a_m + gain * x_a_x * x_a_m
        mm = self._inner + gain * x_a_m.square()

        n1, n0 = self.counts - w * ones, (n - self.counts) - w * ~ones
        defined = defined & (n1 > _TINY * n) & (n0 > _TINY * n)
        n1, n0 = torch.where(defined, n1, 1.0), torch.where(defined, n0, 1.0)
        # The means without the row, as combinations a m_1 + b x of the mean of ones and the row.
        a1 = torch.where(ones, self.counts / n1, 1.0)
        b1 = torch.where(ones, -w / n1, 0.0)
        a0 = -self.counts / n0  # n_0 m_0 = -n_1 m_1
        b0 = torch.where(ones, 0.0, -w / n0)

        def product(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
            return a * c * mm + (a * d + b * c) * xm + b * d * xx

        da, db = a1 - a0, b1 - b0
        zero, one = torch.zeros_like(da), torch.ones_like(da)
        delta_delta = product(da, db, da, db)
        centre_delta = product(0.5 * (a1 + a0), 0.5 * (b1 + b0), da, db)
        scale = n_left / (1 - (n1 * n0 / n_left) * delta_delta).clamp(min=_TINY)
        scores = torch.where(defined, scale * (product(zero, one, da, db) - centre_delta), 0.0)
        log_prior = _log_odds(self.counts, n - self.counts, self.prior).expand_as(scores)
        return LeaveOneOutScores(scores, log_prior, ones.to(x), w * defined)


def _metric_bound(spectrum: Spectrum, precision_norm: float, solved: Tensor) -> float:
    """Bound of the relative error of A M, where A is an inverse of at most this norm and M the class means."""
    size = float(solved.norm())
    if not size:
        return 0.0 if spectrum.full else math.inf
    spread = spectrum.floor * precision_norm
    means = spectrum.floor * math.sqrt(spectrum.value_trace / spectrum.largest) * precision_norm / size
    return 2 * (spread + means) / (1 - spread) if spread < 1 else math.inf


def varies(ones: Tensor, count: float | Tensor) -> Tensor:
    """Which columns of 0/1 values hold both."""
    return (ones > _TINY * count) & (ones < (1 - _TINY) * count)


def below_average(scores: Tensor, shown: Tensor) -> Tensor:
    """Scores [..., c] of masked classes replaced by the average of the others'.

    With ``MASKED_LOGIT`` on top they are then never the highest, however large and negative the others are.
    """
    average = torch.where(shown, scores, 0.0).sum(-1, keepdim=True) / shown.sum()
    return torch.where(shown, scores, average)


def _as_labels(values: Tensor) -> Tensor:
    return values.long() if values.ndim == 1 else values.argmax(-1)


def _log_prior(counts: Tensor, prior: Tensor | None) -> Tensor:
    """Log class prior in the shape of ``counts``; classes without rows are masked."""
    if prior is None:
        prior = counts / counts.sum(-1, keepdim=True)
    log = torch.where(prior > 0, prior, 1.0).log().expand_as(counts)
    shown = (counts > 0) & (prior > 0)
    if not bool(shown.any()):
        raise ValueError("prior gives all probability to classes without rows.")
    return torch.where(shown, log, MASKED_LOGIT)


def _log_odds(ones: Tensor, zeros: Tensor, prior: Tensor | None) -> Tensor:
    """Log odds of a one in each column; columns that hold only zeros or only ones are masked."""
    odds = (ones / zeros).log() if prior is None else torch.logit(prior).clamp(MASKED_LOGIT, -MASKED_LOGIT)
    masked = torch.where(ones > zeros, -MASKED_LOGIT, MASKED_LOGIT).to(odds)
    return torch.where(varies(ones, ones + zeros), odds, masked)
