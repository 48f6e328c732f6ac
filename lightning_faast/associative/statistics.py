"""Sufficient statistics of a linear map from keys to values: what one pass over the data has to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_faast.associative.batches import faults_of, refuse, rows_of_values
from lightning_faast.associative.precision import accumulation_device
from lightning_faast.associative.triangle import pack_triangle, unpack_triangle

#: Float64 elements of keys held at a time while a batch is added (4 MiB).
_BLOCK_ELEMENTS = 2**19
#: Rows added at a time at most. A long sum in one accumulator drifts where all terms round alike, as in a constant
#: column: n/8 units in the last place, measured. Sums of short sums do not.
_BLOCK_ROWS = 1024
#: Classes grow with the labels seen up to here; a label beyond it is more likely an identifier, or a mistake.
_MAX_GROWN_CLASSES = 2**18
#: A row of values sums to one if it does to within this: the softmax of 1,000 classes in half precision.
_SUM_TOLERANCE = 2e-2
#: Sums with one entry or row a column of values.
_BY_COLUMN = ("cross", "value_sum", "value_square_sum")
#: Sums that cannot be negative.
_NON_NEGATIVE = ("count", "value_square_sum", "value_deviation")
#: On devices where reading a flag means waiting for the device, bad input is looked for once in so many updates.
_CHECK_EVERY = 64
#: Names of the summed tensors, in the order in which they are reduced and stored.
SUMS = ("gram", "cross", "count", "key_sum", "value_sum", "value_square_sum", "value_deviation")


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
        return self.lower_gram.tril() + self.lower_gram.tril(-1).T

    @property
    def lower_gram(self) -> Tensor:
        """G as it is summed, [d, d] float64: only the lower triangle, diagonal included, means anything."""
        return self._read("gram")

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
        return bool(self.labels) or float(self._read("value_deviation")[0]) == 0

    @property
    def values_are_distributions(self) -> bool:
        """Whether every row of values is non-negative and sums to one, to within half-precision rounding."""
        return bool(self.labels) or float(self._read("value_deviation")[1]) == 0

    @property
    def num_bytes(self) -> int:
        """Bytes needed to go on updating, with G as a packed triangle (as it is stored in files)."""
        if not self._sums:
            return 0
        d = self._sums["gram"].shape[0]
        return 8 * (d * (d + 1) // 2 + sum(t.numel() for name, t in self._sums.items() if name != "gram"))

    @property
    def shape(self) -> tuple[int, int]:
        """Widths (d, c) of the keys and the values seen."""
        columns, d = self._read("cross").shape
        return d, columns

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

    @torch.inference_mode(False)
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
        batch = self._updates
        self._updates += 1
        keys, values, weights = self._as_rows(keys, values, weights)
        if keys.shape[0] == 0:
            return self
        device = self.device or accumulation_device(keys.device)
        if device.type == "cpu":
            keys, values, weights = keys.cpu(), values.cpu(), None if weights is None else weights.cpu()
        block = max(1, min(_BLOCK_ROWS, _BLOCK_ELEMENTS // keys.shape[1]))
        spans = [slice(i, i + block) for i in range(0, keys.shape[0], block)]
        columns = self._columns(values, batch)
        checked_first = _flags_are_free(device)
        if checked_first:  # refuse before anything is allocated or added
            for span in spans:
                w = None if weights is None else weights[span]
                refuse(faults_of(keys[span], values[span], w, columns), batch, self.num_classes)
        self._make_room(keys.shape[1], columns, device, labels=values.ndim == 1)
        for span in spans:
            k = keys[span].to(device=device, dtype=torch.float64)
            v = values[span].to(device=device)
            w = None if weights is None else weights[span].to(device=device, dtype=torch.float64)
            if not checked_first:
                self._note_faults(faults_of(k, v, w, columns), batch)
            self._add(k, v, w)
        self.rows += keys.shape[0]
        if self._updates % _CHECK_EVERY == 0:
            self.verify()
        return self

    def _as_rows(self, keys: Tensor, values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if keys.ndim < 2 or not keys.is_floating_point() or not keys.shape[-1]:
            raise ValueError(
                f"keys must be floating point of shape [..., d], d at least 1, got {keys.dtype} {tuple(keys.shape)}."
            )
        lead, d = keys.shape[:-1], keys.shape[-1]
        values = rows_of_values(values.detach(), lead)
        if weights is not None:
            if weights.shape != lead or weights.is_complex():
                raise ValueError(
                    f"weights must be {tuple(lead)}, one real number for each row, got {weights.dtype} "
                    f"{tuple(weights.shape)}."
                )
            weights = weights.detach().reshape(-1)
        if self.num_features is not None and d != self.num_features:
            raise ValueError(f"keys must have width {self.num_features}, as declared or seen before, got {d}.")
        if self.labels is not None and (values.ndim == 1) != self.labels:
            raise ValueError(
                "labels and dense values cannot be mixed: these statistics hold "
                f"{'labels' if self.labels else 'dense values'}."
            )
        held = self._sums["cross"].shape[0] if self._sums else self.num_classes
        if values.ndim == 2 and held is not None and values.shape[1] != held:
            raise ValueError(f"values must have {held} columns, as declared or seen before, got {values.shape[1]}.")
        return keys.detach().reshape(-1, d), values, weights

    def _columns(self, values: Tensor, batch: int) -> int:
        """Columns of ``cross`` that these values need."""
        if values.ndim == 2:
            return values.shape[1]
        if self.num_classes is not None:
            return self.num_classes
        largest = int(values.max())
        if largest >= _MAX_GROWN_CLASSES:
            raise ValueError(
                f"Batch {batch} (counted from 0): label {largest} would make {largest + 1} classes. Number the classes "
                "from 0, or give num_classes (out_features) if there are so many."
            )
        return max(largest + 1, self._sums["cross"].shape[0] if self._sums else 1)

    def _make_room(self, num_features: int, columns: int, device: torch.device, *, labels: bool) -> None:
        if not self._sums:
            self.allocate(num_features, columns, device)
        elif columns > self._sums["cross"].shape[0]:  # only labels without num_classes get here
            self.grow(columns)
        self.labels = labels

    def allocate(self, num_features: int, num_columns: int, device: torch.device | str = "cpu") -> None:
        """Set all sums to zero, of known shapes: what a process that may see no row needs to take part in a sum."""
        self.num_features = num_features
        shapes = _shapes(num_features, num_columns)
        self._sums = {name: torch.zeros(shapes[name], dtype=torch.float64, device=device) for name in SUMS}
        self._first_bad = None

    def grow(self, num_columns: int) -> None:
        """Add classes without rows, up to ``num_columns`` in all."""
        for name in _BY_COLUMN:
            old = self._sums[name]
            new = old.new_zeros((num_columns, *old.shape[1:]))
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
            if s["cross"].shape[0] <= len(v):  # a short sum of its own, as above
                s["cross"] += torch.zeros_like(s["cross"]).index_add_(0, v, weighted)
            else:
                s["cross"].index_add_(0, v, weighted)
            s["value_sum"].index_add_(0, v, ones)
            s["value_square_sum"].index_add_(0, v, ones)
            return
        v = v.to(torch.float64)
        s["cross"] += v.T @ weighted
        wv = v if w is None else v * w[:, None]
        s["value_sum"] += wv.sum(0)
        s["value_square_sum"] += (wv * v).sum(0)
        # Numbers of rows that are not binary, not a distribution: whole numbers, so that they add and subtract exactly.
        counted = torch.ones_like(v[:, 0], dtype=torch.bool) if w is None else w > 0
        apart = (v.sum(1) - 1).abs() > _SUM_TOLERANCE
        s["value_deviation"][0] += (((v != 0) & (v != 1)).any(1) & counted).sum()
        s["value_deviation"][1] += ((apart | (v < 0).any(1)) & counted).sum()

    # ------------------------------------------------------------------ bad input

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
            refuse(torch.tensor([f == worst for f in first]), worst, self.num_classes)

    # ------------------------------------------------------------------ arithmetic

    def _combined(self, other: SufficientStatistics, sign: int) -> SufficientStatistics:
        if not isinstance(other, SufficientStatistics):
            return NotImplemented
        other.verify()
        result = self._clone()
        if not other._sums:
            return result
        columns, d = other._sums["cross"].shape
        if self.num_features not in (None, d):
            raise ValueError(f"Statistics of keys of different widths cannot be combined: {self.num_features} and {d}.")
        if None not in (self.labels, other.labels) and self.labels != other.labels:
            raise ValueError("Statistics of labels and of dense values cannot be combined.")
        result.labels = other.labels if self.labels is None else self.labels
        if not result._sums:
            held = max(columns, self.num_classes or 0) if result.labels else columns
            result.allocate(d, held, other.device or "cpu")
        held = result._sums["cross"].shape[0]
        fixed = not result.labels or None not in (self.num_classes, other.num_classes)
        if self.num_classes is not None:
            fixed = fixed or columns > self.num_classes
            held = self.num_classes
        if columns != held and fixed:
            raise ValueError(f"Statistics of different value widths cannot be combined: {held} and {columns}.")
        if columns > held:
            result.grow(columns)
        for name in SUMS:
            theirs = other._sums[name].to(result._sums[name].device)
            mine = result._sums[name]
            if name in _BY_COLUMN:
                mine = mine[: theirs.shape[0]]
            mine.add_(theirs, alpha=sign)
        result.rows += sign * other.rows
        if sign < 0:
            result._refuse_negative(self, other)
        return result

    def _refuse_negative(self, before: SufficientStatistics, taken: SufficientStatistics) -> None:
        """After a subtraction: sums of squares and counts must not be negative; without rows, nothing is left."""
        negative = self.rows < 0
        for name in (*_NON_NEGATIVE, "gram"):
            rest, held = self._sums[name], before._sums.get(name)
            if name == "gram":
                rest, held = rest.diagonal(), None if held is None else held.diagonal()
            scale = 0.0 if held is None else float(held.abs().max())
            negative = negative or bool((rest < -1e-9 * scale).any())
        if negative:
            raise ValueError(
                f"Cannot take out {taken.rows} rows of statistics that hold {before.rows}: they are not all among "
                "them. Subtract only what was added before."
            )
        if self.rows == 0:
            for rest in self._sums.values():
                rest.zero_()

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
            missing += [name for name in SUMS if name not in state]
        if missing:
            raise ValueError(f"Not a state of SufficientStatistics: {', '.join(missing)} missing.")
        sums: dict[str, Tensor] = {}
        if "gram" in state:
            if state["cross"].ndim != 2:
                raise ValueError(f"A damaged state: cross is {tuple(state['cross'].shape)}, should be [c, d].")
            columns, d = state["cross"].shape
            if self.num_features not in (None, d):
                raise ValueError(f"The state has keys of width {d}, expected {self.num_features}.")
            if self.num_classes not in (None, columns):
                raise ValueError(f"The state has {columns} classes or value columns, expected {self.num_classes}.")
            sums = {name: state[name].detach().to(torch.float64, copy=True) for name in SUMS}
            sums["gram"] = unpack_triangle(sums["gram"], d)
            for name, shape in _shapes(d, columns).items():
                if sums[name].shape != shape or not bool(sums[name].isfinite().all()):
                    raise ValueError(f"A damaged state: {name} is {tuple(sums[name].shape)} or not finite.")
            self.num_features = d
        self.rows = int(state["rows"])
        self.labels = None if int(state["labels"]) < 0 else bool(state["labels"])
        self._first_bad, self._sums = None, sums


def _shapes(num_features: int, num_columns: int) -> dict[str, tuple[int, ...]]:
    return {
        "gram": (num_features, num_features),
        "cross": (num_columns, num_features),  # transposed, so that labels scatter whole rows
        "count": (),
        "key_sum": (num_features,),
        "value_sum": (num_columns,),
        "value_square_sum": (num_columns,),
        "value_deviation": (2,),
    }


def _flags_are_free(device: torch.device) -> bool:
    """Whether reading a flag does not mean waiting for the device."""
    return device.type == "cpu"


def _add_lower_gram(gram: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the lower triangle of left^T right, known to be symmetric, to that of ``gram``.

    Four column panels, each from its diagonal down, are 5/8 of the work of the full product. What lies above the
    diagonal is never read.
    """
    d = gram.shape[0]
    panel = -(-d // 4) if d >= 256 else d
    for i in range(0, d, panel):
        # Not addmm_: it goes on in the accumulators of all the rows before, and drifts (see _BLOCK_ROWS).
        gram[i:, i : i + panel] += left[:, i:].T @ right[:, i : i + panel]
