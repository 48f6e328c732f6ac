"""The slice of the tokens seen on which the regularization is chosen, kept out of the sums until then."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Of so many sequences, the second is held out.
_EVERY = 8
#: Of the very first sequence, this share of the positions (the last ones): there may be no other.
_OF_FIRST = 0.25


class HeldOut:
    """Tokens kept as they are: the last quarter of the first sequence, and the second of every eight, up to a limit.

    Which tokens these are depends on the order of the sequences, and not on how they are batched. Whole sequences,
    because neighbouring tokens know too much of each other.

    Args:
        limit: Tokens held at most; whatever comes later is not held out.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sequences = 0
        self.keys: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.size = 0

    def mask(self, sequences: int, length: int) -> Tensor | None:
        """Which of the flat places [sequences * length] of the next batch to hold out; None for none of them.

        Args:
            sequences: Sequences in the batch.
            length: Pairs a sequence has, padding included.
        """
        room = self.limit - self.size
        if room <= 0:
            return None
        mask = torch.zeros(sequences, length, dtype=torch.bool)
        if self.sequences == 0 and sequences:
            mask[0, length - int(length * _OF_FIRST) :] = True
        mask[(1 - self.sequences) % _EVERY :: _EVERY] = True
        mask = mask.flatten()
        mask &= mask.cumsum(0) <= room
        return mask

    def saw(self, sequences: int) -> None:
        """Count sequences that were taken in."""
        self.sequences += sequences

    def add(self, keys: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Hold rows: keys [N, k], tokens [N], weights [N]."""
        if len(keys):
            self.keys.append(keys.detach().clone())
            self.targets.append(targets.clone())
            self.weights.append(weights.clone())
            self.size += len(keys)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is held: keys [n, k], tokens [n], weights [n]; at least one row."""
        for held in (self.keys, self.targets, self.weights):
            if len(held) > 1:
                held[:] = [torch.cat(held)]
        return self.keys[0], self.targets[0], self.weights[0]

    def released(self, keep: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Let go of all but the first ``keep`` rows, and return them; None where no more are held."""
        if self.size <= keep:
            return None
        parts = self.rows()
        rest = tuple(part[keep:] for part in parts)
        self._replace(tuple(part[:keep] for part in parts))
        return rest  # type: ignore[return-value]

    def _replace(self, parts: tuple[Tensor, ...]) -> None:
        self.size = len(parts[0])
        held = [[part] if self.size else [] for part in parts]
        self.keys, self.targets, self.weights = held

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows held."""
        return sum(t.numel() * t.element_size() for part in (self.keys, self.targets, self.weights) for t in part)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only."""
        state = {"sequences": torch.tensor(self.sequences)}
        if self.size:
            state |= dict(zip(("keys", "targets", "weights"), self.rows(), strict=True))
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state."""
        self.sequences = int(state["sequences"])
        empty = torch.empty(0)
        self._replace(tuple(state[name].clone() if name in state else empty for name in ("keys", "targets", "weights")))

    def gather(self, gather: Callable[[Tensor], list[Tensor]], like: Tensor) -> None:
        """Hold what all processes hold, in their order, the same on each; ``like`` [0, k] where this one holds none."""
        sizes = torch.stack(gather(torch.tensor(self.size, device=like.device))).tolist()
        sequences = int(torch.stack(gather(torch.tensor(self.sequences, device=like.device))).sum())
        parts = (
            self.rows()
            if self.size
            else (like, like.new_empty(0, dtype=torch.int64), like.new_empty(0, dtype=torch.float32))
        )
        together = []
        for part in parts:
            padded = part.new_zeros((max(sizes), *part.shape[1:]))
            padded[: len(part)] = part
            together.append(torch.cat([p[:n] for p, n in zip(gather(padded), sizes, strict=True)]))
        self._replace(tuple(together))
        self.sequences = sequences
