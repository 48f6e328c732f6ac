"""The choice of step length and ridges by the loss on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

#: Evaluations of one choice, at most: each costs a product with the output layer.
MAX_CANDIDATES = 8


@dataclass(frozen=True)
class Candidate:
    """One way to take the step.

    Attributes:
        step: s, the length; 1 is the full natural-gradient step.
        key_ridge: g, relative to the largest eigenvalue of G.
        value_ridge: f, relative to the largest eigenvalue of F.
    """

    step: float
    key_ridge: float
    value_ridge: float

    def __str__(self) -> str:
        return f"step {self.step:g}, key ridge {self.key_ridge:g}, value ridge {self.value_ridge:g}"


@dataclass(frozen=True)
class Candidates:
    """What is tried: the key ridges first, then the value ridges, then the step lengths, the others at their best.

    Args:
        step: Step lengths.
        key_ridge: Ridges of G.
        value_ridge: Ridges of F. The first entry of each stands while another is chosen.
    """

    step: tuple[float, ...]
    key_ridge: tuple[float, ...]
    value_ridge: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("step", "key_ridge", "value_ridge"):
            values = getattr(self, name)
            if not values or not all(v > 0 and math.isfinite(v) for v in values):
                raise ValueError(f"{name} must be one or several finite numbers above 0, got {values}.")
        if self.number > MAX_CANDIDATES:
            raise ValueError(
                f"{self.number} candidates of step, key_ridge and value_ridge are to be tried one after the other; at "
                f"most {MAX_CANDIDATES} are allowed, as each costs a product with the output layer."
            )

    @property
    def number(self) -> int:
        """How many are tried; 0 where nothing is to be chosen."""
        tried = len(self.step) + len(self.key_ridge) + len(self.value_ridge) - 2
        return tried if tried > 1 else 0

    @property
    def first(self) -> Candidate:
        """The first entry of each."""
        return Candidate(self.step[0], self.key_ridge[0], self.value_ridge[0])

    @property
    def cautious(self) -> Candidate:
        """The shortest step and the largest ridges: where there is nothing to choose by."""
        return Candidate(min(self.step), max(self.key_ridge), max(self.value_ridge))

    def best(self, loss: Callable[[Candidate], float]) -> tuple[Candidate, float]:
        """The candidate of lowest loss, and its loss."""
        best = self.first
        lowest = loss(best)
        for name in ("key_ridge", "value_ridge", "step"):
            start = best
            for value in getattr(self, name)[1:]:
                candidate = replace(start, **{name: value})
                found = loss(candidate)
                if found < lowest or math.isnan(lowest):
                    best, lowest = candidate, found
        return best, lowest


def as_values(given: float | Sequence[float]) -> tuple[float, ...]:
    """A number, or several, as a tuple."""
    return (float(given),) if isinstance(given, (int, float)) else tuple(float(v) for v in given)


def perplexity(loss: float) -> float:
    """Of a mean loss in nats; infinite where it is too large for a float."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())
