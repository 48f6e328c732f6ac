"""Sufficient statistics of a linear map from keys to values: what one pass over the data has to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_faast.associative.precision import accumulation_device

#: Float64 elements of keys held at a time while a batch is added (16 MiB).
_BLOCK_ELEMENTS = 2**21
#: On devices where reading a flag means waiting for the device, bad input is looked for once in so many updates.
_CHECK_EVERY = 64
#: Names of the summed tensors, in the order in which they are reduced and stored.
_SUMS = ("gram", "cross", "count", "key_sum", "value_sum", "value_square_sum", "value_deviation")


class SufficientStatistics:
    r"""The sums of one pass over keys K [N, d] and values V [N, c], all float64.

    ==================  =======  ==========================================================================
    ``gram``            [d, d]   :math:`G = K^\top K`
    ``cross``           [d, c]   :math:`C = K^\top V`
    ``count``           scalar   n, the number of rows (the sum of their weights)
    ``key_sum``         [d]      sum of the keys
    ``value_sum``       [c]      sum of the values; the rows of each class where values are labels
    ``value_trace``     scalar   :math:`\mathrm{tr}(V^\top V)`
    ==================  =======  ==========================================================================

    Memory does not grow with N. Sums do not depend on the order or the size of the batches, sums of two machines add,
    and the rows of a data set are taken out again by subtracting its statistics. Integer labels are scattered into
    ``cross``; a dense one-hot matrix is never formed.

    Args:
        num_classes: Number of classes or value columns c. With it, a label outside ``[0, num_classes)`` is an error;
            without it, classes grow with the labels seen.
        num_features: Width d of the keys, taken from the first batch where not given. Two processes of which one
            sees no row need it to agree on shapes.

    Raises:
        ValueError: From :meth:`update` for NaN or infinite keys or values, labels out of range, mismatched lengths or
            widths. On the CPU nothing of the bad batch has been added. Elsewhere checking is deferred (at most 64
            updates, or the next read), so as not to wait for the device every batch; the sums are then spoiled.

    Example:
        >>> import torch
        >>> from lightning_faast.associative import SufficientStatistics
        >>> keys, labels = torch.randn(100, 8), torch.arange(100) % 3
        >>> whole = SufficientStatistics(num_classes=3).update(keys, labels)
        >>> parts = SufficientStatistics(num_classes=3).update(keys[:40], labels[:40])
        >>> parts += SufficientStatistics(num_classes=3).update(keys[40:], labels[40:])
        >>> torch.allclose(whole.gram, parts.gram), int(parts.count)
        (True, 100)
    """

    def __init__(self, num_classes: int | None = None, num_features: int | None = None) -> None:
        for name, number in (("num_classes", num_classes), ("num_features", num_features)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {number}.")
        self.num_classes = num_classes
        self.num_features = num_features
        #: Whether values are integer labels; None before the first row.
        self.labels: bool | None = None
        #: Rows seen, known without asking the device. Equal to ``count`` where no weights are given.
        self.rows = 0
        self._updates = 0
        self._sums: dict[str, Tensor] = {}
        self._first_bad: Tensor | None = None

    # ------------------------------------------------------------------ reading

    def _read(self, name: str) -> Tensor:
        self.verify()
        if not self._sums:
            raise RuntimeError("No rows were seen: call update(keys, values) before reading the statistics.")
        return self._sums[name]

    @property
    def gram(self) -> Tensor:
        """G = K^T K, [d, d] float64."""
        lower = self._read("gram")
        return lower.tril() + lower.tril(-1).T

    @property
    def cross(self) -> Tensor:
        """C = K^T V, [d, c] float64."""
        return self._read("cross").T

    @property
    def count(self) -> float:
        """n, the number of rows (the sum of the weights)."""
        return float(self._read("count")) if self._sums else 0.0

    @property
    def key_sum(self) -> Tensor:
        """Sum of the keys, [d] float64."""
        return self._read("key_sum")

    @property
    def value_sum(self) -> Tensor:
        """Sum of the values, [c] float64."""
        return self._read("value_sum")

    @property
    def value_trace(self) -> float:
        """tr(V^T V)."""
        return float(self._read("value_square_sum").sum())

    @property
    def class_counts(self) -> Tensor:
        """Rows of each class, [c] float64, where values are labels or one-hot rows.

        Raises:
            ValueError: Where values are neither.
        """
        if not (self.labels or (self.values_are_binary and self.values_are_distributions)):
            raise ValueError("class_counts needs integer labels or one-hot values; these values are neither.")
        return self.value_sum

    @property
    def values_are_binary(self) -> bool:
        """Whether every value seen is 0 or 1 (labels count as one-hot rows)."""
        return bool(self.labels) or float(self._read("value_deviation")[0]) == 0.0

    @property
    def values_are_distributions(self) -> bool:
        """Whether every row of values is non-negative and sums to one, to within float32 rounding."""
        return bool(self.labels) or float(self._read("value_deviation")[1]) <= 1e-4 * max(1.0, self.count)

    @property
    def num_bytes(self) -> int:
        """Bytes needed to go on updating, with G as a packed triangle (as it is stored in files)."""
        if not self._sums:
            return 0
        d = self._sums["gram"].shape[0]
        return 8 * (d * (d + 1) // 2 + sum(t.numel() for name, t in self._sums.items() if name != "gram"))

    @property
    def device(self) -> torch.device | None:
        """Where the sums are; None before the first row."""
        return self._sums["gram"].device if self._sums else None

    def __repr__(self) -> str:
        if not self._sums:
            return f"SufficientStatistics(num_classes={self.num_classes}, empty)"
        c, d = self._sums["cross"].shape
        return f"SufficientStatistics(rows={self.rows}, d={d}, c={c}, labels={self.labels}, device={self.device})"

    # ------------------------------------------------------------------ adding rows

    @torch.no_grad()
    def update(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> SufficientStatistics:
        """Add rows.

        Args:
            keys: [..., d], any floating dtype.
            values: Integer labels [...], or values [..., c] of any dtype.
            weights: Optional non-negative weight of each row [...]; a weight of k counts as k equal rows.

        Returns:
            Itself.
        """
        keys, values, weights = self._as_rows(keys, values, weights)
        labels = values.ndim == 1
        if keys.shape[0] == 0:
            return self
        self._allocate(keys, values, labels)
        device = self._sums["gram"].device
        block = max(1, _BLOCK_ELEMENTS // keys.shape[1])
        spans = [slice(i, i + block) for i in range(0, keys.shape[0], block)]
        batch = self._updates
        self._updates += 1
        if device.type == "cpu":  # reading a flag costs nothing: refuse before anything is added
            for span in spans:
                self._refuse(self._faults(keys[span], values[span], weights, span), batch)
        for span in spans:
            k = keys[span].to(device=device, dtype=torch.float64)
            v = values[span].to(device=device)
            w = None if weights is None else weights[span].to(device=device, dtype=torch.float64)
            if device.type != "cpu":
                self._note_faults(self._faults(k, v, w, slice(None)), batch)
            self._add(k, v, w)
        self.rows += keys.shape[0]
        if self._updates % _CHECK_EVERY == 0:
            self.verify()
        return self

    def _as_rows(self, keys: Tensor, values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if keys.ndim < 2 or not keys.is_floating_point():
            raise ValueError(f"keys must be floating point of shape [..., d], got {keys.dtype} {tuple(keys.shape)}.")
        lead, d = keys.shape[:-1], keys.shape[-1]
        integer = not (values.is_floating_point() or values.is_complex())
        if values.shape == lead and integer and values.dtype != torch.bool:
            values = values.detach().reshape(-1).long()
        elif values.ndim == keys.ndim and values.shape[:-1] == lead:
            values = values.detach().reshape(-1, values.shape[-1])
        elif values.shape == lead:  # one real or boolean value a row
            values = values.detach().reshape(-1, 1)
        else:
            raise ValueError(
                f"keys and values must have the same rows: keys are {tuple(keys.shape)}, so values must be labels "
                f"{tuple(lead)} or values {(*lead, 'c')}, got {tuple(values.shape)}."
            )
        if weights is not None:
            if weights.shape != lead:
                raise ValueError(f"weights must be {tuple(lead)}, one for each row, got {tuple(weights.shape)}.")
            weights = weights.detach().reshape(-1)
        if self.num_features is not None and d != self.num_features:
            raise ValueError(f"keys must have width {self.num_features} as before, got {d}.")
        if values.ndim == 2 and self.num_classes is not None and values.shape[1] != self.num_classes:
            raise ValueError(f"values must have {self.num_classes} columns, got {values.shape[1]}.")
        if self.labels is not None and (values.ndim == 1) != self.labels:
            raise ValueError(
                "labels and dense values cannot be mixed: these statistics hold "
                f"{'labels' if self.labels else 'dense values'}."
            )
        return keys.detach().reshape(-1, d), values, weights

    def _allocate(self, keys: Tensor, values: Tensor, labels: bool) -> None:
        d = keys.shape[1]
        if labels:
            columns = self.num_classes or max(int(values.max()) + 1, 1)
        else:
            columns = values.shape[1]
        if not self._sums:
            self.allocate(d, columns, accumulation_device(keys.device))
        self.labels = labels
        held = self._sums["cross"].shape[0]
        if columns > held:  # only labels without num_classes get here
            self._grow(columns)

    def allocate(self, num_features: int, num_columns: int, device: torch.device | str = "cpu") -> None:
        """Set all sums to zero, of known shapes: what a process that may see no row needs to take part in a sum."""
        self.num_features = num_features
        shapes: dict[str, tuple[int, ...]] = {
            "gram": (num_features, num_features),
            "cross": (num_columns, num_features),  # transposed, so that labels scatter whole rows
            "count": (),
            "key_sum": (num_features,),
            "value_sum": (num_columns,),
            "value_square_sum": (num_columns,),
            "value_deviation": (2,),
        }
        self._sums = {name: torch.zeros(shapes[name], dtype=torch.float64, device=device) for name in _SUMS}
        self._first_bad = None

    def _grow(self, columns: int) -> None:
        for name in ("cross", "value_sum", "value_square_sum"):
            old = self._sums[name]
            new = old.new_zeros((columns, *old.shape[1:]))
            new[: old.shape[0]] = old
            self._sums[name] = new

    def _add(self, k: Tensor, v: Tensor, w: Tensor | None) -> None:
        s = self._sums
        weighted = k if w is None else k * w[:, None]
        _add_lower_gram(s["gram"], weighted, k)
        s["key_sum"] += weighted.sum(0)
        s["count"] += k.shape[0] if w is None else w.sum()
        if v.ndim == 1:
            v = v.clamp(0, s["cross"].shape[0] - 1)  # an out-of-range label is already noted; never index outside
            ones = torch.ones_like(k[:, 0]) if w is None else w
            s["cross"].index_add_(0, v, weighted)
            s["value_sum"].index_add_(0, v, ones)
            s["value_square_sum"].index_add_(0, v, ones)
            return
        v = v.to(torch.float64)
        s["cross"].addmm_(v.T, weighted)
        wv = v if w is None else v * w[:, None]
        s["value_sum"] += wv.sum(0)
        s["value_square_sum"] += (wv * v).sum(0)
        # Sums of non-negative deviations: they are zero exactly where every value is binary, or every row a
        # distribution, and they add over machines as every other sum does.
        s["value_deviation"][0] += (v * (1 - v)).abs().sum()
        s["value_deviation"][1] += (v.sum(1) - 1).abs().sum() + v.clamp(max=0).abs().sum()

    # ------------------------------------------------------------------ bad input

    def _faults(self, k: Tensor, v: Tensor, w: Tensor | None, span: slice) -> Tensor:
        """Which of the four faults these rows have, [4] bool: keys, values, labels, weights."""
        # A sum is finite only where every term is (or it overflows, which is as bad): one pass, no mask in memory.
        faults = [~k.sum(dtype=torch.float64).isfinite()]
        if v.ndim == 2:
            faults += [~v.sum(dtype=torch.float64).isfinite(), torch.zeros_like(faults[0])]
        else:
            columns = self._sums["cross"].shape[0]
            faults += [torch.zeros_like(faults[0]), ((v < 0) | (v >= columns)).any().to(faults[0].device)]
        bad_weights = torch.zeros_like(faults[0])
        if w is not None:
            bad_weights = (~((w[span] >= 0) & w[span].isfinite())).any().to(faults[0].device)
        return torch.stack([*faults, bad_weights])

    def _refuse(self, faults: Tensor, batch: int) -> None:
        messages = (
            "keys hold NaN or infinite values. Look at this batch's input and at the encoder's precision",
            "values hold NaN or infinite numbers. Look at this batch's targets",
            f"a label is outside [0, {self.num_classes or 'inf'}). Check num_classes, or pass an ignore index",
            "weights must be finite and not negative",
        )
        for fault, message in zip(faults.tolist(), messages, strict=True):
            if fault:
                raise ValueError(f"Batch {batch} (counted from 0): {message}.")

    def _note_faults(self, faults: Tensor, batch: int) -> None:
        if self._first_bad is None:
            self._first_bad = torch.full((4,), torch.iinfo(torch.int64).max, device=faults.device)
        here = torch.where(faults, batch, torch.iinfo(torch.int64).max)
        self._first_bad = torch.minimum(self._first_bad, here)

    def verify(self) -> None:
        """Raise for bad rows that were noted but not yet reported (devices other than the CPU).

        Raises:
            ValueError: Naming the first bad batch; the sums hold it and cannot be used.
        """
        if self._first_bad is None:
            return
        first = self._first_bad.tolist()
        worst = min(first)
        if worst != torch.iinfo(torch.int64).max:
            self._refuse(torch.tensor([f == worst for f in first]), worst)

    # ------------------------------------------------------------------ arithmetic

    def _combined(self, other: SufficientStatistics, sign: int) -> SufficientStatistics:
        if not isinstance(other, SufficientStatistics):
            return NotImplemented
        result = self._clone()
        if not other._sums:
            return result
        if not result._sums:
            result.allocate(other._sums["gram"].shape[0], other._sums["cross"].shape[0], other.device or "cpu")
            result.labels = other.labels
        mine, theirs = result._sums["gram"].shape[0], other._sums["gram"].shape[0]
        if mine != theirs:
            raise ValueError(f"Statistics of keys of different widths cannot be combined: {mine} and {theirs}.")
        if None not in (result.labels, other.labels) and result.labels != other.labels:
            raise ValueError("Statistics of labels and of dense values cannot be combined.")
        result.labels = other.labels if result.labels is None else result.labels
        columns = other._sums["cross"].shape[0]
        held = result._sums["cross"].shape[0]
        if columns != held and (not result.labels or None not in (self.num_classes, other.num_classes)):
            raise ValueError(f"Statistics of different value widths cannot be combined: {held} and {columns}.")
        if columns > held:
            result._grow(columns)
        for name in _SUMS:
            theirs_sum = other._sums[name].to(result._sums[name].device)
            mine_sum = result._sums[name]
            if name in ("cross", "value_sum", "value_square_sum"):
                mine_sum = mine_sum[: theirs_sum.shape[0]]
            mine_sum.add_(theirs_sum, alpha=sign)
        result.rows += sign * other.rows
        if sign < 0 and (result.rows < 0 or float(result._sums["count"]) < -1e-9):
            raise ValueError(
                f"Cannot take out {other.rows} rows of statistics that hold {self.rows}: "
                "subtract only what was added before."
            )
        return result

    def __add__(self, other: SufficientStatistics) -> SufficientStatistics:
        return self._combined(other, 1)

    def __sub__(self, other: SufficientStatistics) -> SufficientStatistics:
        return self._combined(other, -1)

    def _clone(self) -> SufficientStatistics:
        return self.mapped(lambda t: t.clone())

    def mapped(self, function: Callable[[Tensor], Tensor]) -> SufficientStatistics:
        """A copy whose every sum went through ``function`` (a device move, a sum over processes)."""
        self.verify()
        result = SufficientStatistics(self.num_classes, self.num_features)
        result.labels, result.rows, result._updates = self.labels, self.rows, self._updates
        result._sums = {name: function(self._sums[name]) for name in self._sums}
        return result

    def to(self, device: torch.device | str) -> SufficientStatistics:
        """A copy on ``device`` (on the CPU where that device has no float64)."""
        target = accumulation_device(torch.device(device))
        return self.mapped(lambda t: t.to(target, copy=True))

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only; G as its packed lower triangle [d(d+1)/2]."""
        self.verify()
        state = {"rows": torch.tensor(self.rows), "labels": torch.tensor(-1 if self.labels is None else self.labels)}
        for name, value in self._sums.items():
            state[name] = pack_triangle(value) if name == "gram" else value.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state; widths already known here must agree.

        Raises:
            ValueError: For missing entries, or widths that do not agree.
        """
        missing = [name for name in ("rows", "labels") if name not in state]
        if "gram" in state:
            missing += [name for name in _SUMS if name not in state]
        if missing:
            raise ValueError(f"Not a state of SufficientStatistics: {', '.join(missing)} missing.")
        self.rows = int(state["rows"])
        self.labels = None if int(state["labels"]) < 0 else bool(state["labels"])
        self._first_bad, self._sums = None, {}
        if "gram" not in state:
            return
        columns, d = state["cross"].shape
        if self.num_features not in (None, d):
            raise ValueError(f"The state has keys of width {d}, expected {self.num_features}.")
        if self.num_classes not in (None, columns):
            raise ValueError(f"The state has {columns} classes or value columns, expected {self.num_classes}.")
        self.num_features = d
        self._sums = {
            name: unpack_triangle(state[name], d) if name == "gram" else state[name].to(torch.float64).clone()
            for name in _SUMS
        }


def _add_lower_gram(gram: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the lower triangle of left^T right, known to be symmetric, to that of ``gram``.

    Four column panels, each from its diagonal down, are 5/8 of the work of the full product. What lies above the
    diagonal is never read.
    """
    d = gram.shape[0]
    panel = -(-d // 4) if d >= 256 else d
    for i in range(0, d, panel):
        gram[i:, i : i + panel].addmm_(left[:, i:].T, right[:, i : i + panel])


def pack_triangle(matrix: Tensor) -> Tensor:
    """The lower triangle of a symmetric [d, d] matrix, row by row, [d(d+1)/2]."""
    i, j = torch.tril_indices(*matrix.shape, device=matrix.device)
    return matrix[i, j]


def unpack_triangle(packed: Tensor, d: int) -> Tensor:
    """The symmetric float64 [d, d] matrix of a packed lower triangle.

    Raises:
        ValueError: Where the length is not d(d+1)/2.
    """
    if packed.shape != (d * (d + 1) // 2,):
        raise ValueError(f"A packed triangle of width {d} has {d * (d + 1) // 2} entries, got {tuple(packed.shape)}.")
    i, j = torch.tril_indices(d, d, device=packed.device)
    matrix = torch.empty(d, d, dtype=torch.float64, device=packed.device)
    matrix[i, j] = packed.to(torch.float64)
    matrix[j, i] = matrix[i, j]
    return matrix
