"""The latest tokens, kept out of the sums until newer ones come: what the regularization is chosen on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Keys [n, k], tokens [n], weights [n].
Rows = tuple[Tensor, Tensor, Tensor]


class LatestTokens:
    """The last tokens of a stream, in order, up to a limit; older ones leave.

    The latest part of a text is as far from the rest of it as a part can be: a slice from the middle has what it is
    about on both sides, and what is chosen on it holds back too little on another text. Which tokens these are does not
    depend on how the stream is batched.

    Args:
        limit: Tokens held at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._replace((torch.empty(0), torch.empty(0), torch.empty(0)))

    def push(self, keys: Tensor, targets: Tensor, weights: Tensor) -> Rows | None:
        """Hold rows: keys [N, k], tokens [N], weights [N]. Returns those that leave, oldest first; None for none."""
        if not self.limit:
            return (keys, targets, weights) if len(keys) else None
        self._add(keys, targets, weights)
        return self.released(self.limit)

    def released(self, keep: int) -> Rows | None:
        """Let go of all but the last ``keep`` rows, and return them; None where no more are held."""
        if self.size <= keep:
            return None
        older, latest = self.parted(keep)
        self._replace(latest)
        return older

    def parted(self, keep: int) -> tuple[Rows, Rows]:
        """All but the last ``keep`` rows, and those."""
        keys, targets, weights = self.rows()
        at = self.size - min(keep, self.size)
        return (keys[:at], targets[:at], weights[:at]), (keys[at:], targets[at:], weights[at:])

    def _add(self, keys: Tensor, targets: Tensor, weights: Tensor) -> None:
        if len(keys):
            self.keys.append(keys.detach().clone())
            self.targets.append(targets.clone())
            self.weights.append(weights.clone())
            self.size += len(keys)

    def rows(self) -> Rows:
        """What is held: keys [n, k], tokens [n], weights [n]; at least one row."""
        for held in (self.keys, self.targets, self.weights):
            if len(held) > 1:
                held[:] = [torch.cat(held)]
        return self.keys[0], self.targets[0], self.weights[0]

    def _replace(self, parts: Rows) -> None:
        self.size = len(parts[0])
        held = [[part] if self.size else [] for part in parts]
        self.keys, self.targets, self.weights = held

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows held."""
        return sum(t.numel() * t.element_size() for part in (self.keys, self.targets, self.weights) for t in part)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only."""
        if not self.size:
            return {"size": torch.tensor(0)}
        return {"size": torch.tensor(self.size), **dict(zip(("keys", "targets", "weights"), self.rows(), strict=True))}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state."""
        keys, targets, weights = (
            state[name].clone() if name in state else torch.empty(0) for name in ("keys", "targets", "weights")
        )
        self._replace((keys, targets, weights))

    def gather(self, gather: Callable[[Tensor], list[Tensor]], like: Tensor) -> None:
        """Hold what all processes hold, in their order, the same on each; ``like`` [0, k] where this one holds none."""
        sizes = torch.stack(gather(torch.tensor(self.size, device=like.device))).tolist()
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
        keys, targets, weights = together
        self._replace((keys, targets, weights))
