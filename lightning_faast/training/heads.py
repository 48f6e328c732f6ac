"""Heads that are trained by backpropagation."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualLinear(nn.Module):
    """Moves features towards the embeddings of their classes: ``scale * cosine(x + W x, E)``.

    The linear probe of arXiv 2605.04651 for encoders that embed class names. W starts at zero, so that an untrained
    head predicts what the class embeddings alone do (zero-shot).

    Args:
        in_features: Width d of the features.
        class_embeddings: E [c, d].
        scale: Of the cosines; 100 is where CLIP's own stops.

    Raises:
        ValueError: Where the embeddings are not as wide as the features.

    Example:
        >>> head = ResidualLinear(3, torch.eye(3)[:2])
        >>> head(torch.tensor([[0.0, 2.0, 0.0]])).tolist()
        [[0.0, 100.0]]
    """

    class_embeddings: Tensor

    def __init__(self, in_features: int, class_embeddings: Tensor, scale: float = 100.0) -> None:
        super().__init__()
        if class_embeddings.ndim != 2 or class_embeddings.shape[1] != in_features:
            raise ValueError(
                f"class_embeddings of the shape {tuple(class_embeddings.shape)}; expected (classes, {in_features}), as "
                "wide as the features to which they are compared. Use an encoder that embeds both in one space (CLIP)."
            )
        self.in_features, self.out_features = in_features, len(class_embeddings)
        self.scale = scale
        self.weight = nn.Parameter(torch.zeros(in_features, in_features))
        self.register_buffer("class_embeddings", F.normalize(class_embeddings.detach().float(), dim=-1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, c] of features [B, d]."""
        moved = F.normalize(features + F.linear(features, self.weight), dim=-1)
        return self.scale * F.linear(moved, self.class_embeddings)


def linear_head(in_features: int, num_classes: int, class_embeddings: Tensor | None = None) -> nn.Module:
    """Make the head of a linear probe: ``nn.Linear``, or :class:`ResidualLinear` where values are embeddings.

    Args:
        in_features: Width d of the features.
        num_classes: c.
        class_embeddings: [c, d], one a class, where ``FaastModule(class_embeddings=True)`` has them.

    Example:
        >>> linear_head(8, 3)
        Linear(in_features=8, out_features=3, bias=True)
    """
    if class_embeddings is None:
        return nn.Linear(in_features, num_classes)
    return ResidualLinear(in_features, class_embeddings)
