"""What a pass tells its user: the same figures in the closing line and in every logger."""

from __future__ import annotations

import time
from typing import Any

import torch

from lightning_faast.associative import Learner


class Stopwatch:
    """Seconds spent in a block, added up; by events on CUDA, so that nobody waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            self._events.append(pair)
        else:
            self._start = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        if self.device.type == "cuda":
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._start

    def seconds(self) -> float:
        """So far; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self.device)
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1e3
            self._events.clear()
        return self._seconds


def figures(learner: Learner, rows: int, encode: float, statistics: float, solve: float) -> dict[str, float]:
    """The figures of a pass by their logged names.

    Args:
        learner: What learnt.
        rows: Rows seen, over all processes.
        encode: Seconds from the start of the pass to its last batch, less ``statistics``: encoder and data loading.
        statistics: Seconds in the updates of the learner.
        solve: Seconds in the solve, leave-one-out scores included.
    """
    named = {
        "rows": rows,
        "key_width": learner.in_features or 0,
        "outputs": learner.out_features or 0,
        "seconds_encode": encode,
        "seconds_statistics": statistics,
        "seconds_solve": solve,
        "bytes_to_update": learner.bytes_to_update,
        "bytes_to_predict": learner.bytes_to_predict,
        **learner.figures(),
    }
    return {f"faast/{name}": float(value) for name, value in named.items()}


def closing_line(learner: Learner, figures: dict[str, float], expected_rows: int | None, device: torch.device) -> str:
    """One line at the end of the pass.

    Args:
        learner: What learnt.
        figures: As :func:`figures` gives them.
        expected_rows: Rows of the data set, where known: ``drop_last`` and limits lose some.
        device: Where the keys were.
    """
    f = {name.removeprefix("faast/"): value for name, value in figures.items()}
    of = "" if expected_rows is None else f" of {expected_rows:,}"
    parts = [
        f"{int(f['rows']):,}{of} {learner.unit}, d {int(f['key_width'])}, c {int(f['outputs'])}",
        learner.summary(),
        f"{f['seconds_encode']:.1f} s encoder, {f['seconds_statistics']:.2f} s statistics, "
        f"{f['seconds_solve']:.2f} s solve",
        f"{f['bytes_to_update'] / 1e6:.1f} MB of state on {device}",
    ]
    return "FAAST: " + "; ".join(parts) + "."
