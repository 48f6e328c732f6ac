"""Hidden states kept for further passes, in memory or on disk, up to a number of bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_faast.associative.files import save_tensors

_FORMAT = "lightning_faast.tokens.v1"


class TokenStore:
    """Rows of keys [N, k], tokens [N] and weights [N], in the order in which they came.

    Args:
        limit: Bytes kept at most. A batch that does not fit whole is not kept, nor is any after it.
        folder: Where they are written, one file a batch; None keeps them in memory.

    Raises:
        FileExistsError: Where the folder holds rows already.
    """

    def __init__(self, limit: int, folder: str | os.PathLike[str] | None = None) -> None:
        self.limit = limit
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and any(self.folder.glob("tokens-*.safetensors")):
            raise FileExistsError(f"{self.folder} holds stored tokens already: give an empty folder as store.")
        self._parts: list[dict[str, Tensor] | Path] = []
        self.tokens = 0
        self.num_bytes = 0
        self.full = False

    def add(self, keys: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Keep rows, where there is room."""
        rows = {"keys": keys.detach(), "targets": targets, "weights": weights}
        size = sum(t.numel() * t.element_size() for t in rows.values())
        self.full = self.full or self.num_bytes + size > self.limit
        if self.full or not len(keys):
            return
        if self.folder is None:
            self._parts.append({name: t.clone() for name, t in rows.items()})
        else:
            path = self.folder / f"tokens-{len(self._parts):06d}.safetensors"
            self._parts.append(save_tensors(rows, path, {"format": _FORMAT}))
        self.tokens += len(keys)
        self.num_bytes += size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for part in self._parts:
            rows = part if isinstance(part, dict) else load_file(part)
            yield rows["keys"], rows["targets"], rows["weights"]

    def clear(self) -> None:
        """Forget all rows; files are removed."""
        for part in self._parts:
            if isinstance(part, Path):
                part.unlink(missing_ok=True)
        self._parts, self.tokens, self.num_bytes, self.full = [], 0, 0, False

    def state_dict(self) -> dict[str, Tensor]:
        """All rows, in memory."""
        state = {"full": torch.tensor(self.full)}
        if self.tokens:
            for name, parts in zip(("keys", "targets", "weights"), zip(*self, strict=True), strict=True):
                state[name] = torch.cat(parts)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state."""
        self.clear()
        if "keys" in state:
            self.add(state["keys"], state["targets"], state["weights"])
        self.full = self.full or bool(state["full"])
