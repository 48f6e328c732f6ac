"""A bounded uniform sample of the rows of a stream, kept beside the sums for leave-one-out scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Reservoir:
    """All rows of a short stream; of a longer one ``size`` rows, each row equally likely to be among them.

    While at most twice ``size`` rows were seen, all are held: then nothing about them has to be estimated. Every row
    has a pseudo-random priority, a hash of its position in the stream, and the rows of lowest priority stay (bottom-k
    sampling). So the sample does not depend on how the stream is cut into batches, samples of several streams merge by
    keeping the lowest priorities of all, and which rows enter is known on the host without asking the device.

    Args:
        size: Rows kept of more than twice as many; 0 keeps none.
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
        self._room = size  # rows that may be kept at present
        self._priorities = torch.empty(0, dtype=torch.int64)
        self._buffers: dict[str, Tensor] = {}  # with room to spare, so that a row enters without copying the others

    def __len__(self) -> int:
        return len(self._priorities)

    @property
    def _rows(self) -> dict[str, Tensor]:
        return {name: buffer[: len(self)] for name, buffer in self._buffers.items()}

    @property
    def complete(self) -> bool:
        """Whether every row of the stream is held."""
        return 0 < self.seen == len(self)

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

    @torch.inference_mode(False)
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
        if not len(positions) == len(values) == n:
            raise ValueError(f"{n} keys, but {len(values)} values and {len(positions)} positions.")
        self._see(n, whole=True)
        if self.size == 0 or n == 0:
            return
        priorities = _hash(positions, self.seed)
        if len(self) == self._room:  # nearly always: find the few rows that enter, on the host
            entering = torch.nonzero(priorities < self._priorities.max()).flatten()
        else:
            entering = torch.sort(priorities, stable=True).indices[: self._room].sort().values
        if len(entering) == 0:
            return
        index = entering.to(keys.device)
        new = {"keys": keys.detach()[index], "values": values.detach()[index]}
        new["weights"] = (
            torch.ones(len(entering), dtype=torch.float64, device=keys.device)
            if weights is None
            else weights.detach()[index].to(torch.float64)
        )
        self._keep_lowest(priorities[entering], new)

    def _see(self, rows: int, whole: bool) -> None:
        """Count rows of which all are about to come, or a sample; what is too much then is let go at once."""
        short = whole and len(self) == self.seen and self.seen + rows <= 2 * self.size
        self.seen += rows
        self._resize(2 * self.size if short else self.size)

    def _keep_lowest(self, priorities: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Let new rows take free slots, and those of held rows of higher priority."""
        held = len(self)
        order = torch.sort(torch.cat([self._priorities, priorities]), stable=True).indices
        kept = order[: self._room]
        entering = kept[kept >= held] - held
        leaving = order[self._room :]
        slots = torch.cat([leaving[leaving < held], torch.arange(held, min(self._room, held + len(entering)))])
        slots = slots[: len(entering)]
        self._make_room(rows)
        grown = torch.zeros(len(kept), dtype=torch.int64)
        grown[:held] = self._priorities
        grown[slots] = priorities[entering]
        self._priorities = grown
        for name, buffer in self._buffers.items():
            source = rows[name].to(buffer)
            buffer.index_copy_(0, slots.to(buffer.device), source[entering.to(source.device)])

    def _make_room(self, rows: Mapping[str, Tensor]) -> None:
        """Buffers for all that may be kept, in a dtype that holds both the held rows and the new ones exactly."""
        for name, new in rows.items():
            old = self._buffers.get(name)
            dtype = new.dtype if old is None else torch.promote_types(old.dtype, new.dtype)
            if old is None:
                self._buffers[name] = torch.zeros((self._room, *new.shape[1:]), dtype=dtype, device=new.device)
            elif dtype != old.dtype:
                self._buffers[name] = old.to(dtype)

    def _resize(self, room: int) -> None:
        """Make room for so many rows, and let those of highest priority go that have none."""
        if len(self) > room:
            kept = torch.sort(self._priorities, stable=True).indices[:room]
            self._buffers = {name: buffer[kept.to(buffer.device)] for name, buffer in self._buffers.items()}
            self._priorities = self._priorities[kept]
        if room != self._room:
            self._buffers = {name: _padded(rows, room) for name, rows in self._rows.items()}
            self._room = room

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, other: Reservoir) -> None:
        """Take in the sample of another stream; the result is a sample of both, of the smaller of the two sizes."""
        whole = len(other) == other.seen
        if not whole:  # of two samples, no more rows than the smaller has are a uniform sample of both
            self.size = min(self.size, len(other))
        self._see(other.seen, whole)
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
        counts = [count.tolist() for count in gather(torch.tensor([self.seen, len(self)], device=device))]
        most = max(held for _, held in counts)  # padded to it, since all processes send equal shapes
        priorities = gather(_padded(self._priorities.to(device), most))
        columns = {}
        for name, empty in shapes.items():
            columns[name] = gather(_padded(self._rows[name].to(empty) if self._buffers else empty, most))
        result = Reservoir(self.size, self.seed)
        for process, (seen, held) in enumerate(counts):
            part = Reservoir(held, self.seed)
            part.seen, part._priorities = seen, priorities[process][:held].cpu()
            part._buffers = {name: tensors[process][:held] for name, tensors in columns.items()}
            result.merge(part)
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only."""
        state = {"seen": torch.tensor(self.seen), "priorities": self._priorities.clone()}
        return {**state, **{name: t.clone() for name, t in self._rows.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state; of the two sizes, the smaller one counts from then on (a size of 0 stays off).

        Raises:
            ValueError: For missing entries, or entries of different lengths.
        """
        priorities = state.get("priorities")
        names = [name for name in ("keys", "values", "weights") if name in state]
        whole = priorities is not None and "seen" in state and len(names) == (3 if len(priorities) else 0)
        if not whole or priorities is None or any(len(state[name]) != len(priorities) for name in names):
            raise ValueError("Not a state of Reservoir: entries are missing, or of different lengths.")
        stored = Reservoir(len(priorities), self.seed)
        stored.seen = int(state["seen"])
        stored._priorities = priorities.cpu()
        stored._buffers = {name: state[name].detach() for name in names}
        self.seen, self._priorities, self._buffers = 0, torch.empty(0, dtype=torch.int64), {}
        self._room = self.size
        if self.size:
            self.merge(stored)
        else:
            self.seen = stored.seen


def _padded(rows: Tensor, size: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros((size - len(rows), *rows.shape[1:]))])


def _hash(positions: Tensor, seed: int) -> Tensor:
    """Splitmix64 of the positions, as non-negative int64; int64 products wrap around, which is what it asks for."""

    def shifted(x: Tensor, bits: int) -> Tensor:  # a logical, not an arithmetic, shift
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    offset = (seed * 2654435769 + 2**63) % 2**64 - 2**63  # any Python integer, as int64
    x = (positions + 1) * -7046029254386353131 + offset
    x = (x ^ shifted(x, 30)) * -4658895280553007687
    x = (x ^ shifted(x, 27)) * -7723592293110705685
    return shifted(x ^ shifted(x, 31), 1)
