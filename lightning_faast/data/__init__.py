"""LightningDataModules whose batches suit a fit in one pass: in order, nothing dropped, nothing augmented.

Names are imported when first used; the libraries behind a source of data are imported when that source is opened.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_faast.data.digits import DigitsDataModule
    from lightning_faast.data.images import ImageDataModule

__all__ = ["DigitsDataModule", "ImageDataModule"]

_HOMES = {
    "DigitsDataModule": "lightning_faast.data.digits",
    "ImageDataModule": "lightning_faast.data.images",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
