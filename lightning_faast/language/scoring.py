"""What a language model says of every token of a text: without ever holding [all tokens, vocabulary]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_faast.language.pairs import IGNORED

#: Logits turned into probabilities at a time, at most.
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True)
class TokenScores:
    """What was said of n tokens, each before it was seen.

    Attributes:
        label: The token, int64 [n].
        predicted: The most likely one, int64 [n].
        confidence: Its probability, float32 [n].
        log_likelihood: Log probability of the token, nats, float32 [n].
    """

    label: Tensor
    predicted: Tensor
    confidence: Tensor
    log_likelihood: Tensor

    def __len__(self) -> int:
        return len(self.label)


@torch.no_grad()
def score_logits(logits: Tensor, labels: Tensor, block_elements: int = _BLOCK_ELEMENTS) -> TokenScores:
    """Scores of the labels that are not -100, in their order.

    Args:
        logits: [..., V], those from which a label is predicted at its own place (already shifted).
        labels: [...], int64.
        block_elements: Logits that are turned into float32 at a time, at most.

    Example:
        >>> scores = score_logits(torch.zeros(1, 3, 4), torch.tensor([[2, -100, 0]]))
        >>> scores.label.tolist(), [round(value, 3) for value in scores.log_likelihood.tolist()]
        ([2, 0], [-1.386, -1.386])
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need labels {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}."
        )
    rows, targets = logits.flatten(0, -2), labels.flatten()
    places = (targets != IGNORED).nonzero()[:, 0]
    parts: list[tuple[Tensor, ...]] = []
    for chosen in places.split(max(1, block_elements // rows.shape[-1])):
        block, target = rows[chosen].float(), targets[chosen]
        total = block.logsumexp(-1)
        best, predicted = block.max(-1)
        likelihood = block.gather(-1, target[:, None])[:, 0] - total
        parts.append((target, predicted, (best - total).exp(), likelihood))
    if not parts:
        empty = targets.new_empty(0)
        return TokenScores(empty, empty, empty.float(), empty.float())
    return TokenScores(*(torch.cat(part) for part in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Window:
    """A window of a stream of tokens.

    Attributes:
        start: Its first token.
        end: One behind its last.
        first: The first of its tokens that is scored in this window; those before it are context.
    """

    start: int
    end: int
    first: int


def sliding_windows(tokens: int, window: int, stride: int | None = None) -> Sequence[Window]:
    """Windows in which every token of a stream is scored once, as the field reports perplexity.

    Each but the first begins ``stride`` tokens behind the one before it and scores the tokens that are new in it, each
    of which has at least ``window - stride`` tokens of context. With ``stride = window`` the windows are disjoint, and
    the first token of each, which has none before it, is not scored; nor ever is the very first.

    Args:
        tokens: Length of the stream.
        window: Tokens of a window.
        stride: From 1 to ``window``; None for ``window``.

    Raises:
        ValueError: For numbers that cannot be.

    Example:
        >>> [(w.start, w.first, w.end) for w in sliding_windows(10, window=6, stride=3)]
        [(0, 1, 6), (3, 6, 9), (6, 9, 10)]
        >>> [(w.start, w.first, w.end) for w in sliding_windows(10, window=6)]
        [(0, 1, 6), (6, 7, 10)]
    """
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(f"window must be at least 2 and stride from 1 to window, got {window} and {stride}.")
    found, done = [], 0
    for start in range(0, max(tokens, 1), stride):
        end = min(start + window, tokens)
        first = max(done, start + 1)
        if first < end:
            found.append(Window(start, end, first))
        done = end
        if end >= tokens:
            break
    return found
