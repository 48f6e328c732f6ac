"""Frozen pretrained encoders: examples in, features out."""

from typing import TYPE_CHECKING

from lightning_faast.lazy import attach

if TYPE_CHECKING:
    from lightning_faast.encoders.vision import VisionEncoder

__all__ = ["VisionEncoder"]

__getattr__, __dir__ = attach(__name__, {"VisionEncoder": "lightning_faast.encoders.vision"})
