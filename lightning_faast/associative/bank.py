"""The rows that a memory keeps: all of a stream, or a uniform sample of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_faast.associative.faults import FaultLog, agreed_width, told_to_all
from lightning_faast.associative.reservoir import Reservoir

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Bank:
    """Keys and labels of a stream, in the dtype in which the keys came (at least 16 bits).

    Args:
        num_classes: Labels must lie in ``[0, num_classes)``; any number of classes where None.
        num_features: Width d of the keys; from the first batch where None.
        max_rows: Rows kept at most, a uniform sample of the stream that does not depend on how it is cut into batches
            or shared out to processes; all rows where None.
        seed: Another seed samples other rows.

    Raises:
        ValueError: From :meth:`update` for NaN or infinite keys, labels out of range and mismatched widths.

    Example:
        >>> import torch
        >>> from lightning_faast.associative.bank import Bank
        >>> bank = Bank(num_classes=3, max_rows=10)
        >>> bank.update(torch.randn(100, 8), torch.arange(100) % 3)
        >>> len(bank), bank.seen
        (10, 100)
    """

    def __init__(
        self,
        num_classes: int | None = None,
        num_features: int | None = None,
        max_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, or None to keep every row, got {max_rows}.")
        self.num_features = num_features
        self._faults = FaultLog(num_classes)
        self._rows: _Everything | Reservoir = _Everything() if max_rows is None else Reservoir(max_rows, seed)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def seen(self) -> int:
        """Rows of the stream."""
        return self._rows.seen

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows held, their positions or priorities included."""
        return self._rows.num_bytes

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, keys: Tensor, labels: Tensor, positions: Tensor | None = None) -> None:
        """Take in rows.

        Args:
            keys: [N, d].
            labels: [N] int64.
            positions: Optional int64 [N] on the CPU: places of these rows in the whole stream; counted on where None.
        """
        if self.num_features not in (None, keys.shape[1]):
            raise ValueError(
                f"keys must have width {self.num_features}, as declared or seen before, got {keys.shape[1]}."
            )
        if not len(keys):
            return
        if keys.element_size() == 1:  # float8 has hardly any operation
            keys = keys.to(torch.float16)
        labels = labels.to(keys.device)
        self._faults.check(keys, labels)
        self.num_features = keys.shape[1]
        self._rows.update(keys, labels, None, positions)

    def joined(self) -> tuple[Tensor, Tensor]:
        """Keys [R, d] and labels [R]: in the order of the stream, or of their priorities where they are a sample.

        Raises:
            RuntimeError: Where no row was seen.
            ValueError: For bad rows on devices where that is not known before.
        """
        if not len(self):
            raise RuntimeError(
                "No rows were seen: there is nothing to remember. Call fit, or update with at least one row."
            )
        self._faults.verify()
        keys, labels = self._rows.keys, self._rows.values
        if isinstance(self._rows, Reservoir):  # the slots of a reservoir depend on the batches
            order = self._rows.state_dict()["priorities"].argsort().to(keys.device)
            keys, labels = keys[order], labels[order]
        return keys, labels

    def reduce(self, gather: Callable[[Tensor], list[Tensor]], device: torch.device) -> None:
        """Replace the rows by those of all processes, in the order of their positions.

        Args:
            gather: Collects a tensor of one shape and dtype from every process.
            device: Of the communication where this process has no row.

        Raises:
            ValueError: On every process, where one holds bad rows, or rows of another width.
        """
        held = len(self) > 0
        device = self._rows.keys.device if held else device
        dtype = _FLOATS.index(self._rows.keys.dtype) if held else -1
        table = told_to_all(self._faults, [len(self), self.num_features or 0, dtype], gather, device)
        table = table[table[:, 0] > 0]
        if not len(table):
            return
        self.num_features = agreed_width(table[:, 1])
        common = _FLOATS[int(table[0, 2])]
        for other in table[1:, 2].tolist():
            common = torch.promote_types(common, _FLOATS[other])
        self._rows = self._rows.gathered(
            gather,
            {
                "keys": torch.empty(0, self.num_features, dtype=common, device=device),
                "values": torch.empty(0, dtype=torch.int64, device=device),
                "weights": torch.empty(0, dtype=torch.float64, device=device),
            },
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only."""
        self._faults.verify()
        return self._rows.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            ValueError: For a damaged state, or keys of another width or labels of other classes than declared.
        """
        keys, labels = state.get("keys"), state.get("values")
        if keys is not None and labels is not None and len(keys):
            if keys.ndim != 2 or self.num_features not in (None, keys.shape[1]):
                raise ValueError(f"The state has keys {tuple(keys.shape)}, expected width {self.num_features}.")
            if int(labels.min()) < 0 or int(labels.max()) >= self._faults.num_classes:
                raise ValueError(
                    f"The state has labels from {int(labels.min())} to {int(labels.max())}, expected "
                    f"[0, {self._faults.num_classes})."
                )
            self.num_features = keys.shape[1]
        self._rows.load_state_dict(state)


class _Everything:
    """All rows of a stream, as a :class:`Reservoir` that never forgets: chunks, joined when they are read."""

    def __init__(self) -> None:
        self._chunks: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return sum(len(chunk["positions"]) for chunk in self._chunks)

    @property
    def seen(self) -> int:
        return len(self)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for chunk in self._chunks for t in chunk.values())

    @property
    def keys(self) -> Tensor:
        return self._joined()["keys"]

    @property
    def values(self) -> Tensor:
        return self._joined()["values"]

    def _joined(self) -> dict[str, Tensor]:
        """One chunk of all rows, where the last ones are: rows of a checkpoint come on the CPU."""
        if len(self._chunks) > 1:
            last = self._chunks[-1]
            self._chunks = [
                {name: torch.cat([chunk[name].to(last[name].device) for chunk in self._chunks]) for name in last}
            ]
        return self._chunks[0]

    def update(self, keys: Tensor, values: Tensor, weights: None, positions: Tensor | None) -> None:
        if positions is None:
            positions = torch.arange(self.seen, self.seen + len(keys))
        if not len(positions) == len(values) == len(keys):
            raise ValueError(f"{len(keys)} keys, but {len(values)} values and {len(positions)} positions.")
        # Copies: a view (the first token of [B, T, d]) would keep all of its batch in memory, and may be written to.
        chunk = {"keys": keys.detach(), "values": values.detach(), "positions": positions}
        self._chunks.append({name: t.clone(memory_format=torch.contiguous_format) for name, t in chunk.items()})

    def gathered(self, gather: Callable[[Tensor], list[Tensor]], shapes: Mapping[str, Tensor]) -> _Everything:
        device = shapes["keys"].device
        counts = [int(n) for n in gather(torch.tensor(len(self), device=device))]
        empty = {"keys": shapes["keys"], "values": shapes["values"], "positions": shapes["values"]}
        own = self._joined() if self._chunks else empty
        rows = {}
        for name, like in empty.items():
            # All processes send equal shapes; the padding is cut off again.
            padded = like.new_zeros((max(counts), *like.shape[1:]))
            padded[: len(self)] = own[name]
            rows[name] = torch.cat([part[:n] for part, n in zip(gather(padded), counts, strict=True)])
        order = rows["positions"].argsort(stable=True)
        result = _Everything()
        result._chunks = [{name: t[order] for name, t in rows.items()}]
        result._chunks[0]["positions"] = result._chunks[0]["positions"].cpu()
        return result

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._joined()) if self._chunks else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        names = ("keys", "values", "positions")
        held = [state[name] for name in names if name in state]
        if len(held) not in (0, 3) or len({len(t) for t in held}) > 1:
            raise ValueError("Not the state of a bank of all rows: entries are missing, or of different lengths.")
        self._chunks = [{name: state[name].detach().clone() for name in names}] if held and len(held[0]) else []
