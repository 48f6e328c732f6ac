"""Sums and samples of several processes made one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_faast.associative.reservoir import Reservoir
from lightning_faast.associative.statistics import SufficientStatistics

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def reduced(
    statistics: SufficientStatistics,
    reservoir: Reservoir,
    add: Callable[[Tensor], Tensor],
    gather: Callable[[Tensor], list[Tensor]],
    device: torch.device,
) -> tuple[SufficientStatistics, Reservoir]:
    """Statistics and sample of all processes together, the same on each.

    What is wrong with one process is told to all, so that none of them waits for the others.

    Args:
        statistics: Of this process, perhaps without rows.
        reservoir: Of this process.
        add: Sums a tensor over processes, out of place.
        gather: Collects a tensor of one shape and dtype from every process.
        device: Where a process without rows keeps its sums.

    Raises:
        ValueError: On every process, where one holds bad rows, or rows of another width or kind.
    """
    bad = None
    try:
        statistics.verify()
    except ValueError as error:
        bad = error
    device = statistics.device or device
    columns = statistics.shape[1] if statistics.rows and bad is None else 0
    dtype = _FLOATS.index(reservoir.keys.dtype) if len(reservoir) else -1
    own = [
        statistics.rows,
        int(bool(statistics.labels)),
        statistics.num_features or 0,
        columns,
        dtype,
        int(bad is not None),
    ]
    table = torch.stack(gather(torch.tensor(own, device=device))).cpu()
    if bad is not None:
        raise bad
    if bool(table[:, 5].any()):
        raise ValueError("Another process saw bad rows (NaN, or a label out of range); it names the batch.")
    seen = table[table[:, 0] > 0]
    if not len(seen):
        return statistics, reservoir
    labels, d, columns = bool(seen[0, 1]), int(seen[0, 2]), int(seen[:, 3].max())
    if len(seen[:, 1].unique()) > 1 or len(seen[:, 2].unique()) > 1 or not (labels or int(seen[:, 3].min()) == columns):
        kinds = [f"{'labels' if row[1] else f'{row[3]} values'} for keys of width {row[2]}" for row in seen.tolist()]
        raise ValueError(f"Processes hold different kinds of rows: {', '.join(kinds)}.")
    if not statistics.rows:
        statistics = SufficientStatistics(statistics.num_classes, statistics.num_features)
        statistics.allocate(d, columns, device)
    elif columns > statistics.shape[1]:
        statistics = statistics.mapped(torch.clone)
        statistics.grow(columns)
    merged = statistics.mapped(add)
    merged.labels, merged.rows = labels, int(table[:, 0].sum())
    held = [_FLOATS[i] for i in seen[:, 4].tolist() if i >= 0]
    if not held or not reservoir.size:
        return merged, reservoir
    keys_dtype = held[0]
    for other in held[1:]:
        keys_dtype = torch.promote_types(keys_dtype, other)
    empty = {
        "keys": torch.empty(0, d, dtype=keys_dtype, device=device),
        "values": torch.empty(
            (0,) if labels else (0, columns), dtype=torch.int64 if labels else torch.float64, device=device
        ),
        "weights": torch.empty(0, dtype=torch.float64, device=device),
    }
    return merged, reservoir.gathered(gather, empty)
