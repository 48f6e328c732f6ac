"""From the hidden states of a text's tokens to one vector."""

from typing import Literal

import torch
from torch import Tensor

#: How tokens become one vector.
Pooling = Literal["mean", "cls", "last", "max"]


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text; padding counts for nothing, on whichever side it is and whatever it holds.

    Args:
        hidden: [B, T, d], of any floating-point dtype.
        mask: Boolean [B, T], true for tokens that are no padding, at least one of each row.
        pooling: ``"mean"`` or ``"max"`` over the tokens, the first (``"cls"``), or the ``"last"``.

    Returns:
        [B, d], float32 or wider.

    Example:
        >>> hidden = torch.tensor([[[1.0], [3.0], [99.0]]])
        >>> pool(hidden, torch.tensor([[True, True, False]]), "mean")
        tensor([[2.]])
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    padding = ~mask[..., None]
    if pooling == "mean":
        return hidden.masked_fill(padding, 0).sum(1) / mask.sum(1, keepdim=True)
    if pooling == "max":
        return hidden.masked_fill(padding, -torch.inf).amax(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    chosen = mask.int().argmax(1) if pooling == "cls" else (places * mask).amax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), chosen]
