"""What a batch of keys and values must look like."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of_values(values: Tensor, lead: torch.Size) -> Tensor:
    """Labels [N], or values [N, c], of values that belong to keys of leading shape ``lead``.

    Raises:
        ValueError: Where they are neither one label nor one row of real numbers a key.
    """
    integer = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    if not values.is_complex():
        if values.shape == lead:  # one real or boolean value a row is one column
            return values.reshape(-1).long() if integer else values.reshape(-1, 1)
        if values.ndim == len(lead) + 1 and values.shape[:-1] == lead and values.shape[-1]:
            return values.reshape(-1, values.shape[-1])
    raise ValueError(
        f"keys and values must have the same rows: keys are {(*lead, 'd')}, so values must be labels {tuple(lead)} or "
        f"real values {(*lead, 'c')}, got {values.dtype} {tuple(values.shape)}."
    )


def faults_of(k: Tensor, v: Tensor, w: Tensor | None, columns: int) -> Tensor:
    """Which of the four faults these rows have, [4] bool: keys, values, labels, weights."""
    # A sum is finite only where every term is, and a norm where no square overflows, which only float64 can: one pass
    # and no mask in memory. Float32 sums of a block overflow only for keys that are as good as infinite.
    total = torch.linalg.vector_norm(k) if k.dtype == torch.float64 else k.sum(dtype=torch.float32)
    keys = ~total.isfinite()
    values = labels = weights = torch.zeros_like(keys)
    if v.ndim == 2:
        values = ~torch.linalg.vector_norm(v.to(torch.float64)).isfinite()
    else:
        labels = ((v < 0) | (v >= columns)).any()
    if w is not None:
        weights = (~((w >= 0) & w.isfinite())).any()
    return torch.stack([keys, values, labels, weights])


def refuse(faults: Tensor, batch: int, num_classes: int | None) -> None:
    """Raise for the first of the faults that a batch has.

    Raises:
        ValueError: Naming the batch.
    """
    messages = (
        "keys hold NaN or infinite values, or values whose squares are infinite (under normalize=True also: a key of "
        "zeros only). Look at this batch's input and at the encoder's precision",
        "values hold NaN or infinite numbers, or numbers whose squares are infinite. Look at this batch's targets",
        f"a label is outside [0, {num_classes or 'inf'}). Check num_classes, or pass an ignore index",
        "weights must be finite and not negative",
    )
    for fault, message in zip(faults.tolist(), messages, strict=True):
        if fault:
            raise ValueError(f"Batch {batch} (counted from 0): {message}.")
