"""What a Gaussian discriminant misses, learnt from its own leave-one-out scores by logistic regression."""

from __future__ import annotations

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
    (N/R each), the better the discriminant is known, and the less is left to correct.

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
    z = F.pad(coordinates * scale, (0, 1), value=1.0)  # the last column is the bias
    offset = loo.scores / temperature + loo.log_prior
    targets = as_dense(loo.values, classes)
    # In the eigenvectors' basis the curvature is all but diagonal, with the eigenvalues on it: unit curvature for all.
    curvature = F.pad(spectrum.eigenvalues / total, (0, 1), value=1.0) * weights.sum() / 4 + precision
    step = curvature.rsqrt()[:, None]
    scaled = torch.zeros(z.shape[1], classes, dtype=z.dtype, device=z.device)
    optimizer = torch.optim.LBFGS(
        [scaled], max_iter=_STEPS, tolerance_grad=_TOLERANCE, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        coefficients = step * scaled
        log_probabilities = (offset + z @ coefficients).log_softmax(1)
        residual = weights * (log_probabilities.exp() - targets)
        scaled.grad = step * (z.T @ residual + precision * coefficients)
        fit = -(weights * targets * log_probabilities).sum()
        return fit + precision / 2 * coefficients.square().sum()

    optimizer.step(loss)
    coefficients = step * scaled
    weight = scale * (spectrum.basis @ coefficients[:-1]).T.contiguous()
    bias = coefficients[-1] - weight @ spectrum.key_mean
    return LinearMap(weight, bias, torch.zeros_like(bias))
