"""The paper's chunked mode: the count-weighted mean of the solutions of chunks of the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_faast.associative.faults import FaultLog
from lightning_faast.associative.regularization import Choice
from lightning_faast.associative.spectrum import Spectrum
from lightning_faast.associative.statistics import SufficientStatistics
from lightning_faast.language.embedding import MapSolution, MixingLearner, map_summary
from lightning_faast.language.output import OutputLayer

#: Values as they enter the solve, of keys [N, d] and values [N, e].
Weigh = Callable[[Tensor, Tensor], Tensor]


class ChunkedMap:
    r"""A map from keys to values as the paper's code keeps it: a matrix W0 of the chunks that left, and a bank of rows.

    Where the bank has reached ``memory_size``, its oldest ``update_size`` rows are solved and enter W0, the mean of
    the solutions of chunks weighted by their rows; what is in the bank when the map is read is one more chunk. A chunk
    of n rows is solved by the pseudoinverse of its keys with the tolerance :math:`n^{-\alpha}`. The mean of such
    solutions is not the solution of all rows.

    Args:
        update_size: Rows of a chunk.
        memory_size: Rows in the bank from which on a chunk leaves it.
        alpha: Of the tolerance.
        update_discount: Factor of the count of W0 when a chunk enters, in training.
    """

    def __init__(self, update_size: int, memory_size: int, alpha: float, update_discount: float = 1.0) -> None:
        if not 1 <= update_size <= memory_size:
            raise ValueError(f"update_size must be in [1, memory_size = {memory_size}], got {update_size}.")
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, got {alpha}.")
        if not 0 < update_discount <= 1:
            raise ValueError(f"update_discount must be above 0 and at most 1, got {update_discount}.")
        self.update_size, self.memory_size = update_size, memory_size
        self.alpha, self.update_discount = alpha, update_discount
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.weight: Tensor | None = None  # W0
        self.count = 0.0  # N0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.rows = 0  # seen in all

    @property
    def held(self) -> int:
        """Rows in the bank."""
        return 0 if self.keys is None else len(self.keys)

    @property
    def num_bytes(self) -> int:
        """Bytes of W0 and the bank."""
        return sum(t.numel() * t.element_size() for t in (self.weight, self.keys, self.values) if t is not None)

    @torch.no_grad()
    def add(self, keys: Tensor, values: Tensor, weigh: Weigh | None = None, training: bool = False) -> None:
        """Put rows into the bank, after the chunks for which it has no room left it.

        Args:
            keys: [N, d].
            values: [N, e].
            weigh: Weighs the values of a chunk before it is solved.
            training: Whether the discount counts, and the tolerance is that of float32 rounding.
        """
        while self.held >= self.memory_size:
            assert self.keys is not None
            assert self.values is not None
            u = self.update_size
            self.weight, self.count = self._with_chunk(self.keys[:u], self.values[:u], weigh, training)
            self.keys, self.values = self.keys[u:].clone(), self.values[u:].clone()
        keys, values = keys.detach(), values.detach()
        self.keys = keys.clone() if self.keys is None else torch.cat([self.keys, keys])
        self.values = values.clone() if self.values is None else torch.cat([self.values, values])
        self.rows += len(keys)

    def read(self, weigh: Weigh | None = None, training: bool = False) -> tuple[Tensor, float]:
        """W [e, d] float64 and its count N, with the rows in the bank as one more chunk; as :meth:`add`.

        Raises:
            RuntimeError: Where nothing was added.
        """
        if self.held:
            assert self.keys is not None
            assert self.values is not None
            return self._with_chunk(self.keys, self.values, weigh, training)
        if self.weight is None:
            raise RuntimeError("No next-token pair was seen: call learn(...) or update(keys, labels) before solving.")
        return self.weight, self.count

    def _with_chunk(self, keys: Tensor, values: Tensor, weigh: Weigh | None, training: bool) -> tuple[Tensor, float]:
        before = self.count * (self.update_discount if training else 1.0)
        n = len(keys)
        tolerance = max(keys.shape) * torch.finfo(torch.float32).eps if training else n**-self.alpha
        weighted = values if weigh is None else weigh(keys, values)
        solution = pseudoinverse_map(keys, weighted, tolerance)
        if self.weight is None:
            return solution * (n / (before + n)), before + n
        share = n / (before + n)
        return (1 - share) * self.weight + share * solution, before + n

    def merge(self, weight: Tensor, count: float) -> None:
        """Take a solution with its count into W0."""
        total = self.count + count
        mine = torch.zeros_like(weight) if self.weight is None else self.weight
        self.weight, self.count = (self.count * mine + count * weight) / total, total
        self.rows += round(count)

    @torch.no_grad()
    def reduce(self, add: Callable[[Tensor], Tensor], like: Tensor, weigh: Weigh | None = None) -> None:
        """Put the mean of all processes' solutions, weighted by their counts, in the place of this one's.

        Args:
            add: Sums a tensor over processes, out of place.
            like: Of the shape [e, d] of W, on the device on which tensors travel.
            weigh: As of :meth:`add`.
        """
        zero = torch.zeros_like(like, dtype=torch.float64)
        weight, count = self.read(weigh) if self.rows else (zero, 0.0)
        total = float(add(torch.tensor(count, dtype=torch.float64, device=zero.device)))
        summed = add(weight * count)
        self.clear()
        if total:
            self.merge(summed / total, total)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only."""
        state = {"count": torch.tensor(self.count, dtype=torch.float64), "rows": torch.tensor(self.rows)}
        parts = {"weight": self.weight, "keys": self.keys, "values": self.values}
        return state | {name: t for name, t in parts.items() if t is not None}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state."""
        self.count, self.rows = float(state["count"]), int(state["rows"])
        self.weight, self.keys, self.values = (state.get(name) for name in ("weight", "keys", "values"))


def pseudoinverse_map(keys: Tensor, values: Tensor, tolerance: float) -> Tensor:
    """(pinv(K, rtol) V)^T, [e, d] float64, differentiable by the values [N, e]; keys [N, d]."""
    with torch.no_grad():
        sums = SufficientStatistics(values.shape[1]).update(keys, values)
        spectrum = Spectrum.from_statistics(sums, centered=False)
        kept = Choice("truncation", tolerance).filter(spectrum)
    cross = keys.to(torch.float64).T @ values.to(torch.float64)
    return (spectrum.basis @ (kept[:, None] * (spectrum.basis.T @ cross))).T


class ChunkedFastWeights(MixingLearner):
    r"""The paper's output layer in its chunked mode: hidden' = (1 - m) h + m W h, W of :class:`ChunkedMap`.

    Args:
        output: The model's output layer.
        embeddings: The model's input embeddings.
        mix: m.
        update_size: Tokens of a chunk.
        memory_size: Tokens in the bank from which on a chunk leaves it.
        alpha: A chunk's tolerance is its tokens to the power -alpha; 0.5 to 1.2 by task in the paper.

    Example:
        >>> import torch
        >>> from lightning_faast.language import ChunkedFastWeights, OutputLayer
        >>> table = torch.nn.Embedding(50, 16)
        >>> layer = ChunkedFastWeights(OutputLayer(torch.nn.Linear(16, 50)), table, update_size=32, memory_size=64)
        >>> tokens = torch.randint(50, (4, 30))
        >>> layer.fit(table(tokens).detach(), tokens).solution.count
        116.0
    """

    def __init__(
        self,
        output: OutputLayer,
        embeddings: nn.Module,
        *,
        mix: float = 0.9,
        update_size: int = 8192,
        memory_size: int = 65536,
        alpha: float = 0.8,
    ) -> None:
        super().__init__(output, embeddings, mix)
        self._map = ChunkedMap(update_size, memory_size, alpha)
        self.reset()

    def reset(self) -> None:
        """Forget every token seen; what was solved stays until the next :meth:`solve`."""
        self._map.clear()
        self._faults = FaultLog(self.output.vocabulary)
        self.solution = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, keys: Tensor, values: Tensor, weights: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Take in tokens, in order; W changes at the next :meth:`solve`.

        Args:
            keys: Hidden states [B, T, d], or rows [N, d].
            values: Labels [B, T] (predicted from the state before; -100 is left out), or the tokens of the rows [N].
            weights: Not taken: chunks count tokens.
            positions: Not taken: the order is that of the calls.

        Raises:
            ValueError: As :meth:`ResidualFastWeights.update`, and for weights.
        """
        if weights is not None:
            raise ValueError("The chunked mode takes no weights: a chunk counts its tokens.")
        rows, tokens, kept = self._rows(keys, values, None)
        if kept is not None:  # chunks must be counted, so the device is waited for
            rows, tokens = rows[kept > 0], tokens[kept > 0]
        if len(rows):
            self._faults.check(rows, tokens)
            self._map.add(rows, self._values(tokens))

    def merge(self, other: ChunkedFastWeights) -> None:
        """Take in the other's solution, weighted by its tokens, as the paper's mean does with a chunk's."""
        self._map.merge(*other._map.read())

    def subtract(self, other: ChunkedFastWeights) -> None:
        """Refused: a mean of solutions does not forget."""
        raise ValueError("The chunked mode cannot forget: use mode='embedding' or 'residual', whose sums subtract.")

    def reduce(self, add: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Replace this process's solution by the mean of all, weighted by their tokens; as :meth:`Learner.reduce`."""
        self._map.reduce(add, self.mixed)

    @property
    def rows(self) -> int:
        """Tokens seen since the last :meth:`reset`."""
        return self._map.rows

    @torch.inference_mode(False)
    @torch.no_grad()
    def solve(self) -> MapSolution:
        """Set W from the chunks that left the bank and those still in it.

        Raises:
            RuntimeError: Where no token was seen.
        """
        self._faults.verify()
        return self._store_solution(MapSolution(*self._map.read()))

    def learned_state(self) -> dict[str, Tensor]:
        """W0 and the bank: what is needed to go on learning."""
        return self._map.state_dict()

    def load_learned_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`learned_state`."""
        self._map.load_state_dict({name: t.to(self.output.device) for name, t in state.items()})

    @property
    def bytes_to_update(self) -> int:
        """Bytes of W0 and the bank."""
        return self._map.num_bytes

    def summary(self) -> str:
        """How many tokens the mean is of."""
        return f"chunked, {map_summary(self._last_solution())}"

    def extra_repr(self) -> str:
        """In the manner of nn.Linear."""
        m = self._map
        return f"mix={self.mix}, update_size={m.update_size}, memory_size={m.memory_size}, alpha={m.alpha}"
