"""One temperature from leave-one-out scores, and the accuracy they promise."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_faast.associative.readout import LeaveOneOutScores
from lightning_faast.associative.spectrum import as_dense

#: What divides the scores where no row says better, and the centre of the prior where some do, by read-out: near what
#: samples of image and sentence keys led to (CIFAR-10 with EfficientNet-Lite0 and ViT-S/14, CLINC150, SST-2).
DEFAULT_TEMPERATURE = {"discriminant": 3.0, "regression": 0.2}
#: The search goes from the centre over so many powers of e to both sides.
_RANGE = 40.0
_STEPS = 100


def one_shot_temperature(classes: int) -> float:
    """What divides a discriminant's scores where every class has one row: the root of their number.

    Nothing but the ridge is known of the spread within a class, and divided by N it is smaller the more classes there
    are. The root is sharp enough where keys are good and safe where they are not (measured from 10 to 151 classes).
    """
    return math.sqrt(classes)


def log_loss(loo: LeaveOneOutScores, temperature: float, *, multilabel: bool) -> float:
    """Mean negative log likelihood of the leave-one-out scores at a temperature, in nats."""
    logits = loo.scores / temperature + loo.log_prior
    if multilabel:
        losses = F.binary_cross_entropy_with_logits(logits, loo.values.to(logits), reduction="none")
    else:
        losses = F.cross_entropy(logits, loo.values, reduction="none")[:, None]
    return float(weighted_mean(losses, loo.weights))


def fit_temperature(loo: LeaveOneOutScores, center: float, *, multilabel: bool) -> float | None:
    r"""The temperature of highest posterior probability, or None where no row is scored, or all scores are equal.

    .. math::
        \min_\beta \sum_i w_i \ell_i(\beta s_i + \log\pi) + \beta/\beta_0 - \log(\beta/\beta_0),
        \quad \beta = 1/T,\ \beta_0 = 1/\mathrm{center}

    The prior is a Gamma distribution with its mode at the center, worth about one row: a factor of e either way is one
    standard deviation. The sum is convex in 1/T, and its slope is followed to its one zero.
    """
    scores, multihot = loo.scores, loo.values if multilabel else as_dense(loo.values, loo.scores.shape[1])
    weights = loo.weights.expand_as(scores)
    spread = scores if multilabel else scores - scores.mean(1, keepdim=True)
    scale = float(torch.where(weights > 0, spread, 0.0).abs().max())
    if not (scale > 0 and math.isfinite(scale)):
        return None

    def slopes(log_inverse: float) -> tuple[float, float]:
        """First derivative of the sum by log(1/T), and a bound of the second."""
        inverse = math.exp(log_inverse)
        logits = scores * inverse + loo.log_prior
        probabilities = logits.sigmoid() if multilabel else logits.softmax(-1)
        first = torch.where(weights > 0, (probabilities - multihot) * spread, 0.0) * weights
        if multilabel:
            variance = probabilities * (1 - probabilities) * spread.square()
        else:
            mean = (probabilities * spread).sum(1, keepdim=True)
            variance = probabilities * (spread - mean).square()
        second = (torch.where(weights > 0, variance, 0.0) * weights).sum()
        ratio = inverse * center
        slope = inverse * float(first.sum()) + ratio - 1
        return slope, inverse**2 * float(second) + ratio + inverse * float(first.sum())

    low, high = -math.log(center) - _RANGE, -math.log(center) + _RANGE
    at = -math.log(center)
    for _ in range(_STEPS):  # Newton, within a bracket
        slope, curvature = slopes(at)
        low, high = (at, high) if slope < 0 else (low, at)
        following = at - slope / curvature if curvature > 0 else math.inf
        if not low < following < high:
            following = (low + high) / 2
        if abs(following - at) < 1e-12:
            break
        at = following
    return math.exp(-at)


def temperature_penalty(temperature: float, center: float) -> float:
    """Negative log density, in nats, of the prior of :func:`fit_temperature`; 0 at its mode."""
    ratio = center / temperature
    return ratio - math.log(ratio) - 1


def accuracy(loo: LeaveOneOutScores, temperature: float, *, multilabel: bool) -> float:
    """Leave-one-out accuracy: of rows, or of all the binary decisions where values are multi-hot."""
    logits = loo.scores / temperature + loo.log_prior
    if multilabel:
        right = (logits > 0) == (loo.values > 0.5)
    else:
        right = (logits.argmax(-1) == loo.values)[:, None]
    return float(weighted_mean(right.to(torch.float64), loo.weights))


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of values [R, c] under weights [R, 1] or [R, c]; NaN where all weights are 0."""
    weights = weights.expand_as(values)
    return (torch.where(weights > 0, values, 0.0) * weights).sum() / weights.sum()
