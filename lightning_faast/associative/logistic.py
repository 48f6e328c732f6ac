"""LogisticRegression on stored keys: L-BFGS, strength chosen on a held-out fifth."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_faast.associative.bank import Bank
from lightning_faast.associative.linear import LinearLearner
from lightning_faast.associative.precision import accumulation_device

#: Half decades of scikit-learn's C, from 10^-6 to 10^8: keys may be anything from 0.01 to 100 long.
_STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-12, 17))
#: The path ends where so many strengths in a row (two decades) have not been better.
_PATIENCE = 4
#: Where the strength cannot be chosen; scikit-learn's default.
_DEFAULT_STRENGTH = 1.0
#: One row in so many is held out.
_FOLD = 5
#: A choice by fewer held-out rows would be noise.
_FEWEST_HELD_OUT = 4
_CLEARLY_WORSE = 1.02
#: Largest gradient of the mean loss, in coordinates in which its curvature is about one; on the path to the choice
#: relative to the loss, since separable rows have hardly any gradient long before they are fitted.
_TOLERANCE, _PATH_TOLERANCE = 1e-6, 3e-4


class LogisticRegression(LinearLearner):
    r"""Multinomial logistic regression on stored keys: the strong linear probe.

    Minimizes :math:`\sum_i w_i \ell_i + |W|^2/(2C)`, scikit-learn's objective: cross entropies and a penalty on the
    weights, not on the bias (for two classes on the difference of their weights). It ends in the optimum that
    ``sklearn.linear_model.LogisticRegression(C)`` looks for.

    The strength C is the one of least likelihood loss on a held-out fifth of the rows, seeded and stratified by class;
    then all rows are fitted again. Strengths are tried from the smallest C on, until four are clearly worse than the
    best. A class of one row is never held out. Where fewer than four rows would be held out (as with fewer than 18
    rows in all, or one row a class), C stays 1 and no held-out figures are reported.

    Every key is kept, in the dtype in which it came. The problem is solved in the principal axes of the keys, scaled by
    the curvature there, in which L-BFGS needs few iterations at any strength; neither changes the objective.

    Args:
        in_features: Width d of the keys; from the first batch where not given.
        out_features: Number of classes c; from the labels where not given.
        strengths: Values of C to choose among, by default the half decades from 10^-6 to 10^8; a single one is taken
            as it is.
        class_weight: ``"balanced"`` weighs the rows of class c by N/(c N_c), as scikit-learn does, in the fit and in
            the held-out loss.
        max_iterations: Of L-BFGS, for one strength; a fit that needs more is warned about.
        class_embeddings: Refused: values are labels.
        seed: Of the held-out fifth.

    Attributes:
        weight: [c, d].
        bias: [c].

    Example:
        >>> import torch
        >>> from lightning_faast.associative import LogisticRegression
        >>> keys = torch.randn(300, 16)
        >>> labels = (keys[:, 0] > 0).long()
        >>> probe = LogisticRegression().fit(keys[:200], labels[:200])
        >>> probe.score(keys[200:], labels[200:]) > 0.8
        True
    """

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        strengths: Sequence[float] = _STRENGTHS,
        class_weight: Literal["balanced"] | None = None,
        max_iterations: int = 1000,
        class_embeddings: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, class_embeddings)
        if not strengths or not all(0 < strength < math.inf for strength in strengths):
            raise ValueError(f"strengths must be positive numbers, one at least, got {strengths}.")
        if class_weight not in (None, "balanced"):
            raise ValueError(f"class_weight must be 'balanced' or None, got {class_weight!r}.")
        if max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {max_iterations}.")
        self.strengths = sorted(strengths)
        self.class_weight = class_weight
        self.max_iterations = max_iterations
        self.seed = seed
        self._choice: _Choice | None = None
        self.reset()

    # ------------------------------------------------------------------ learning

    def reset(self) -> None:
        """Forget every row seen; the solved weights stay until the next solve."""
        d, c = self._declared
        self._bank = Bank(c, d)

    def update(
        self, keys: Tensor, values: Tensor, weights: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Keep rows.

        Args:
            keys: [..., d], any floating dtype.
            values: Labels [...] or [..., 1].
            weights: Not taken: repeat rows, or use ``class_weight``.
            positions: Optional int64 [rows] on the CPU: places of these rows in the whole stream.

        Raises:
            ValueError: For NaN or infinite keys, labels out of range, values that are no labels, keys of another width.
                Devices other than the CPU tell at the next solve, or every 64 batches.
        """
        if weights is not None:
            raise ValueError("LogisticRegression takes no weights: repeat rows, or use class_weight='balanced'.")
        self._bank.update(*self._rows_of(keys, values), positions)

    def reduce(self, add: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Replace the rows of this process by those of all, in the order of their positions."""
        self._bank.reduce(gather, self.weight.device)

    @property
    def rows(self) -> int:
        """Rows seen since the last :meth:`reset`."""
        return self._bank.seen

    @torch.inference_mode(False)
    @torch.no_grad()
    def solve(self) -> None:
        """Choose the strength and fit.

        Raises:
            RuntimeError: Where no row was seen.
            ValueError: For a class without rows, or where there is only one class.
        """
        keys, labels = self._bank.joined()
        counts = torch.bincount(labels, minlength=self._declared[1] or 0)
        if len(counts) < 2:
            raise ValueError("There is only one class: at least two are needed.")
        self._refuse_empty_classes(counts)
        weights = torch.ones(len(labels), dtype=torch.float64)
        if self.class_weight == "balanced":
            weights = (len(labels) / (len(counts) * counts.to(torch.float64)))[labels]
        axes = _Axes.of(keys.to(accumulation_device(keys.device), torch.float64))
        problem = _Problem(axes.coordinates, axes.variances, labels, weights, len(counts), self.max_iterations)
        self._choice, start = self._choose(problem, labels)
        solution = problem.minimize(self._choice.strength, start, _TOLERANCE)
        if not solution.converged:
            warnings.warn(
                f"L-BFGS did not converge in {self.max_iterations} iterations at C = {self._choice.strength:g}: raise "
                "max_iterations, or leave out larger strengths.",
                stacklevel=2,
            )
        self._publish_linear(*axes.restored(solution.weight, solution.bias))

    def _choose(self, problem: _Problem, labels: Tensor) -> tuple[_Choice, _Optimum | None]:
        """The strength of least loss on the held-out rows, and the optimum of the others there, to start from."""
        if len(self.strengths) == 1:
            return _Choice(self.strengths[0]), None
        held_out = _held_out(labels.cpu(), self.seed).to(labels.device)
        if int(held_out.sum()) < _FEWEST_HELD_OUT:
            return _Choice(_DEFAULT_STRENGTH), None
        seen, unseen = problem.part(~held_out), problem.part(held_out)  # in float32: twice as fast, and exact enough
        best: tuple[_Choice, _Optimum | None] = (_Choice(self.strengths[0]), None)
        best_loss, worse, optimum = math.inf, 0, None
        for strength in self.strengths:  # from strong to weak penalties, each from where the last one ended
            tolerance = _PATH_TOLERANCE * (1.0 if optimum is None else min(1.0, optimum.loss**0.5))
            optimum = seen.minimize(strength, optimum, tolerance)
            loss, accuracy = unseen.evaluate(optimum)
            if loss < best_loss:
                at_edge = strength in (self.strengths[0], self.strengths[-1])
                best, best_loss, worse = (_Choice(strength, loss, accuracy, at_edge), optimum), loss, 0
            elif loss > _CLEARLY_WORSE * best_loss:  # under a strong penalty all losses are all but equal, up and down
                worse += 1
                if worse == _PATIENCE:
                    break
        return best

    # ------------------------------------------------------------------ state and reporting

    def learned_state(self) -> dict[str, Tensor]:
        """The rows seen, flat."""
        return self._bank.state_dict()

    def load_learned_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`learned_state`.

        Raises:
            ValueError: For a damaged state, or one of other sizes.
        """
        self._bank.load_state_dict(state)

    @property
    def bytes_to_update(self) -> int:
        """Bytes of the rows kept."""
        return self._bank.num_bytes

    def figures(self) -> dict[str, float]:
        """``strength`` and, where it was chosen, ``at_edge``, ``held_out_accuracy`` and ``held_out_loss``."""
        choice = self._last_choice()
        if choice.loss is None:
            return {"strength": choice.strength}
        return {
            "strength": choice.strength,
            "at_edge": float(choice.at_edge),
            "held_out_accuracy": float(choice.accuracy or 0),
            "held_out_loss": choice.loss,
        }

    def summary(self) -> str:
        """Strength and held-out accuracy."""
        choice = self._last_choice()
        edge = " (at the grid's edge)" if choice.at_edge else ""
        found = "not chosen" if choice.accuracy is None else f"held-out accuracy {choice.accuracy:.3f}"
        return f"logistic regression, C = {choice.strength:.3g}{edge}, {found}"

    def _last_choice(self) -> _Choice:
        if self._choice is None:
            raise RuntimeError("LogisticRegression was not solved in this process: call fit(keys, labels).")
        return self._choice


@dataclass(frozen=True)
class _Choice:
    """A strength and, where it was chosen, how it did on the held-out rows."""

    strength: float
    loss: float | None = None
    accuracy: float | None = None
    at_edge: bool = False


def _held_out(labels: Tensor, seed: int) -> Tensor:
    """Mask [N] of a fifth of the rows: every fifth of the shuffled rows in the order of their classes.

    So each class gives a fifth of its rows, give or take one; classes of one row give none.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    order = order[torch.bincount(labels)[labels[order]] > 1]
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[order[_FOLD // 2 :: _FOLD]] = True
    return mask


@dataclass(frozen=True)
class _Axes:
    """Keys in their principal axes, which neither the penalty nor an unpenalized bias can tell from the keys.

    Attributes:
        mean: [d].
        directions: Orthonormal columns [d, r] that span the keys less their mean.
        coordinates: [N, r].
        variances: Of the coordinates [r].
    """

    mean: Tensor
    directions: Tensor
    coordinates: Tensor
    variances: Tensor

    @classmethod
    def of(cls, keys: Tensor) -> _Axes:
        """Of keys [N, d] float64."""
        mean = keys.mean(0)
        keys = keys - mean
        basis = None
        if len(keys) < keys.shape[1]:  # the penalty leaves no weight outside the span of the rows
            basis, r = torch.linalg.qr(keys.T)
            keys = r.T
        variances, directions = torch.linalg.eigh(keys.T @ keys / len(keys))
        coordinates = keys @ directions
        return cls(mean, directions if basis is None else basis @ directions, coordinates, variances.clamp(min=0))

    def restored(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [c, d] and bias [c] for keys, of weight [c, r] and bias [c] for coordinates."""
        weight = weight @ self.directions.T
        return weight, bias - weight @ self.mean


@dataclass(frozen=True)
class _Optimum:
    """A minimum: weight [c, r] and bias [c], the penalized mean loss there, and whether L-BFGS got there."""

    weight: Tensor
    bias: Tensor
    loss: float
    converged: bool


@dataclass(frozen=True)
class _Problem:
    """Weighted cross entropy of labels [N] given coordinates [N, r], and its penalized minimum."""

    coordinates: Tensor
    variances: Tensor
    labels: Tensor
    weights: Tensor
    num_classes: int
    max_iterations: int

    def part(self, mask: Tensor) -> _Problem:
        """Some of the rows, in float32."""
        coordinates, weights = self.coordinates[mask].float(), self.weights[mask].float()
        return _Problem(
            coordinates, self.variances.float(), self.labels[mask], weights, self.num_classes, self.max_iterations
        )

    def minimize(self, strength: float, start: _Optimum | None, tolerance: float) -> _Optimum:
        c, total = self.num_classes, float(self.weights.sum())
        # Two classes: scikit-learn penalizes one vector w = w_1 - w_0; with w_1 = -w_0 that is twice |w_0|^2 + |w_1|^2.
        penalty = (2 if c == 2 else 1) / (strength * total)
        shares = self.weights[:, None] / total
        curvature = (c - 1) / c**2  # of the cross entropy: the mean p (1 - p), here of equally likely classes
        if start is not None:
            p = self._logits(start).softmax(1)
            curvature = float((p * (1 - p) * shares).sum()) / c
        scale = torch.cat([curvature * self.variances + penalty, self.variances.new_full((1,), curvature)]).rsqrt()
        parameters = self.coordinates.new_zeros(c, len(scale))
        if start is not None:
            parameters = torch.cat([start.weight, start.bias[:, None]], 1).to(scale) / scale
        parameters.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [parameters],
            max_iter=self.max_iterations,
            max_eval=10 * self.max_iterations,
            tolerance_grad=tolerance,
            tolerance_change=0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        @torch.no_grad()
        def objective() -> Tensor:
            scaled = parameters * scale
            weight, bias = scaled[:, :-1], scaled[:, -1]
            log_probabilities = F.linear(self.coordinates, weight, bias).log_softmax(1)
            loss = -(log_probabilities.gather(1, self.labels[:, None]) * shares).sum()
            error = log_probabilities.exp_()
            error.scatter_add_(1, self.labels[:, None], -torch.ones_like(shares))
            error *= shares
            gradient = torch.cat([error.T @ self.coordinates + penalty * weight, error.sum(0)[:, None]], 1)
            parameters.grad = gradient * scale
            return loss + penalty / 2 * weight.square().sum()

        optimizer.step(objective)
        loss = float(objective())
        scaled = parameters.detach() * scale
        converged = optimizer.state[parameters]["n_iter"] < self.max_iterations
        return _Optimum(scaled[:, :-1], scaled[:, -1], loss, converged)

    def _logits(self, optimum: _Optimum) -> Tensor:
        x = self.coordinates
        return F.linear(x, optimum.weight.to(x), optimum.bias.to(x))

    def evaluate(self, optimum: _Optimum) -> tuple[float, float]:
        """Weighted mean likelihood loss, and accuracy."""
        logits = self._logits(optimum)
        losses = F.cross_entropy(logits, self.labels, reduction="none")
        accuracy = (logits.argmax(1) == self.labels).double().mean()
        return float((losses * self.weights).sum() / self.weights.sum()), float(accuracy)
