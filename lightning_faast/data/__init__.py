"""LightningDataModules."""

from typing import TYPE_CHECKING

from lightning_faast.lazy import attach

if TYPE_CHECKING:
    from lightning_faast.data.digits import DigitsDataModule
    from lightning_faast.data.images import ImageDataModule
    from lightning_faast.data.keys import KeysDataModule

__all__ = ["DigitsDataModule", "ImageDataModule", "KeysDataModule"]

__getattr__, __dir__ = attach(
    __name__,
    {
        "DigitsDataModule": "lightning_faast.data.digits",
        "ImageDataModule": "lightning_faast.data.images",
        "KeysDataModule": "lightning_faast.data.keys",
    },
)
