"""The latest tokens, kept out of the sums until newer ones come: what the regularization is chosen on."""

from __future__ import annotations

from torch import Tensor

from lightning_faast.language.held_out import HeldOut

Rows = tuple[Tensor, Tensor, Tensor]


class LatestTokens(HeldOut):
    """The last tokens of a stream, in order, up to a limit; older ones leave.

    The latest part of a text is as far from the rest of it as a part can be: a slice from the middle has what it is
    about on both sides, and what is chosen on it holds back too little on another text. Which tokens these are does not
    depend on how the stream is batched.

    Args:
        limit: Tokens held at most.
    """

    def push(self, keys: Tensor, targets: Tensor, weights: Tensor) -> Rows | None:
        """Hold rows: keys [N, k], tokens [N], weights [N]. Returns those that leave, oldest first; None for none."""
        if not self.limit:
            return (keys, targets, weights) if len(keys) else None
        self.add(keys, targets, weights)
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
