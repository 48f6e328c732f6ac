"""Token ids of prompts and of what is to follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_faast.language.pairs import IGNORED


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, without special tokens."""
    if not len(texts):
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def beginning(tokenizer: Any) -> list[int]:
    """The special tokens with which the tokenizer begins a text."""
    plain, whole = encode(tokenizer, ["a"])[0], tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return list(whole[:start])


def completions(prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Prompts with their targets as one batch, of which only the targets are to be learned.

    Args:
        prompts: Token ids of each.
        targets: Token ids of what follows each.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` [B, T], padded on the right, as
        :meth:`FastWeightLM.learn` takes them.

    Example:
        >>> from lightning_faast.language.prompts import completions
        >>> completions([[5, 6], [7]], [[8], [9]])["labels"].tolist()
        [[-100, -100, 8], [-100, 9, -100]]
    """
    if not len(prompts) or len(prompts) != len(targets):
        raise ValueError(f"As many targets as prompts are needed, at least one; got {len(targets)} and {len(prompts)}.")
    shape = len(prompts), max(len(p) + len(t) for p, t in zip(prompts, targets, strict=True))
    input_ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        ids = torch.tensor([*prompt, *target])
        input_ids[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        labels[row, len(prompt) : len(ids)] = ids[len(prompt) :]
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
