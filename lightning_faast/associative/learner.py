"""What FaastCallback drives: heads that learn in one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Learner(nn.Module, ABC):
    """A head that learns from one pass over keys and labels, and then maps keys to logits.

    :class:`~lightning_faast.FaastCallback` calls :meth:`reset`, :meth:`update` for every batch, :meth:`reduce` where
    several processes each saw a part of the rows, and :meth:`solve`. ``state_dict`` holds what prediction needs;
    :meth:`learned_state` what is needed to go on learning.

    Attributes:
        in_features: Width d of the keys; None until known.
        out_features: Number of logits c; None until known.
        unit: What a row is, for the progress bar and the closing line.
        reads_sequences: Whether :meth:`update` wants keys [B, T, d] and labels [B, T] as they come, since what is
            learnt of a row depends on its neighbours; rows [N, d] otherwise.
    """

    unit = "rows"
    reads_sequences = False

    in_features: int | None
    out_features: int | None

    # ------------------------------------------------------------------ learning

    @abstractmethod
    def reset(self) -> None:
        """Forget every row seen; what was solved stays until the next :meth:`solve`."""

    @abstractmethod
    def update(
        self, keys: Tensor, values: Tensor, weights: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Take in rows.

        Args:
            keys: [N, d], any floating dtype.
            values: Labels [N].
            weights: Optional, one non-negative weight a row [N].
            positions: Optional int64 [N] on the CPU: places of these rows in the whole stream, where several
                processes each see a part.
        """

    @abstractmethod
    def reduce(self, add: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Replace what this process has seen by what all processes have seen.

        Args:
            add: Sums a tensor over processes, out of place.
            gather: Collects a tensor of one shape and dtype from every process.
        """

    @abstractmethod
    def solve(self) -> Any:
        """Turn what was seen into what :meth:`forward` reads.

        Raises:
            RuntimeError: Where no row was seen.
        """

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows seen since the last :meth:`reset`."""

    def fit(self, keys: Tensor, values: Tensor) -> Learner:
        """Forget, take in rows and solve. Returns itself.

        Args:
            keys: [N, d].
            values: Labels [N].
        """
        self.reset()
        self.update(keys, values)
        self.solve()
        return self

    # ------------------------------------------------------------------ predicting

    @abstractmethod
    def forward(self, keys: Tensor) -> Tensor:
        """Logits [N, c] of keys [N, d]; their softmax is the predicted probability."""

    @torch.no_grad()
    def predict(self, keys: Tensor) -> Tensor:
        """Labels [N] of keys [N, d]."""
        return self(keys).argmax(-1)

    @torch.no_grad()
    def predict_proba(self, keys: Tensor) -> Tensor:
        """Probabilities [N, c] of keys [N, d]."""
        return self(keys).softmax(-1)

    @torch.no_grad()
    def score(self, keys: Tensor, values: Tensor) -> float:
        """Accuracy on keys [N, d] with labels [N]."""
        return float((self.predict(keys) == values.to(keys.device)).double().mean())

    # ------------------------------------------------------------------ state

    @abstractmethod
    def learned_state(self) -> dict[str, Tensor]:
        """What is needed to go on learning, flat."""

    @abstractmethod
    def load_learned_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`learned_state`."""

    # ------------------------------------------------------------------ reporting

    @property
    @abstractmethod
    def bytes_to_predict(self) -> int:
        """Bytes of what a prediction reads."""

    @property
    @abstractmethod
    def bytes_to_update(self) -> int:
        """Bytes of what learning on needs."""

    @property
    @abstractmethod
    def num_solved(self) -> int:
        """Numbers that the solve determined (weights and biases); 0 for a memory, which only remembers."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """Figures of the last solve by the names under which they are logged."""

    @abstractmethod
    def summary(self) -> str:
        """What the last solve found, for the closing line: a phrase or several with commas between them."""
