"""What one run of a comparison measured: a JSON file, and a safetensors file of its test rows."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_faast.associative.files import save_tensors, write_text

#: Rows of the per-row file, all [test rows]; ``block`` may be missing.
ROW_COLUMNS = ("label", "predicted", "confidence", "log_likelihood", "block")


@dataclass(frozen=True)
class Record:
    """One run: a method, a number of shots, a seed.

    Attributes:
        method: The overlay's name, such as ``"faast"``.
        shots: Examples a class, or tokens learned; None for all.
        seed: Of the choice of examples, and of training.
        status: ``"done"``; ``"failed"`` where it ended in an error; ``"refused"`` where the method cannot do this.
        reason: Why it failed or was refused.
        command: What reproduces it, as typed in a shell.
        num_classes: c.
        key_width: d; 0 where unknown.
        train_rows: Labelled examples it learnt from.
        test_rows: Examples it was measured on.
        accuracy: Share of test rows predicted right.
        mean_class_accuracy: Mean over classes of the accuracy on each.
        loss: Mean negative log likelihood.
        calibration_error: Expected calibration error, 15 bins.
        seconds_encode: In the encoder and the data loading that feeds it, for adapting.
        seconds_fit: In what is done for every example beside the encoder: sums, storing, gradient steps.
        seconds_solve: After the last example.
        examples_encoded: Forward passes of the encoder while adapting, one example each.
        peak_memory: Bytes that the process (on CUDA: the device) held at most while adapting; None where unknown.
        bytes_to_predict: Bytes of what a prediction reads beside the encoder.
        bytes_to_update: Bytes of what learning on needs beside the encoder.
        microseconds_1: Wall time of a prediction from a key, batches of 1; None where keys are not to be had.
        microseconds_256: The same per row in batches of 256.
        parameters: Numbers trained or solved.
        device: Where it ran.
        unit: What shots and rows are: ``"shot"`` for labelled examples, ``"token"`` for running text.
        bits_per_byte: Loss in bits for each byte of the scored text; None but for text.
        tokens_per_second: Tokens of the test text through the model and its output layer in a second; likewise.
        first_token_seconds: From a prompt to the first token that is generated; likewise.
        details: Further figures: the regularization's path, what was chosen, epochs.
    """

    method: str
    shots: int | None
    seed: int
    status: str
    reason: str | None = None
    command: str = ""
    num_classes: int = 0
    key_width: int = 0
    train_rows: int = 0
    test_rows: int = 0
    accuracy: float | None = None
    mean_class_accuracy: float | None = None
    loss: float | None = None
    calibration_error: float | None = None
    seconds_encode: float | None = None
    seconds_fit: float | None = None
    seconds_solve: float | None = None
    examples_encoded: int | None = None
    peak_memory: int | None = None
    bytes_to_predict: int | None = None
    bytes_to_update: int | None = None
    microseconds_1: float | None = None
    microseconds_256: float | None = None
    parameters: int | None = None
    device: str = ""
    unit: str = "shot"
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    first_token_seconds: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        """Adaptation time: encode, fit and solve; None where the run did not end."""
        parts = (self.seconds_encode, self.seconds_fit, self.seconds_solve)
        return None if None in parts else sum(part for part in parts if part is not None)

    @property
    def perplexity(self) -> float | None:
        """Of running text: the exponential of the loss; None of anything else."""
        return math.exp(self.loss) if self.unit == "token" and self.loss is not None else None


@dataclass(frozen=True)
class Rows:
    """What one run said of each test row.

    Attributes:
        label: The right class, int64 [n].
        predicted: The class of the highest probability, int64 [n].
        confidence: That probability, float32 [n].
        log_likelihood: Log probability of the right class, float32 [n].
        block: Which rows belong together, such as the tokens of one window, int64 [n]: resamples draw them together.
            None where rows are independent.
    """

    label: Tensor
    predicted: Tensor
    confidence: Tensor
    log_likelihood: Tensor
    block: Tensor | None = None

    @classmethod
    def from_log_probabilities(cls, log_probabilities: Tensor, label: Tensor) -> Rows:
        """Of log probabilities [n, c] and labels [n]."""
        confidence, predicted = log_probabilities.max(-1)
        chosen = log_probabilities.gather(-1, label[:, None])[:, 0]
        return cls(label.long().cpu(), predicted.cpu(), confidence.exp().float().cpu(), chosen.float().cpu())


def save_record(record: Record, rows: Rows | None, path: Path) -> None:
    """Write ``path`` (JSON) and, beside it, the rows as ``path`` with the suffix ``.safetensors``; atomically.

    The JSON file is written last: where it is there, the record is whole.
    """
    if rows is not None:
        columns = {name: column for name in ROW_COLUMNS if (column := getattr(rows, name)) is not None}
        save_tensors(columns, path.with_suffix(".safetensors"), {})
    write_text(path, json.dumps(asdict(record), indent=1))


def load_record(path: Path) -> Record:
    """Read a record.

    Raises:
        ValueError: Where the file is none.
    """
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        known = ", ".join(f.name for f in fields(Record))
        raise ValueError(f"{path} is no record of a comparison ({error}); expected {known}. Delete it.") from error


def load_rows(path: Path) -> Rows | None:
    """Read the rows that belong to the record at ``path``; None where it has none.

    Raises:
        ValueError: Where the file is damaged.
    """
    file = path.with_suffix(".safetensors")
    if not os.path.exists(file):
        return None
    try:
        tensors = load_file(file)
        return Rows(**{name: tensors[name] for name in ROW_COLUMNS if name in tensors or name != "block"})
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}). Delete it and the JSON file beside it.") from error


def mean_class_accuracy(rows: Rows) -> float:
    """Mean over the classes that occur of the accuracy on each."""
    right = (rows.predicted == rows.label).double()
    totals = torch.zeros(int(rows.label.max()) + 1, dtype=torch.float64)
    counts = totals.scatter_add(0, rows.label, torch.ones_like(right))
    totals = totals.scatter_add(0, rows.label, right)
    return float((totals[counts > 0] / counts[counts > 0]).mean())
