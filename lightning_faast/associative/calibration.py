"""One temperature from leave-one-out scores, and the accuracy they promise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_faast.associative.readout import LeaveOneOutScores

#: Rows under which a temperature is noise.
MIN_ROWS = 50
#: Temperatures where there are fewer, by read-out: near what larger samples of image features led to (measured on
#: CIFAR-10 with EfficientNet-Lite0 and ViT-S/14 keys: 2.2 to 4.1 for the discriminant).
DEFAULT_TEMPERATURE = {"discriminant": 3.0, "regression": 0.2}
#: Range of the search, as powers of ten.
_LOG10_RANGE = (-3.0, 5.0)
_POINTS = 25
_ROUNDS = 4


def log_loss(loo: LeaveOneOutScores, temperature: float, *, multilabel: bool) -> float:
    """Mean negative log likelihood of the leave-one-out scores at a temperature, in nats."""
    logits = loo.scores / temperature + loo.log_prior
    if multilabel:
        losses = F.binary_cross_entropy_with_logits(logits, loo.values.to(logits), reduction="none")
    else:
        losses = F.cross_entropy(logits, loo.values, reduction="none")[:, None]
    return float(weighted_mean(losses, loo.weights))


def fit_temperature(loo: LeaveOneOutScores, *, multilabel: bool) -> float | None:
    """The temperature of highest likelihood, or None where fewer than 50 rows are scored.

    The likelihood is unimodal in 1/T, so a grid refined around its best point a few times finds it to five digits.
    """
    if int((loo.weights > 0).any(1).sum()) < MIN_ROWS:
        return None
    low, high = _LOG10_RANGE
    for _ in range(_ROUNDS):
        grid = torch.linspace(low, high, _POINTS, dtype=torch.float64)
        losses = [log_loss(loo, 10.0 ** float(t), multilabel=multilabel) for t in grid]
        best = min(range(_POINTS), key=losses.__getitem__)
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _POINTS - 1)])
    return 10.0 ** float(grid[best])


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
