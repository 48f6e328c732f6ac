"""A text as one long stream of tokens, made once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_faast.associative.files import save_tensors

_FORMAT = "lightning_faast.tokens.v1"
#: Characters tokenized together, at most: texts up to here are tokenized as a whole, as the field does.
_BLOCK = 2**23


@dataclass(frozen=True)
class TokenStream:
    """A text as tokens.

    Attributes:
        path: The file that holds them.
        ids: Token ids [n], int32.
    """

    path: Path
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def num_bytes(self, start: int, end: int) -> int:
        """Bytes of UTF-8 text that tokens ``start`` to ``end`` (left out) stand for; read from the file."""
        return int(self.ends_at([start, end]) @ np.array([-1, 1]))

    def ends_at(self, counts: Iterable[int]) -> np.ndarray:
        """Bytes of the text that the first so many tokens stand for, int64, one for each count."""
        with safe_open(self.path, "np") as file:
            ends = file.get_slice("ends")
            return np.array([int(ends[n - 1 : n][0]) if n else 0 for n in counts], np.int64)


def tokenizer_digest(tokenizer: Any) -> str:
    """32 hexadecimal digits of how a fast tokenizer cuts text.

    Raises:
        ValueError: For a tokenizer that is not fast, which cannot say where its tokens end.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not say where in the text a token ends. Use "
            "a fast one (a folder with tokenizer.json)."
        )
    return _digest(tokenizer.backend_tokenizer.to_str())


def open_stream(texts: Iterable[str], tokenizer: Any, origin: str, directory: Path) -> TokenStream:
    """The tokens of a text, from the file where there is one already, else made and kept.

    Args:
        texts: The text in pieces, in order; nothing is put between them. Read only where there is no file yet.
        tokenizer: A fast tokenizer of transformers.
        origin: What changes whenever the text does.
        directory: Where files are kept.

    Raises:
        ValueError: For a slow tokenizer, an empty text and a damaged file.
    """
    path = directory / f"{_digest(json.dumps([_FORMAT, _BLOCK, tokenizer_digest(tokenizer), origin]))}.safetensors"
    if not path.is_file():
        ids, ends = _tokenize(texts, tokenizer)
        save_tensors({"ids": ids, "ends": ends}, path, {"format": _FORMAT})
    try:
        with safe_open(path, "pt") as file:
            return TokenStream(path, file.get_tensor("ids"))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it; the text will be tokenized again.") from error


def _tokenize(texts: Iterable[str], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Ids [n] int32, and bytes of text up to the end of each token [n] int64."""
    ids, ends, before = [], [], 0
    for block in _blocks(texts):
        # no warning that the text is longer than the model's positions: windows are cut later
        encoded = tokenizer(block, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        sizes = np.array([0, *_utf8_sizes(block)], np.int64).cumsum()
        ids.append(np.asarray(encoded["input_ids"], np.int32))
        last = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)[:, 1]
        ends.append(before + np.maximum.accumulate(sizes[last]))
        before += int(sizes[-1])
    if not ids or not sum(map(len, ids)):
        raise ValueError("The text is empty: there is no token in it.")
    return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(ends))


def _utf8_sizes(text: str) -> np.ndarray:
    """Bytes of each character in UTF-8."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    """The text in blocks that end behind a line, where there are lines."""
    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        while size >= _BLOCK:
            whole = "".join(waiting)
            cut = whole.rfind("\n", 0, _BLOCK) + 1 or _BLOCK
            yield whole[:cut]
            waiting, size = [whole[cut:]], len(whole) - cut
    if size:
        yield "".join(waiting)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
