"""Next-token pairs: which hidden state predicts which token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Labels that do not count, as everywhere in transformers and torch.
IGNORED = -100


def pair_labels(input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
    """Labels [B, T] of which every one that is not -100 has a token before it to be predicted from.

    Padding on either side gives the same pairs: a token counts where the mask is 1 at its place and at the one before.

    Args:
        input_ids: [B, T].
        attention_mask: [B, T], 1 for tokens and 0 for padding.
        labels: [B, T], the tokens to learn, in place (not shifted); -100 is left out. The input where not given.

    Raises:
        ValueError: For shapes that differ.
    """
    for name, given in (("attention_mask", attention_mask), ("labels", labels)):
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(f"{name} must be {tuple(input_ids.shape)}, as input_ids, got {tuple(given.shape)}.")
    result = (input_ids if labels is None else labels).clone()
    result[:, :1] = IGNORED
    if attention_mask is not None:
        kept = attention_mask.to(result.device) > 0
        result[:, 1:].masked_fill_(~(kept[:, 1:] & kept[:, :-1]), IGNORED)
    return result


@dataclass(frozen=True)
class Pairs:
    """The next-token pairs of some sequences.

    Attributes:
        places: Flat places [N] of the pairs among the [B, T - 1] that sequences of length T have; None is all.
        targets: The token of each pair [N].
        weights: 1 for a pair and 0 for what is none [N]; None where all are pairs.
    """

    places: Tensor | None
    targets: Tensor
    weights: Tensor | None

    @classmethod
    def of(cls, labels: Tensor) -> Pairs:
        """The pairs of labels [B, T]: the label at t belongs to the hidden state at t - 1.

        Where labels are on the CPU, pairs are selected. Elsewhere, selecting means waiting for the device: all places
        are kept, with weights.
        """
        targets = labels[:, 1:].reshape(-1)
        kept = targets != IGNORED
        if labels.device.type == "cpu":
            places = kept.nonzero()[:, 0]
            return cls(places, targets[places], None) if len(places) < len(targets) else cls(None, targets, None)
        return cls(None, targets.masked_fill(~kept, 0), kept.to(torch.float32))

    def keys(self, hidden: Tensor) -> Tensor:
        """The states [N, d] that predict, of hidden states [B, T, d]."""
        return self._rows(hidden[:, :-1])

    def next(self, hidden: Tensor) -> Tensor:
        """The states [N, d] of the predicted tokens, of hidden states [B, T, d]."""
        return self._rows(hidden[:, 1:])

    def _rows(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.places is not None:
            return rows[self.places.to(rows.device)]
        if self.weights is not None:  # a state of padding may be NaN, and 0 times NaN is NaN
            return rows.where(self.weights.to(rows.device)[:, None] > 0, 0)
        return rows


def windows(input_ids: Tensor, length: int) -> list[Tensor]:
    """Consecutive windows [1, length] of one text; the last is shorter, and left out where it has no pair.

    Args:
        input_ids: [T] or [1, T].
        length: Tokens of a window, at least 2.

    Example:
        >>> import torch
        >>> from lightning_faast.language import windows
        >>> [tuple(w.shape) for w in windows(torch.arange(11), 5)]
        [(1, 5), (1, 5)]
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, got {length}.")
    if input_ids.ndim > 2 or (input_ids.ndim == 2 and len(input_ids) != 1):
        raise ValueError(f"input_ids must be one text, [T] or [1, T], got {tuple(input_ids.shape)}.")
    return [w for w in input_ids.reshape(1, -1).split(length, dim=1) if w.shape[1] > 1]
