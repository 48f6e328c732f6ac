"""A bounded uniform sample of the rows of a stream, kept beside the sums for leave-one-out scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Reservoir:
    """At most ``size`` rows, each row of the stream equally likely to be among them.

    Every row has a pseudo-random priority, a hash of its position in the stream, and the rows of lowest priority stay
    (bottom-k sampling). So the sample does not depend on how the stream is cut into batches, samples of several
    streams merge by keeping the lowest priorities of all, and which rows enter is known on the host without asking
    the device.

    Args:
        size: Rows kept at most; 0 keeps none.
        seed: Another seed samples other rows.

    Example:
        >>> import torch
        >>> from lightning_faast.associative.reservoir import Reservoir
        >>> sample = Reservoir(size=5)
        >>> sample.update(torch.randn(100, 8), torch.arange(100))
        >>> len(sample), sample.seen
        (5, 100)
    """

    def __init__(self, size: int = 1000, seed: int = 0) -> None:
        if size < 0:
            raise ValueError(f"The reservoir's size must not be negative, got {size}.")
        self.size = size
        self.seed = seed
        self.seen = 0
        self._priorities = torch.empty(0, dtype=torch.int64)
        self._rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._priorities)

    @property
    def complete(self) -> bool:
        """Whether every row of the stream is held."""
        return self.size > 0 and self.seen == len(self)

    @property
    def keys(self) -> Tensor:
        """[R, d], in the dtype in which they came."""
        return self._rows["keys"]

    @property
    def values(self) -> Tensor:
        """[R] labels or [R, c] values."""
        return self._rows["values"]

    @property
    def weights(self) -> Tensor:
        """[R] float64."""
        return self._rows["weights"]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self._priorities, *self._rows.values()))

    @torch.no_grad()
    def update(
        self, keys: Tensor, values: Tensor, weights: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Offer rows: keys [N, d], labels [N] or values [N, c], weights [N].

        Args:
            keys: The rows' keys.
            values: The rows' labels or values.
            weights: Optional weights.
            positions: [N] int64 on the CPU, the rows' places in the whole stream where this process sees only a part
                of it; counted on from the rows seen where not given.
        """
        n = keys.shape[0]
        if positions is None:
            positions = torch.arange(self.seen, self.seen + n)
        self.seen += n
        if self.size == 0 or n == 0:
            return
        priorities = _hash(positions, self.seed)
        if len(self) == self.size:  # nearly always: find the few rows that enter, on the host
            entering = torch.nonzero(priorities < self._priorities.max()).flatten()
        else:
            entering = torch.arange(n)
        if len(entering) == 0:
            return
        index = entering.to(keys.device)
        new = {"keys": keys.detach()[index].clone(), "values": values.detach()[index].clone()}
        new["weights"] = (
            torch.ones(len(entering), dtype=torch.float64, device=keys.device)
            if weights is None
            else weights.detach()[index].to(torch.float64)
        )
        self._keep_lowest(priorities[entering], new)

    def _keep_lowest(self, priorities: Tensor, rows: Mapping[str, Tensor]) -> None:
        both = torch.cat([self._priorities, priorities])
        if self._rows:
            rows = {name: torch.cat([self._rows[name], rows[name].to(self._rows[name].device)]) for name in rows}
        kept = torch.sort(both, stable=True).indices[: self.size]
        self._priorities = both[kept]
        self._rows = {name: t[kept.to(t.device)] for name, t in rows.items()}

    def merge(self, other: Reservoir) -> None:
        """Take in the sample of another stream; the result is a sample of both."""
        self.seen += other.seen
        if self.size and len(other):
            self._keep_lowest(other._priorities, other._rows)

    def gathered(self, gather: Callable[[Tensor], list[Tensor]], shapes: Mapping[str, Tensor]) -> Reservoir:
        """The sample of all processes' streams together.

        Args:
            gather: Collects a tensor of one shape and dtype from every process.
            shapes: An empty row set ``{"keys": [0, d], "values": ..., "weights": ...}`` on the communication device,
                for a process that has seen no row.

        Returns:
            The same merged reservoir on every process.
        """
        device = shapes["keys"].device
        result = Reservoir(self.size, self.seed)
        # Padded to the full size, so that all processes send equal shapes; padding has the largest priority.
        padded = torch.full((self.size,), torch.iinfo(torch.int64).max, device=device)
        padded[: len(self)] = self._priorities.to(device)
        priorities = gather(padded)
        seen = gather(torch.tensor([self.seen], device=device))
        columns = {}
        for name, empty in shapes.items():
            full = torch.zeros((self.size, *empty.shape[1:]), dtype=empty.dtype, device=device)
            if self._rows:
                full[: len(self)] = self._rows[name].to(full)
            columns[name] = gather(full)
        result.seen = int(sum(int(s) for s in seen))
        for process, priority in enumerate(priorities):
            real = (priority != torch.iinfo(torch.int64).max).cpu()
            rows = {name: tensors[process][real.to(device)] for name, tensors in columns.items()}
            result._keep_lowest(priority.cpu()[real], rows)
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only."""
        state = {"seen": torch.tensor(self.seen), "priorities": self._priorities.clone()}
        return {**state, **{name: t.clone() for name, t in self._rows.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state."""
        self.seen = int(state["seen"])
        self._priorities = state["priorities"].cpu().clone()
        self._rows = {name: state[name].clone() for name in ("keys", "values", "weights") if name in state}


def _hash(positions: Tensor, seed: int) -> Tensor:
    """Splitmix64 of the positions, as non-negative int64; int64 products wrap around, which is what it asks for."""

    def shifted(x: Tensor, bits: int) -> Tensor:  # a logical, not an arithmetic, shift
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = (positions + 1) * -7046029254386353131 + seed * 2654435769
    x = (x ^ shifted(x, 30)) * -4658895280553007687
    x = (x ^ shifted(x, 27)) * -7723592293110705685
    return shifted(x ^ shifted(x, 31), 1)
