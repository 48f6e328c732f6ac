"""Augmentation of training data as a part of a method, for data of any kind."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class AugmentImages(Callback):
    """Augments the training images of a fit; data of other kinds are trained on as they are, which the log says.

    What the data module is told itself (``ImageDataModule(augment=...)``) counts instead.

    Args:
        arguments: Of timm's ``create_transform`` for training, such as ``{"hflip": 0.5, "scale": [0.5, 1.0]}``.

    Example::

        trainer = Trainer(callbacks=[AugmentImages({"hflip": 0.5})], max_epochs=10)
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = dict(arguments)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the data module, which makes its loader later."""
        if stage != "fit":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "augment"):
            rank_zero_info(f"No augmentation: {type(data).__name__} has no images to augment.")
        elif data.augment is None:
            data.augment = self.arguments
