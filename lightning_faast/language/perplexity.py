"""Perplexity of a run of tokens under a language model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_faast.language import architecture
from lightning_faast.language.fast_weight_lm import FastWeightLM
from lightning_faast.language.pairs import IGNORED
from lightning_faast.language.scoring import TokenScores, score_logits, sliding_windows

#: ``input_ids`` [B, T] and ``labels`` [B, T] (not shifted, -100 is context), as data modules make them.
Batch = Mapping[str, Tensor]


def labelled_windows(tokens: Tensor, window: int, stride: int | None = None) -> list[dict[str, Tensor]]:
    """The windows of :func:`~lightning_faast.language.scoring.sliding_windows` as batches of one, in order.

    Args:
        tokens: One run of token ids [N].
        window: Tokens that the model reads together.
        stride: Tokens from one window to the next; ``window`` where not given.

    Raises:
        ValueError: For tokens that are no run of at least two, and numbers that cannot be.

    Example:
        >>> import torch
        >>> from lightning_faast.language import labelled_windows
        >>> [w["labels"].tolist() for w in labelled_windows(torch.arange(10, 17), window=4, stride=2)]
        [[[-100, 11, 12, 13]], [[-100, -100, 14, 15]], [[-100, -100, 16]]]
    """
    if tokens.ndim != 1 or tokens.is_floating_point() or len(tokens) < 2:
        raise ValueError(f"tokens must be at least two token ids [N], got {tokens.dtype} {tuple(tokens.shape)}.")
    batches = []
    for place in sliding_windows(len(tokens), window, stride):
        input_ids = tokens[None, place.start : place.end].long()
        labels = input_ids.clone()
        labels[:, : place.first - place.start] = IGNORED
        batches.append({"input_ids": input_ids, "labels": labels})
    return batches


def evaluate(model: Any, windows: Iterable[Batch]) -> Iterator[TokenScores]:
    """Score windows by a model as it is, without dropout.

    Args:
        model: A causal language model, or a :class:`FastWeightLM`.
        windows: Batches of ``input_ids`` and ``labels``.

    Yields:
        The scores of each batch; all logits that are held are those of one.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_faast.language import evaluate, labelled_windows, perplexity
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> text = torch.arange(40).repeat(4)
        >>> round(perplexity(evaluate(model, labelled_windows(text, window=32, stride=16))) / 50)
        1
    """
    for batch in windows:
        yield _scores(model, batch)


@torch.no_grad()
def _scores(model: Any, batch: Batch) -> TokenScores:
    with architecture.evaluating(model):
        logits = model(input_ids=batch["input_ids"].to(token_device(model)), use_cache=False).logits
    return score_window(logits, batch["labels"])


def score_window(logits: Tensor, labels: Tensor) -> TokenScores:
    """Scores of labels [B, T] that are not shifted, of the logits [B, T, V] of all places."""
    return score_logits(logits.detach()[:, :-1], labels[:, 1:].to(logits.device))


def perplexity(scores: Iterable[TokenScores]) -> float:
    """Exp of the mean negative log-likelihood of all tokens.

    Raises:
        ValueError: Where no token was scored.
    """
    total, count = 0.0, 0
    for part in scores:
        total += float(part.log_likelihood.to(torch.float64).sum())
        count += len(part)
    if not count:
        raise ValueError("No token was scored: every label is -100, or there is no window.")
    return math.exp(-total / count)


def token_device(model: Any) -> torch.device:
    """Where the token ids of a model, or of a :class:`FastWeightLM`, go."""
    return architecture.input_device(underlying(model))


def underlying(model: Any) -> Any:
    """The model of transformers itself, of a model that may be compiled or in a :class:`FastWeightLM`."""
    return architecture.eager(model.model if isinstance(model, FastWeightLM) else model)
