"""Pretrained backbones whose outputs are the keys of an associative memory.

Names are imported when first used: timm and transformers take seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_faast.encoders.vision import VisionEncoder

__all__ = ["VisionEncoder"]

_HOMES = {
    "VisionEncoder": "lightning_faast.encoders.vision",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
