"""What a pass tells its user: the same figures in the closing line and in every logger."""

from __future__ import annotations

import time
from typing import Any

import torch

from lightning_faast.associative import FastWeights, Solution


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


def figures(
    solution: Solution, learner: FastWeights, rows: int, encode: float, statistics: float, solve: float
) -> dict[str, float]:
    """The figures of a pass by their logged names.

    Args:
        solution: What was found.
        learner: What learnt it.
        rows: Rows seen, over all processes.
        encode: Seconds from the start of the pass to its last batch, less ``statistics``: encoder and data loading.
        statistics: Seconds in the sums.
        solve: Seconds in the solve, leave-one-out scores included.
    """
    choice = solution.regularization
    named = {
        "rows": rows,
        "key_width": solution.weight.shape[1],
        "outputs": solution.weight.shape[0],
        "effective_rank": solution.effective_rank,
        "ridge" if choice.kind == "ridge" else "tolerance": choice.value,
        "at_edge": choice.at_edge,
        "temperature": solution.temperature,
        "r_squared": solution.r_squared,
        "rounding_bound": solution.error_bound,
        "seconds_encode": encode,
        "seconds_statistics": statistics,
        "seconds_solve": solve,
        "bytes_to_update": learner.bytes_to_update,
        "bytes_to_predict": learner.bytes_to_predict,
        "leave_one_out_accuracy": solution.leave_one_out_accuracy,
        "leave_one_out_loss": solution.leave_one_out_loss,
    }
    return {f"faast/{name}": float(value) for name, value in named.items() if value is not None}


def closing_line(solution: Solution, figures: dict[str, float], expected_rows: int | None, device: torch.device) -> str:
    """One line at the end of the pass.

    Args:
        solution: What was found.
        figures: As :func:`figures` gives them.
        expected_rows: Rows of the data set, where known: ``drop_last`` and limits lose some.
        device: Where the keys were.
    """
    f = {name.removeprefix("faast/"): value for name, value in figures.items()}
    of = "" if expected_rows is None else f" of {expected_rows:,}"
    accuracy = solution.leave_one_out_accuracy
    parts = [
        f"{int(f['rows']):,}{of} rows, d {int(f['key_width'])}, c {int(f['outputs'])}",
        f"{solution.readout}, {solution.regularization}, effective rank {solution.effective_rank:.0f}",
        f"leave-one-out accuracy {'n/a' if accuracy is None else f'{accuracy:.3f}'}",
        f"{f['seconds_encode']:.1f} s encoder, {f['seconds_statistics']:.2f} s statistics, "
        f"{f['seconds_solve']:.2f} s solve",
        f"{f['bytes_to_update'] / 1e6:.1f} MB of state on {device}",
    ]
    return "FAAST: " + "; ".join(parts) + "."
