"""Exact nearest neighbors by Euclidean distance among rows on the CPU, by faiss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_faast.data.extras import require

#: Rows in half precision turned to float32 at a time: faiss compares float32.
_ROWS = 2**16


def nearest(queries: Tensor, parts: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """Squared distances [N, k] of queries to their k nearest rows, the nearest first, and the tokens [N, k] of these.

    Fewer than k where there are fewer rows. Distances are exact to the rounding of float32.

    Args:
        queries: [N, d].
        parts: Keys [n, d] (float32 or float16) with their tokens [n]; several tables are searched as one.
        k: Neighbors.

    Raises:
        ImportError: Where faiss is not installed.
    """
    faiss = require("faiss", "language")
    wanted = queries.detach().to("cpu", torch.float32).contiguous().numpy()
    distances = torch.empty(len(queries), 0)
    tokens = torch.empty(len(queries), 0, dtype=torch.int64)
    for keys, values in parts:
        # float32 rows are searched where they are, in one piece
        rows = len(keys) if keys.dtype == torch.float32 else _ROWS
        for start in range(0, len(keys), max(rows, 1)):
            block = keys[start : start + rows].to(torch.float32).contiguous()
            found, index = faiss.knn(wanted, block.numpy(), min(k, len(block)))
            distances = torch.cat([distances, torch.from_numpy(found)], 1)
            tokens = torch.cat([tokens, values[start : start + rows][torch.from_numpy(index)]], 1)
            distances, order = distances.topk(min(k, distances.shape[1]), largest=False)
            tokens = tokens.gather(1, order)
    return distances.clamp_min_(0), tokens
