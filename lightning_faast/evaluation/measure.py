"""Time, memory and quality, measured alike for every method."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_calibration_error

from lightning_faast.evaluation.records import Rows, mean_class_accuracy

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_REPEATS = 30  # timed calls; the median counts
_PATIENCE = 2.0  # seconds after which no further call is timed


class PeakMemory:
    """By how many bytes the memory of the process (on CUDA: of the device) rose, at its peak, since this was made."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
            self.start: int | None = torch.cuda.memory_allocated(device)
            return
        self.start = None
        try:
            _CLEAR.write_text("5")  # Linux: the high-water mark starts anew from here
            self.start = _resident("VmRSS")
        except OSError:  # another system, or not permitted
            return

    @property
    def _on_cuda(self) -> bool:
        return self.device is not None and self.device.type == "cuda"

    def growth(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self.start is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self._on_cuda else _resident("VmHWM")
        return max(0, peak - self.start)


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    if found is None:
        raise OSError(f"{_STATUS} has no {name}.")
    return 1024 * int(found[1])


def microseconds(head: nn.Module, keys: Tensor, batch: int) -> float:
    """Median wall time of a prediction, in microseconds a row.

    Args:
        head: Maps keys to logits.
        keys: [N, d] on the head's device; repeated where N is less than ``batch``.
        batch: Rows of one call.
    """
    repeated = keys.repeat(-(-batch // len(keys)), 1)[:batch].contiguous()
    times: list[float] = []
    started = time.perf_counter()
    with torch.inference_mode():
        head(repeated)
        while len(times) < _REPEATS and (not times or time.perf_counter() - started < _PATIENCE):
            synchronize(keys.device)
            start = time.perf_counter()
            head(repeated)
            synchronize(keys.device)
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] / batch * 1e6


def device_name(device: torch.device) -> str:
    """Of the GPU, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def synchronize(device: torch.device) -> None:
    """Wait for the device where it works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quality(log_probabilities: Tensor, labels: Tensor) -> tuple[dict[str, Any], Rows]:
    """Accuracy, mean class accuracy, loss and calibration error (15 bins), and what was said of each row.

    Args:
        log_probabilities: [n, c].
        labels: [n] int64.

    Raises:
        ValueError: Where a log probability is NaN.
    """
    if log_probabilities.isnan().any():
        raise ValueError("The head predicts NaN. Look at its weights and at the keys of the test rows.")
    rows = Rows.from_log_probabilities(log_probabilities, labels)
    return quality_of_rows(rows), rows


def quality_of_rows(rows: Rows) -> dict[str, Any]:
    """As :func:`quality`, from what was said of each row.

    Raises:
        ValueError: Where a log likelihood or a confidence is NaN.
    """
    if rows.log_likelihood.isnan().any() or rows.confidence.isnan().any():
        raise ValueError("The model predicts NaN. Look at what it learned, and at its precision.")
    # the confidence of the prediction, and whether it was right, are a binary problem: the same bins, the same sum
    right = rows.predicted == rows.label
    confidence = rows.confidence.clamp(0, 1)
    return {
        "accuracy": float(right.double().mean()),
        "mean_class_accuracy": mean_class_accuracy(rows),
        "loss": float(-rows.log_likelihood.double().mean()),
        "calibration_error": float(binary_calibration_error(confidence, right.long(), n_bins=15, norm="l1")),
    }
