"""One temperature from leave-one-out scores, and the accuracy they promise."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_faast.associative.readout import LeaveOneOutScores
from lightning_faast.associative.spectrum import as_dense

#: Rows under which a temperature is noise.
MIN_ROWS = 50
#: Temperatures where there are fewer, by read-out: near what larger samples of image features led to (measured on
#: CIFAR-10 with EfficientNet-Lite0 and ViT-S/14 keys: 2.2 to 4.1 for the discriminant).
DEFAULT_TEMPERATURE = {"discriminant": 3.0, "regression": 0.2}
#: Range of the search: the mean spread of a row's scores over the temperature, in nats. Beyond the upper end lie only
#: scores that separate every row, whose likelihood would have no maximum.
_SPREADS = (1e-4, 1e2)
_BISECTIONS = 48


def log_loss(loo: LeaveOneOutScores, temperature: float, *, multilabel: bool) -> float:
    """Mean negative log likelihood of the leave-one-out scores at a temperature, in nats."""
    logits = loo.scores / temperature + loo.log_prior
    if multilabel:
        losses = F.binary_cross_entropy_with_logits(logits, loo.values.to(logits), reduction="none")
    else:
        losses = F.cross_entropy(logits, loo.values, reduction="none")[:, None]
    return float(weighted_mean(losses, loo.weights))


def fit_temperature(loo: LeaveOneOutScores, *, multilabel: bool) -> float | None:
    """The temperature of highest likelihood, or None where fewer than 50 rows are scored, or all scores are equal.

    The loss is convex in 1/T: its slope is bisected.
    """
    if int((loo.weights > 0).any(1).sum()) < MIN_ROWS:
        return None
    scores = loo.scores
    spread = scores.abs() if multilabel else scores - scores.mean(1, keepdim=True)
    scale = float(weighted_mean(spread.abs().mean(1, keepdim=True), (loo.weights > 0).any(1, keepdim=True).double()))
    if not (scale > 0 and math.isfinite(scale)):
        return None
    targets = loo.values if multilabel else as_dense(loo.values, scores.shape[1])
    weights = loo.weights.expand_as(scores)

    def slope(inverse: float) -> float:
        logits = scores * inverse + loo.log_prior
        probabilities = logits.sigmoid() if multilabel else logits.softmax(-1)
        return float((torch.where(weights > 0, (probabilities - targets) * scores, 0.0) * weights).sum())

    low, high = (math.log(nats / scale) for nats in _SPREADS)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if slope(math.exp(middle)) < 0:
            low = middle
        else:
            high = middle
    return math.exp(-(low + high) / 2)


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
