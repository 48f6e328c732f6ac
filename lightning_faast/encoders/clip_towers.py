"""The two towers of a CLIP model: images and text into one space."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class Towers(nn.Module, ABC):
    """Images and text into one space.

    Attributes:
        num_features: Width e of that space.
        data_config: How images are prepared, in timm's words.
    """

    num_features: int
    data_config: dict[str, Any]

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Embeddings [B, e] of images [B, 3, height, width]."""

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Embeddings [n, e] of n texts; what exceeds the tower's context is cut off."""

    @abstractmethod
    def input_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that images pass through."""
