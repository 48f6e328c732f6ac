"""The output layer of a language model: log-likelihoods and their gradients, a block of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Logits held at a time, at most; but those of some tokens always, so that reading the weights costs little.
BLOCK_ELEMENTS = 2**22
_FEWEST_TOKENS = 16


@dataclass(frozen=True, eq=False)
class OutputLayer:
    r"""Logits of final hidden states: z = ``scale * (W h + b)``, with a softcap ``softcap * tanh(z / softcap)``.

    Args:
        module: The model's own layer; its weight [V, d] is read where it is, never copied.
        scale: Factor of the logits (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: Bound of the logits (Gemma 2's ``final_logit_softcapping``).

    Example:
        >>> import torch
        >>> from lightning_faast.language import OutputLayer
        >>> output = OutputLayer(torch.nn.Linear(8, 100))
        >>> gradient, loss, expected = output.gradient(torch.randn(5, 8), torch.arange(5))
        >>> gradient.shape, loss.shape, expected.shape
        (torch.Size([5, 8]), torch.Size([5]), torch.Size([100]))
    """

    module: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens."""
        return self.module.weight.shape[0]

    @property
    def width(self) -> int:
        """The width d of a hidden state."""
        return self.module.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.module.weight.device

    def linear(self, hidden: Tensor) -> Tensor:
        """W h + b [..., V] of hidden states [..., d], in their dtype; calls no hook of the module."""
        return F.linear(hidden, self.module.weight, self.module.bias)

    def logits(self, hidden: Tensor, token_bias: Tensor | None = None) -> Tensor:
        """Logits [..., V] of hidden states [..., d], at least float32, with a bias [V] under the softcap."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        z = self.scale * self.linear(hidden.to(self.module.weight.dtype)).to(dtype)
        return self._bounded(z if token_bias is None else z + token_bias.to(z))

    def _bounded(self, z: Tensor) -> Tensor:
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def _slope(self, logits: Tensor) -> Tensor:
        """Derivative of softcapped logits by W h + b, from the logits."""
        assert self.softcap is not None
        return self.scale * (1 - (logits / self.softcap) ** 2)

    @torch.no_grad()
    def gradient(
        self,
        hidden: Tensor,
        targets: Tensor,
        block_elements: int = BLOCK_ELEMENTS,
        token_bias: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Gradient of each target's log-likelihood by its hidden state, the loss, and what was expected.

        With logits z = W h + b it is :math:`r = e_y - \sum_v p(v \mid h)\, e_v`, e being the rows of W; scale and
        softcap are taken into account.

        Args:
            hidden: [N, d], any floating dtype.
            targets: [N], token ids in [0, V).
            block_elements: Logits held at a time, at most (those of 16 tokens, where that is more).
            token_bias: [V], added to the logits.
            weights: [N], of the tokens in the third result; 1 where not given.

        Returns:
            r [N, d] and the negative log-likelihood [N] in nats, float32, or float64 for a float64 model; and the sum
            of the probabilities [V], float64.
        """
        dtype = self._dtype
        losses = torch.empty(len(hidden), dtype=dtype, device=self.device)
        gradients = torch.empty(len(hidden), self.width, dtype=dtype, device=self.device)
        expected = torch.zeros(self.vocabulary, dtype=torch.float64, device=self.device)
        weight = self.module.weight
        for span, y, z in self._blocks(hidden, targets, block_elements, token_bias):
            slope = None if self.softcap is None else self._slope(z)
            chosen = z.gather(1, y[:, None])
            total = z.logsumexp(1, keepdim=True)
            losses[span] = (total - chosen)[:, 0]
            p = z.sub_(total).exp_()
            share = p if weights is None else p * weights[span, None].to(p)
            expected += share.sum(0)
            e = weight[y].to(dtype)
            if slope is None:
                gradients[span] = self.scale * (e - p @ weight.to(dtype))
            else:
                gradients[span] = slope.gather(1, y[:, None]) * e - (p * slope) @ weight.to(dtype)
        return gradients, losses, expected

    @torch.no_grad()
    def loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        block_elements: int = BLOCK_ELEMENTS,
        token_bias: Tensor | None = None,
    ) -> Tensor:
        """Negative log-likelihood [N] in nats of targets [N] after hidden states [N, d]; as :meth:`gradient`."""
        losses = torch.empty(len(hidden), dtype=self._dtype, device=self.device)
        for span, y, z in self._blocks(hidden, targets, block_elements, token_bias):
            losses[span] = z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]
        return losses

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.module.weight.dtype, torch.float32)

    def _blocks(
        self, hidden: Tensor, targets: Tensor, block_elements: int, token_bias: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Targets and logits of one block of tokens after another."""
        tokens = max(_FEWEST_TOKENS, block_elements // self.vocabulary)
        dtype = self._dtype
        weight, bias = self.module.weight, self.module.bias
        for first in range(0, len(hidden), tokens):
            span = slice(first, first + tokens)
            z = hidden[span].to(device=weight.device, dtype=dtype) @ weight.to(dtype).T
            if bias is not None:
                z += bias.to(dtype)
            if self.scale != 1:
                z *= self.scale
            if token_bias is not None:
                z += token_bias.to(z)
            yield span, targets[span].to(weight.device), self._bounded(z)
