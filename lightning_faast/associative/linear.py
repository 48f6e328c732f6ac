"""LinearLearner: heads whose solve ends in one linear layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_faast.associative.labels import LabelLearner


class LinearLearner(LabelLearner):
    """A head whose solve ends in one linear layer: ``weight`` [c, d] and ``bias`` [c].

    Args:
        in_features: Width d of the keys; from the first batch where None.
        out_features: Number of classes c; from the labels where None.
        class_embeddings: Refused: values are labels.
    """

    weight: Tensor
    bias: Tensor
    _published = ("weight", "bias")

    def __init__(self, in_features: int | None, out_features: int | None, class_embeddings: Tensor | None) -> None:
        if class_embeddings is not None:
            raise ValueError(
                f"{type(self).__name__} learns labels and has no use for class_embeddings: leave them out (in a "
                "recipe, model.class_embeddings: false), or use FastWeights or a memory."
            )
        super().__init__(in_features, out_features)
        self.register_buffer("weight", torch.empty(0, in_features or 0))
        self.register_buffer("bias", torch.empty(0))

    def _publish_linear(self, weight: Tensor, bias: Tensor) -> None:
        self._publish(weight=weight.to(self.weight.dtype), bias=bias.to(self.bias.dtype))

    def _refuse_empty_classes(self, counts: Tensor) -> None:
        empty = torch.nonzero(counts <= 0).flatten().tolist()
        if empty:
            shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
            raise ValueError(
                f"{len(empty)} of {len(counts)} classes without a row: {shown}. Add examples, or lower out_features."
            )

    def forward(self, keys: Tensor) -> Tensor:
        """Logits [..., c] of keys [..., d]; zeros before the first solve, where the sizes are declared."""
        keys = self._checked(keys)
        if not self.is_fitted:
            return self._unfitted_logits(keys)
        return F.linear(keys.to(self.weight.dtype), self.weight, self.bias)

    def linear(self) -> tuple[Tensor, Tensor]:
        """Weight [c, d] and bias [c]."""
        self._require_fitted()
        return self.weight, self.bias

    def _sizes(self, published: Mapping[str, Tensor]) -> tuple[int, int]:
        c, d = published["weight"].shape
        return d, c

    @property
    def num_solved(self) -> int:
        """Numbers in W and b."""
        return self.weight.numel() + self.bias.numel()
