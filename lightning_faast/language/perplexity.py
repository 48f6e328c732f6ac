"""How a language model does on text: one long run of tokens in windows, each token scored once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_faast.language import architecture
from lightning_faast.language.fast_weight_lm import FastWeightLM
from lightning_faast.language.pairs import IGNORED

#: Logits turned to float32 at a time, at most.
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens that a model reads together.

    Attributes:
        input_ids: [B, T].
        labels: [B, T], the tokens to predict, in place (not shifted); -100 for those that are context only.
    """

    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class TokenScores:
    """How the tokens of some windows were predicted, in their order.

    Attributes:
        labels: The tokens [N].
        log_likelihood: Of each in nats [N], float32.
        predicted: The most likely token at its place [N].
        confidence: Probability of that one [N].
    """

    labels: Tensor
    log_likelihood: Tensor
    predicted: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> TokenScores:
        """The scores of one forward pass.

        Args:
            logits: [B, T, V] of the whole windows.
            labels: [B, T] as in :class:`Window`.
        """
        targets = labels[:, 1:].reshape(-1)
        places = (targets != IGNORED).nonzero()[:, 0]
        targets = targets[places]
        rows = logits.detach()[:, :-1].flatten(0, 1)
        places, targets = places.to(rows.device), targets.to(rows.device)
        log_likelihood = torch.empty(len(places), dtype=torch.float32, device=rows.device)
        confidence, predicted = torch.empty_like(log_likelihood), torch.empty_like(targets)
        block = max(1, _BLOCK_ELEMENTS // rows.shape[1])
        for first in range(0, len(places), block):
            span = slice(first, first + block)
            z = rows[places[span]].to(torch.float32)
            total = z.logsumexp(1)
            log_likelihood[span] = z.gather(1, targets[span, None])[:, 0] - total
            largest, predicted[span] = z.max(1)
            confidence[span] = (largest - total).exp()
        return cls(targets, log_likelihood, predicted, confidence)


def sliding_windows(tokens: Tensor, window: int, stride: int | None = None) -> Iterator[Window]:
    """Windows over a run of tokens, in order, as the field measures perplexity.

    A token is scored once, in the first window that holds it, and there has at least ``window - stride`` tokens before
    it (fewer in the first window only). Where ``stride`` is ``window``, windows are disjoint, and the first token of
    each, which nothing comes before, is not scored.

    Args:
        tokens: [N], at least 2.
        window: Tokens that the model reads together.
        stride: Tokens from one window to the next; ``window`` where not given.

    Yields:
        Windows [1, T], T at most ``window``.

    Raises:
        ValueError: For no run of tokens, or a stride that would leave tokens out.

    Example:
        >>> import torch
        >>> from lightning_faast.language import sliding_windows
        >>> [w.labels.tolist() for w in sliding_windows(torch.arange(10, 17), window=4, stride=2)]
        [[[-100, 11, 12, 13]], [[-100, -100, 14, 15]], [[-100, -100, 16]]]
    """
    stride = window if stride is None else stride
    if tokens.ndim != 1 or tokens.is_floating_point() or len(tokens) < 2:
        raise ValueError(
            f"tokens must be one run of token ids [N], N at least 2, got {tokens.dtype} {tuple(tokens.shape)}."
        )
    if not 1 <= stride <= window or window < 2:
        raise ValueError(f"window must be at least 2 and stride in [1, window], got window={window}, stride={stride}.")
    return _windows(tokens, window, stride)


def _windows(tokens: Tensor, window: int, stride: int) -> Iterator[Window]:
    scored = 0  # tokens up to here were in a window already
    for start in range(0, len(tokens), stride):
        end = min(start + window, len(tokens))
        if end - start > 1:
            input_ids = tokens[None, start:end]
            labels = input_ids.clone()
            labels[:, : max(scored - start, 1)] = IGNORED
            yield Window(input_ids, labels)
        scored = end
        if end == len(tokens):
            return


@torch.no_grad()
def evaluate(model: Any, windows: Iterable[Window]) -> Iterator[TokenScores]:
    """Score windows by a model as it is.

    Args:
        model: A causal language model, or a :class:`FastWeightLM`.
        windows: As of :func:`sliding_windows`.

    Yields:
        The scores of each window.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_faast.language import evaluate, perplexity, sliding_windows
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> text = torch.arange(40).repeat(4)
        >>> round(perplexity(evaluate(model, sliding_windows(text, window=32, stride=16))) / 50)
        1
    """
    for window in windows:
        with architecture.evaluating(model):
            logits = model(input_ids=window.input_ids.to(token_device(model)), use_cache=False).logits
        yield TokenScores.of(logits, window.labels)


def perplexity(scores: Iterable[TokenScores]) -> float:
    """Exp of the mean negative log-likelihood of all tokens.

    Raises:
        ValueError: Where no token was scored.
    """
    total, count = 0.0, 0
    for part in scores:
        total += float(part.log_likelihood.to(torch.float64).sum())
        count += len(part.labels)
    if not count:
        raise ValueError("No token was scored: every label is -100, or there is no window.")
    return math.exp(-total / count)


def token_device(model: Any) -> torch.device:
    """Where the token ids of a model, or of a :class:`FastWeightLM`, go."""
    return architecture.input_device(architecture.eager(model.model if isinstance(model, FastWeightLM) else model))
