"""Frozen pretrained encoders: examples in, features out."""

from typing import TYPE_CHECKING

from lightning_faast.lazy import attach

if TYPE_CHECKING:
    from lightning_faast.encoders.clip import ClipEncoder
    from lightning_faast.encoders.identity import Identity
    from lightning_faast.encoders.text import TextEncoder
    from lightning_faast.encoders.vision import VisionEncoder

__all__ = ["ClipEncoder", "Identity", "TextEncoder", "VisionEncoder"]

__getattr__, __dir__ = attach(
    __name__,
    {
        "ClipEncoder": "lightning_faast.encoders.clip",
        "Identity": "lightning_faast.encoders.identity",
        "TextEncoder": "lightning_faast.encoders.text",
        "VisionEncoder": "lightning_faast.encoders.vision",
    },
)
