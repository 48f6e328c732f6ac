"""What a solve found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lightning_faast.associative.readout import LinearMap
from lightning_faast.associative.regularization import Choice

#: What values mean: labels or one-hot rows (``classes``), soft labels (``distribution``), 0/1 columns (``multilabel``).
Task = Literal["classes", "distribution", "multilabel", "regression"]


@dataclass(frozen=True)
class Solution:
    """What one solve found. All tensors float64.

    Attributes:
        task: What the values were taken for.
        readout: ``"regression"`` or ``"discriminant"``.
        weight: W [c, d], before temperature and prior (of the embedding where values are class embeddings).
        bias: b [c].
        log_prior: [c].
        temperature: Scores are divided by it to become logits.
        temperature_fitted: False where no row could be left out, or none is kept; the temperature is then 3 for a
            discriminant (the root of the number of classes where it saw one row of each) and 0.2 for a regression on
            classes, and 1 elsewhere.
        correction: What the sample adds to the logits of a discriminant, :func:`fit_correction`; else None.
        regularization: The chosen value, whether at its grid's edge, and the path (``grid`` and ``scores``).
        effective_rank: Sum of lambda f(lambda): the rank kept by a truncation, the degrees of freedom of a ridge.
        rank: Eigenvalues above the rounding floor.
        rounding_floor: Eigenvalues of the Gram under it are noise.
        error_bound: Bound on the relative error (Frobenius) of W from float64 rounding of the sums; infinite where an
            eigenvalue that matters cannot be told from rounding.
        below_floor: Whether a truncation threshold fell under the rounding floor, which then decided instead.
        shrinkage: k, by which class means n_c/(n_c + k) are shrunk towards their average (discriminant).
        r_squared: Training R^2 of the regression at this regularization, all columns together (around zero, not the
            mean, where no bias is fitted); NaN where the values do not vary.
        leave_one_out_accuracy: Estimate of the test accuracy from the training rows, before the correction; None
            without a reservoir, without classes, or where the leave-one-out scores do not exist.
        leave_one_out_loss: The same for the mean negative log likelihood.
        seconds: Wall time of the solve.
    """

    task: Task
    readout: str
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    log_prior: Tensor = field(repr=False)
    temperature: float
    temperature_fitted: bool
    correction: LinearMap | None = field(repr=False)
    regularization: Choice
    effective_rank: float
    rank: int
    rounding_floor: float
    error_bound: float
    below_floor: bool
    shrinkage: float
    r_squared: float
    leave_one_out_accuracy: float | None
    leave_one_out_loss: float | None
    seconds: float
