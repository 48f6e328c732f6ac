"""Loss, perplexity, bits a byte and accuracy of the next token, over batches and processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_faast.language.scoring import TokenScores


class TokenMetrics(Metric):
    """Figures of a language model on a text.

    Example:
        >>> from lightning_faast.language.scoring import score_logits
        >>> metrics = TokenMetrics()
        >>> metrics.update(score_logits(torch.zeros(1, 3, 4), torch.tensor([[2, 1, 0]])), torch.tensor([6]))
        >>> {name: round(float(value), 3) for name, value in metrics.compute().items()}
        {'loss': 1.386, 'perplexity': 4.0, 'accuracy': 0.333, 'bits_per_byte': 1.0}
    """

    full_state_update = False
    loss: Tensor
    right: Tensor
    tokens: Tensor
    num_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("loss", "right", "tokens", "num_bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: TokenScores, num_bytes: Tensor | None = None) -> None:
        """Count tokens.

        Args:
            scores: What was said of them.
            num_bytes: Bytes of their text, of every window [B]; without it, bits a byte are not known.
        """
        self.loss -= scores.log_likelihood.double().sum()
        self.right += (scores.predicted == scores.label).double().sum()
        self.tokens += len(scores)
        self.num_bytes += math.nan if num_bytes is None else num_bytes.double().sum()

    def compute(self) -> dict[str, Any]:
        """``loss`` (nats a token), ``perplexity``, ``accuracy``, and ``bits_per_byte`` where bytes are known."""
        loss = self.loss / self.tokens
        figures = {"loss": loss, "perplexity": loss.exp(), "accuracy": self.right / self.tokens}
        if bool(self.num_bytes > 0):
            figures["bits_per_byte"] = self.loss / math.log(2) / self.num_bytes
        return figures
