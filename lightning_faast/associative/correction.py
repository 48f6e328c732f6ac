"""What a Gaussian discriminant misses, learnt from its own leave-one-out scores by logistic regression."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_faast.associative.readout import LeaveOneOutScores, LinearMap
from lightning_faast.associative.spectrum import Spectrum, as_dense

#: Precision of a correction's coefficients on keys of unit mean square length: a prior standard deviation of about a
#: third of a nat for each logit. From 3 to 20 the measured differences are small (docs/mathematics.md).
PRECISION = 8.0
#: Sampled rows a class, on average, that a sample of part of the rows must have.
ROWS_PER_CLASS = 20
#: Sampled rows from which on the precision is chosen on a fifth of them: many rows speak for themselves.
ROWS_TO_CHOOSE = 4000
_MOST_DIVISIONS = 5
#: The optimum is unique; it is found to this gradient in unit curvature, so that logits are right to about 1e-4.
_TOLERANCE = 1e-4
_STEPS = 200


def can_correct(rows: int, classes: int, *, complete: bool) -> bool:
    """Whether a sample says enough: all rows there are, or 20 a class."""
    return rows > 0 and (complete or rows >= ROWS_PER_CLASS * classes)


def fit_correction(spectrum: Spectrum, coordinates: Tensor, loo: LeaveOneOutScores, temperature: float) -> LinearMap:
    r"""The correction of highest posterior probability, B and b of logits = scores/T + log prior + B x + b.

    .. math::
        \min_{B, b} \sum_i -\log \mathrm{softmax}(s_i/T + \log\pi + B z_i + b)_{y_i}
        + \tfrac{\kappa}{2} (\|B\|^2 + \|b\|^2),
        \quad \kappa = 8 \sqrt{N/R}

    where the s_i are the leave-one-out scores of the sampled rows, z_i their keys, centred and of unit mean square
    length. A discriminant is the efficient answer where its classes are Gaussian with one covariance; logistic
    regression is right elsewhere as well, and needs more rows. This is the second, with the first as its prior mean;
    what it fits is what the first gets wrong of rows that it has not seen. The more rows the sample stands for
    (N/R each), the better the discriminant is known, and the less is left to correct. From 4,000 sampled rows on
    :math:`\kappa` is divided by four for as long as that makes a held-out fifth of them more likely.

    Args:
        spectrum: Centred.
        coordinates: :meth:`Spectrum.coordinates` of the sampled rows, [R, r].
        loo: Their leave-one-out scores, with the log prior of the training frequencies.
        temperature: T.

    Returns:
        B [c, d] and b [c], in nats; ``log_prior`` is 0.
    """
    total = spectrum.eigenvalues.sum()
    weights = loo.weights
    precision = PRECISION * max(1.0, spectrum.count / float(weights.sum())) ** 0.5
    classes = loo.scores.shape[1]
    if not bool(total > 0):
        zero = torch.zeros_like(spectrum.value_mean)
        return LinearMap(spectrum.basis.new_zeros(classes, spectrum.basis.shape[0]), zero, zero)
    scale = (spectrum.count / total).sqrt()
    sample = _Sample(
        z=F.pad(coordinates * scale, (0, 1), value=1.0),  # the last column is the bias
        offset=loo.scores / temperature + loo.log_prior,
        targets=as_dense(loo.values, classes),
        weights=weights,
        eigenvalues=F.pad(spectrum.eigenvalues / total, (0, 1), value=1.0),
    )
    if len(weights) >= ROWS_TO_CHOOSE:
        precision = _choose(sample, precision)
    coefficients = sample.optimum(precision)
    weight = scale * (spectrum.basis @ coefficients[:-1]).T.contiguous()
    bias = coefficients[-1] - weight @ spectrum.key_mean
    return LinearMap(weight, bias, torch.zeros_like(bias))


def _choose(sample: _Sample, precision: float) -> float:
    """The precision, divided by powers of four for as long as that makes a held-out fifth of the sample more likely."""
    held = torch.arange(len(sample.weights), device=sample.weights.device) % 5 == 0
    rest, held_out = sample.select(~held), sample.select(held)
    best = held_out.loss(rest.optimum(precision))
    for _ in range(_MOST_DIVISIONS):
        loss = held_out.loss(rest.optimum(precision / 4))
        if loss >= best:
            break
        best, precision = loss, precision / 4
    return precision


@dataclass(frozen=True)
class _Sample:
    """Sampled rows in the basis of the eigenvectors, where the curvature is all but diagonal.

    Attributes:
        z: Keys and a one, [R, r + 1].
        offset: Logits of the discriminant [R, c].
        targets: [R, c].
        weights: [R, 1] or [R, c].
        eigenvalues: Mean squares of the columns of z [r + 1].
    """

    z: Tensor
    offset: Tensor
    targets: Tensor
    weights: Tensor
    eigenvalues: Tensor

    def select(self, rows: Tensor) -> _Sample:
        """Some of the rows."""
        kept = (self.z[rows], self.offset[rows], self.targets[rows], self.weights[rows])
        return _Sample(*kept, self.eigenvalues)

    def loss(self, coefficients: Tensor) -> float:
        """Negative log likelihood."""
        log_probabilities = (self.offset + self.z @ coefficients).log_softmax(1)
        return float(-(self.weights * self.targets * log_probabilities).sum())

    def optimum(self, precision: float) -> Tensor:
        """Coefficients [r + 1, c] of highest posterior probability."""
        curvature = self.eigenvalues * self.weights.sum() / 4 + precision
        step = curvature.rsqrt()[:, None]  # unit curvature for all
        shape = (self.z.shape[1], self.offset.shape[1])
        scaled = torch.zeros(shape, dtype=self.z.dtype, device=self.z.device)
        optimizer = torch.optim.LBFGS(
            [scaled], max_iter=_STEPS, tolerance_grad=_TOLERANCE, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            coefficients = step * scaled
            log_probabilities = (self.offset + self.z @ coefficients).log_softmax(1)
            residual = self.weights * (log_probabilities.exp() - self.targets)
            scaled.grad = step * (self.z.T @ residual + precision * coefficients)
            fit = -(self.weights * self.targets * log_probabilities).sum()
            return fit + precision / 2 * coefficients.square().sum()

        optimizer.step(loss)
        return step * scaled
