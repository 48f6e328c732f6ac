"""Adapt frozen pretrained models in one forward pass, as a PyTorch Lightning extension.

``FastWeights`` is the mathematics (plain torch), ``FaastCallback`` the one-pass fit in any Lightning project and
``FaastModule`` an encoder with a head.
"""

from typing import TYPE_CHECKING

from lightning_faast.lazy import attach

if TYPE_CHECKING:
    from lightning_faast.associative import FastWeights
    from lightning_faast.callback import FaastCallback
    from lightning_faast.module import FaastModule

__version__ = "0.1.0"
__all__ = ["FaastCallback", "FaastModule", "FastWeights"]

__getattr__, __dir__ = attach(
    __name__,
    {
        "FaastCallback": "lightning_faast.callback",
        "FaastModule": "lightning_faast.module",
        "FastWeights": "lightning_faast.associative",
    },
)
