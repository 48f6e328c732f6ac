"""From statistics and a sample to a solution: what :class:`FastWeights` solves, without its buffers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_faast.associative import calibration, correction
from lightning_faast.associative.readout import (
    MASKED_LOGIT,
    Discriminant,
    LeaveOneOutScores,
    LinearMap,
    PairedDiscriminants,
    Readout,
    Regression,
    below_average,
    varies,
)
from lightning_faast.associative.regularization import Choice, Regularization
from lightning_faast.associative.reservoir import Reservoir
from lightning_faast.associative.solution import Solution, Task
from lightning_faast.associative.spectrum import Spectrum
from lightning_faast.associative.statistics import SufficientStatistics

#: Regression on 0/1 values decides at one half; taken from the bias, a logit above 0 means "more likely 1 than 0".
_DECISION = 0.5
#: Keys [N, d], values and weights of all rows there are.
Rows = tuple[Tensor, Tensor, Tensor]


@dataclass
class Solver:
    """One solve.

    Args:
        statistics: The sums.
        reservoir: The sample for leave-one-out scores.
        regularization: How much to regularize.
        readout: As in :class:`FastWeights`, and so are the others.
        has_bias: Whether a bias is fitted.
        prior: Class prior.
        shrink_means: Whether class means are shrunk.
        correct: Whether a discriminant's logits are corrected by the sample.
        empty_classes: ``"error"`` or ``"mask"``.
        embeds: Whether values are class embeddings.
        outputs: What the whole layer makes of this solver's scores [R, c] of keys [R, d] before temperature and
            prior: class embeddings, zero-shot blend.
    """

    statistics: SufficientStatistics
    reservoir: Reservoir
    regularization: Regularization
    readout: str
    has_bias: bool
    prior: Literal["frequency", "uniform"] | list[float] | Tensor
    shrink_means: bool
    correct: bool
    empty_classes: str
    embeds: bool
    outputs: Callable[[Tensor, Tensor], Tensor]

    def solve(self, rows: Rows | None = None) -> Solution:
        """Solve, by the dual form where all ``rows`` are given and they are well under d."""
        start = time.perf_counter()
        stats = self.statistics
        self.task = self._task()
        self._refuse_empty_classes(self.task)
        self.readout_name = self._readout_for(self.task)
        self.spectrum = self._decompose(rows)
        self._coordinates: Tensor | None = None
        sampled = len(self.reservoir) > 0 and self.reservoir.seen == stats.rows
        evaluate = (lambda choice: self._loss(self._held_out(choice))) if self._can_evaluate(sampled) else None
        choice = self.regularization.choose(self.spectrum, evaluate)
        readout = self._read_out(choice, self._prior_tensor(self.task))
        linear = self._adjusted(readout.linear())
        loo = self._held_out(choice) if sampled and self.task in ("classes", "multilabel") else None
        temperature = self._temperature(loo)
        accuracy, loss = self._promise(loo, temperature or self._center(loo), linear.log_prior)
        spectrum, filtered = self.spectrum, choice.filter(self.spectrum)
        return Solution(
            task=self.task,
            readout=self.readout_name,
            weight=linear.weight,
            bias=linear.bias,
            log_prior=linear.log_prior,
            temperature=temperature or self._center(loo),
            temperature_fitted=temperature is not None,
            correction=self._correction(loo, temperature),
            regularization=choice,
            effective_rank=float((spectrum.eigenvalues * filtered).sum()),
            rank=spectrum.rank,
            rounding_floor=spectrum.floor,
            error_bound=readout.error_bound,
            below_floor=choice.kind == "truncation" and choice.value**2 * spectrum.largest < spectrum.floor,
            shrinkage=readout.shrinkage if isinstance(readout, Discriminant) else 0.0,
            r_squared=_r_squared(spectrum, filtered),
            leave_one_out_accuracy=accuracy,
            leave_one_out_loss=loss,
            seconds=time.perf_counter() - start,
        )

    # ------------------------------------------------------------------ what is asked

    def _task(self) -> Task:
        stats = self.statistics
        if not stats.rows:
            raise RuntimeError(
                "No rows were seen: there is nothing to solve. Call fit, or update with at least one row."
            )
        if not stats.count > 0:
            raise RuntimeError("Every row has weight 0: there is nothing to solve.")
        if stats.labels:
            return "classes"
        if stats.values_are_binary:
            single = stats.value_sum.shape[0] == 1
            return "classes" if stats.values_are_distributions and not single else "multilabel"
        return "distribution" if stats.values_are_distributions else "regression"

    def _readout_for(self, task: Task) -> str:
        discriminates = task in ("classes", "multilabel")
        if self.readout == "discriminant" and not discriminates:
            raise ValueError(
                f"readout='discriminant' needs class labels, one-hot or multi-hot values; these values are a {task}: "
                "use readout='regression' or 'auto'."
            )
        able = self.regularization.is_ridge and self.has_bias and not self.embeds
        if self.readout == "auto":
            return "discriminant" if discriminates and able else "regression"
        return self.readout

    def _refuse_empty_classes(self, task: Task) -> None:
        if task == "classes":
            counts = self.statistics.class_counts
            empty = torch.nonzero(counts <= 0).flatten().tolist()
        elif task == "multilabel":
            counts = self.statistics.value_sum
            empty = torch.nonzero(~varies(counts, self.statistics.count)).flatten().tolist()
        else:
            return
        if not empty or self.embeds:  # an embedding predicts classes it never saw
            return
        if self.empty_classes == "error":
            shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
            what = "without a row" if task == "classes" else "with only zeros or only ones"
            raise ValueError(
                f"{len(empty)} of {len(counts)} classes {what}: {shown}. Add examples, lower out_features, "
                "or use empty_classes='mask' to give such classes probability 0."
            )
        if not self.has_bias:
            raise ValueError("empty_classes='mask' needs a bias: use bias=True, or add examples of every class.")

    def _decompose(self, rows: Rows | None) -> Spectrum:
        if rows is None or 2 * rows[0].shape[0] > rows[0].shape[1]:
            return Spectrum.from_statistics(self.statistics, centered=self.has_bias)
        return Spectrum.from_rows(self.statistics, *rows, centered=self.has_bias)

    def _prior_tensor(self, task: Task) -> Tensor | None:
        device = self.statistics.device
        if isinstance(self.prior, str):
            if self.prior == "frequency":
                return None
            c = self.statistics.value_sum.shape[0]
            if task == "multilabel":
                return torch.full((c,), 0.5, dtype=torch.float64, device=device)
            present = (self.statistics.class_counts > 0).to(torch.float64)
            return present / present.sum()
        prior = torch.as_tensor(self.prior, dtype=torch.float64, device=device)
        c = self.statistics.value_sum.shape[0]
        proper = prior.shape == (c,) and bool((prior >= 0).all()) and bool((prior <= 1).all())
        if not proper or (task == "classes" and abs(float(prior.sum()) - 1) > 1e-4):
            raise ValueError(f"prior must be {c} probabilities that sum to one, got {self.prior}.")
        return prior

    # ------------------------------------------------------------------ what is answered

    def _can_evaluate(self, sampled: bool) -> bool:
        if self.regularization.metric == "nats":
            return sampled and self.reservoir.complete and self.readout_name == "discriminant"
        return sampled

    def _read_out(self, choice: Choice, prior: Tensor | None) -> Readout:
        if self.readout_name == "regression":
            return Regression(self.spectrum, choice)
        if self.task == "multilabel":
            return PairedDiscriminants(self.spectrum, choice, self.statistics.value_sum, prior)
        return Discriminant(self.spectrum, choice, self.statistics.class_counts, prior, self.shrink_means)

    def _adjusted(self, linear: LinearMap) -> LinearMap:
        """A regression's decision and its classes without rows: the discriminants see to theirs themselves."""
        if self.readout_name != "regression" or self.task not in ("classes", "multilabel"):
            return linear
        bias = linear.bias - _DECISION if self.task == "multilabel" else linear.bias
        log_prior, shown = self._mask(linear.log_prior)
        if self.task == "classes":
            return LinearMap(below_average(linear.weight.T, shown).T, below_average(bias, shown), log_prior)
        return LinearMap(torch.where(shown[:, None], linear.weight, 0.0), bias, log_prior)

    def _mask(self, log_prior: Tensor) -> tuple[Tensor, Tensor]:
        """A regression's log prior with empty classes masked, and which classes are not."""
        ones, count = self.statistics.value_sum, self.statistics.count
        if self.empty_classes == "error" or self.embeds:
            return log_prior, torch.ones_like(ones, dtype=torch.bool)
        shown = varies(ones, count) if self.task == "multilabel" else ones > 0
        always = 2 * ones > count if self.task == "multilabel" else torch.zeros_like(shown)
        masked = torch.where(always, -MASKED_LOGIT, MASKED_LOGIT).to(log_prior)
        return torch.where(shown, log_prior, masked), shown

    def _held_out(self, choice: Choice) -> LeaveOneOutScores:
        """Leave-one-out scores as the whole layer would give them: through class embeddings and zero-shot blend.

        At the training frequencies, whatever prior is asked for: that is how often the sampled rows' classes come.
        """
        r = self.reservoir
        if self._coordinates is None:  # the same for every choice
            self._coordinates = self.spectrum.coordinates(r.keys)
        loo = self._read_out(choice, None).leave_one_out(self._coordinates, r.values, r.weights)
        values = loo.values.argmax(-1) if self.task == "classes" and loo.values.ndim == 2 else loo.values
        scores, log_prior, weights = loo.scores, loo.log_prior, loo.weights
        if self.task == "classes":  # the last row of its class says nothing of how well that class is known
            own = self.statistics.class_counts.to(scores)[values]
            weights = weights * (own > r.weights.to(scores) * (1 + 1e-9))[:, None]
        if self.readout_name == "regression" and self.task in ("classes", "multilabel"):
            if self.task == "multilabel":
                scores = scores - _DECISION
            log_prior, shown = self._mask(log_prior)
            scores = below_average(scores, shown) if self.task == "classes" else scores
        return LeaveOneOutScores(self.outputs(scores, r.keys.to(scores)), log_prior, values, weights)

    def _center(self, loo: LeaveOneOutScores | None) -> float:
        """The temperature where no row says better: 1 for outputs that are no class scores."""
        if self.task not in ("classes", "multilabel") or self.embeds:
            return 1.0
        if self.readout_name == "discriminant" and loo is not None and not _any(loo):
            return calibration.one_shot_temperature(int((self.statistics.value_sum > 0).sum()))
        return calibration.DEFAULT_TEMPERATURE[self.readout_name]

    def _temperature(self, loo: LeaveOneOutScores | None) -> float | None:
        if loo is None or not _any(loo):
            return None
        return calibration.fit_temperature(loo, self._center(loo), multilabel=self.task == "multilabel")

    def _promise(
        self, loo: LeaveOneOutScores | None, temperature: float, log_prior: Tensor
    ) -> tuple[float | None, float | None]:
        """Leave-one-out accuracy and loss, at the prior that was asked for and without the correction."""
        if loo is None or not _any(loo):
            return None, None
        if self.readout_name == "discriminant":
            loo = replace(loo, log_prior=log_prior.expand_as(loo.scores))
        multilabel = self.task == "multilabel"
        return (
            calibration.accuracy(loo, temperature, multilabel=multilabel),
            calibration.log_loss(loo, temperature, multilabel=multilabel),
        )

    def _correction(self, loo: LeaveOneOutScores | None, temperature: float | None) -> LinearMap | None:
        if not self.correct or self.task != "classes" or self.readout_name != "discriminant":
            return None
        if loo is None or self._coordinates is None or temperature is None:  # nothing was left out
            return None
        rows, classes = int((loo.weights > 0).sum()), int((self.statistics.class_counts > 0).sum())
        if not correction.can_correct(rows, classes, complete=self.reservoir.complete):
            return None
        return correction.fit_correction(self.spectrum, self._coordinates, loo, temperature)

    def _loss(self, loo: LeaveOneOutScores) -> float:
        metric, multilabel = self.regularization.metric, self.task == "multilabel"
        if callable(metric):
            kept = (loo.weights > 0).any(1)
            return float(metric((loo.scores + loo.log_prior)[kept], loo.values[kept]))
        if metric == "squared_error" or self.task not in ("classes", "multilabel"):
            dense = loo.values if loo.values.ndim == 2 else F.one_hot(loo.values, loo.scores.shape[1])
            decision = _DECISION if multilabel and self.readout_name == "regression" else 0.0
            return float(calibration.weighted_mean((loo.scores + decision - dense).square(), loo.weights))
        if not _any(loo):
            return math.nan
        center = self._center(loo)
        temperature = self._temperature(loo) or center
        if metric == "error":
            return 1 - calibration.accuracy(loo, temperature, multilabel=multilabel)
        loss = calibration.log_loss(loo, temperature, multilabel=multilabel)
        if metric == "log_loss":
            return loss
        nats = loss * float(loo.weights.expand_as(loo.scores if multilabel else loo.weights).sum())
        return nats + calibration.temperature_penalty(temperature, center)


def _any(loo: LeaveOneOutScores) -> bool:
    """Whether any row has a score."""
    return bool((loo.weights > 0).any())


def _r_squared(spectrum: Spectrum, filtered: Tensor) -> float:
    if spectrum.value_trace <= 0:
        return float("nan")
    explained = spectrum.projected.square().sum(1) / spectrum.eigenvalues
    left = 1 - spectrum.eigenvalues * filtered
    unreachable = 0.0 if spectrum.interpolates else max(0.0, spectrum.value_trace - float(explained.sum()))
    return 1 - (unreachable + float((explained * left.square()).sum())) / spectrum.value_trace
