"""What one pass over tokens keeps for ResidualFastWeights: sums that know no order, add and subtract."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_faast.associative.processes import reduced
from lightning_faast.associative.reservoir import Reservoir
from lightning_faast.associative.statistics import SufficientStatistics


class ResidualSums:
    """Sums over tokens of keys, gradients and losses; and of every token how often it came and was expected.

    Args:
        width: Of keys and gradients side by side: one Gram matrix holds G, C and F.
        vocabulary: V.

    Attributes:
        statistics: Of keys and gradients [N, k + d], with losses as values.
        observed: [V] float64, how often each token came.
        expected: [V] float64, how often the model said it would: the sum of its probabilities.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        self.width = width
        self.statistics = SufficientStatistics(1, width)
        self.observed = torch.zeros(vocabulary, dtype=torch.float64)
        self.expected = torch.zeros(vocabulary, dtype=torch.float64)

    @property
    def rows(self) -> int:
        """Tokens seen."""
        return self.statistics.rows

    @property
    def loss(self) -> float:
        """Mean loss, nats a token."""
        return float(self.statistics.value_sum / self.statistics.count)

    @property
    def num_bytes(self) -> int:
        """Bytes of the sums, the Gram matrix as a packed triangle."""
        return self.statistics.num_bytes + 2 * self.observed.numel() * self.observed.element_size()

    def update(self, features: Tensor, losses: Tensor, targets: Tensor, weights: Tensor, expected: Tensor) -> None:
        """Add tokens.

        Args:
            features: Keys and gradients [N, k + d].
            losses: [N].
            targets: [N].
            weights: [N].
            expected: Sum of the weighted probabilities [V].
        """
        self.statistics.update(features, losses[:, None], weights)
        self.observed = self.observed.to(expected.device).index_add(0, targets, weights.to(torch.float64))
        self.expected = self.expected.to(expected.device) + expected

    def __add__(self, other: ResidualSums) -> ResidualSums:
        return self._combined(other, 1)

    def __sub__(self, other: ResidualSums) -> ResidualSums:
        return self._combined(other, -1)

    def _combined(self, other: ResidualSums, sign: int) -> ResidualSums:
        result = ResidualSums(self.width, 0)
        theirs = other.statistics
        result.statistics = self.statistics + theirs if sign > 0 else self.statistics - theirs
        for name in ("observed", "expected"):
            mine = getattr(self, name)
            # rounding may leave a little less than nothing of what is taken out
            setattr(result, name, (mine + sign * getattr(other, name).to(mine.device)).clamp_min(0))
        return result

    def reduced(
        self, add: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]], device: torch.device
    ) -> ResidualSums:
        """The sums of all processes."""
        result = ResidualSums(self.width, 0)
        result.statistics, _ = reduced(self.statistics, Reservoir(0, 0), add, gather, device)
        result.observed, result.expected = (add(t.to(device)) for t in (self.observed, self.expected))
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only."""
        return {**self.statistics.state_dict(), "observed": self.observed, "expected": self.expected}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state."""
        statistics = dict(state)
        observed, expected = statistics.pop("observed"), statistics.pop("expected")
        if observed.shape != self.observed.shape or expected.shape != self.expected.shape:
            raise ValueError(f"The sums are of {len(observed)} tokens, expected {len(self.observed)}.")
        self.statistics.load_state_dict(statistics)
        self.observed, self.expected = observed.clone(), expected.clone()
