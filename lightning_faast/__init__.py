"""Adapt frozen pretrained models in one forward pass, as a PyTorch Lightning extension.

``FastWeights`` is the mathematics (plain torch), ``FaastCallback`` the one-pass fit in any Lightning project and
``FaastModule`` an encoder with a head. Names are imported when first used, so that ``import lightning_faast`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_faast.associative import FastWeights
    from lightning_faast.callback import FaastCallback
    from lightning_faast.module import FaastModule

__version__ = "0.1.0"
__all__ = ["FaastCallback", "FaastModule", "FastWeights"]

_HOMES = {
    "FastWeights": "lightning_faast.associative",
    "FaastCallback": "lightning_faast.callback",
    "FaastModule": "lightning_faast.module",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
