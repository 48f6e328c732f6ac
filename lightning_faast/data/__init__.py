"""LightningDataModules."""

from typing import TYPE_CHECKING

from lightning_faast.lazy import attach

if TYPE_CHECKING:
    from lightning_faast.data.digits import DigitsDataModule
    from lightning_faast.data.images import ImageDataModule
    from lightning_faast.data.keys import KeysDataModule
    from lightning_faast.data.language import LanguageDataModule
    from lightning_faast.data.text import TextDataModule

__all__ = ["DigitsDataModule", "ImageDataModule", "KeysDataModule", "LanguageDataModule", "TextDataModule"]

__getattr__, __dir__ = attach(
    __name__,
    {
        "DigitsDataModule": "lightning_faast.data.digits",
        "ImageDataModule": "lightning_faast.data.images",
        "KeysDataModule": "lightning_faast.data.keys",
        "LanguageDataModule": "lightning_faast.data.language",
        "TextDataModule": "lightning_faast.data.text",
    },
)
