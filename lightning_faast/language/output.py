"""The output layer of a language model: log-likelihoods and their gradients, never holding [tokens, vocabulary]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Tokens swept over the vocabulary together, at most: enough that reading the weights costs nothing beside the product.
_TOKENS = 1024


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
        >>> gradient, loss = output.gradient(torch.randn(5, 8), torch.arange(5))
        >>> gradient.shape, loss.shape
        (torch.Size([5, 8]), torch.Size([5]))
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

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., d], at least float32."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return self._bounded(self.scale * self.linear(hidden.to(self.module.weight.dtype)).to(dtype))

    def _bounded(self, z: Tensor) -> Tensor:
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def _slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits by W h + b, from the logits."""
        return self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap) ** 2)

    @torch.no_grad()
    def gradient(self, hidden: Tensor, targets: Tensor, block_elements: int = 2**21) -> tuple[Tensor, Tensor]:
        r"""Gradient of each target's log-likelihood by its hidden state, and the loss.

        With logits z = W h + b it is :math:`r = e_y - \sum_v p(v \mid h)\, e_v`, e being the rows of W; scale and
        softcap are taken into account. One sweep over the vocabulary: the log-sum-exp and the expectation are built
        up together, rescaled when a larger logit comes.

        Args:
            hidden: [N, d], any floating dtype.
            targets: [N], token ids in [0, V).
            block_elements: Logits held at a time, at most.

        Returns:
            r [N, d] and the negative log-likelihood [N] in nats; float32, or float64 for a float64 model.
        """
        r, loss = self._sweep(hidden, targets, block_elements, with_gradient=True)
        assert r is not None
        return r, loss

    @torch.no_grad()
    def loss(self, hidden: Tensor, targets: Tensor, block_elements: int = 2**21) -> Tensor:
        """Negative log-likelihood [N] in nats of targets [N] after hidden states [N, d]; as :meth:`gradient`."""
        return self._sweep(hidden, targets, block_elements, with_gradient=False)[1]

    def _sweep(
        self, hidden: Tensor, targets: Tensor, block_elements: int, *, with_gradient: bool
    ) -> tuple[Tensor | None, Tensor]:
        weight, bias = self.module.weight, self.module.bias
        dtype = torch.promote_types(weight.dtype, torch.float32)
        tokens = max(1, min(_TOKENS, len(hidden), block_elements))
        columns = max(1, block_elements // tokens)
        losses = torch.empty(len(hidden), dtype=dtype, device=weight.device)
        gradients = torch.empty(len(hidden), self.width, dtype=dtype, device=weight.device) if with_gradient else None
        for first in range(0, len(hidden), tokens):
            span = slice(first, first + tokens)
            h, y = hidden[span].to(device=weight.device, dtype=dtype), targets[span].to(weight.device)
            largest = h.new_full((len(h), 1), -torch.inf)
            total, expected = h.new_zeros(len(h), 1), h.new_zeros(h.shape)
            for start in range(0, len(weight), columns):
                w = weight[start : start + columns].to(dtype)
                z = h @ w.T
                if bias is not None:
                    z += bias[start : start + columns].to(dtype)
                z = self._bounded(z.mul_(self.scale) if self.scale != 1 else z)
                new = torch.maximum(largest, z.amax(1, keepdim=True))
                shrunk = (largest - new).exp_()
                slope = self._slope(z) if with_gradient and self.softcap is not None else None
                p = z.sub_(new).exp_()
                total.mul_(shrunk).add_(p.sum(1, keepdim=True))
                if with_gradient:
                    expected.mul_(shrunk).addmm_(p if slope is None else p.mul_(slope), w)
                largest = new
            e = weight[y].to(dtype)
            z = (h * e).sum(1, keepdim=True)
            if bias is not None:
                z = z + bias[y, None].to(dtype)
            z = self._bounded(self.scale * z)
            losses[span] = (largest + total.log() - z)[:, 0]
            if gradients is not None:
                expected /= total
                if self.softcap is None:
                    gradients[span] = self.scale * (e - expected)
                else:
                    gradients[span] = self._slope(z) * e - expected
        return gradients, losses
