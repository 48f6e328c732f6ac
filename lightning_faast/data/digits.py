"""scikit-learn's digits: real handwriting that needs no download."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_faast.data.extras import require
from lightning_faast.data.images import ImageDataModule
from lightning_faast.data.sources import ArrayRows, ImageRows

_TEST_ROWS = 500


class DigitsDataModule(ImageDataModule):
    """1,797 handwritten digits of 8x8 pixels, from scikit-learn; the last 500 are the test split.

    The rows are ordered by writer, so those who wrote the test digits wrote none of the 1,297 training digits.

    Args:
        batch_size: Images a batch, on each device.
        eval_batch_size: The same for test and prediction; ``None`` for ``batch_size``.
        num_workers: Processes that decode, for each loader.
        pin_memory: Page-locked batches; ``None`` for where CUDA is available.
        persistent_workers: Keep the workers from one epoch to the next.
        limit_per_class: Fit on this many images of each class only.
        seed: Seed of that choice and of shuffling.
        shuffle: Shuffle the training split anew in every epoch.
        augment: Arguments of timm's ``create_transform`` for training.
        data_config: As for :class:`ImageDataModule`; ``None`` for that of the encoder that runs.
        interpolation: Replaces the data configuration's; ``bilinear`` suits these tiny images.
        crop_pct: Replaces the data configuration's; 1.0 keeps the whole digit.
        device_transform: As for :class:`ImageDataModule`.

    Example:
        >>> from lightning_faast.data import DigitsDataModule
        >>> from lightning_faast.encoders import VisionEncoder
        >>> encoder = VisionEncoder("test_vit", pretrained=False)
        >>> data = DigitsDataModule(data_config=encoder.data_config)
        >>> data.setup()
        >>> data.num_classes
        10
        >>> images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        >>> encoder(images).shape
        torch.Size([64, 64])
    """

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        persistent_workers: bool = False,
        limit_per_class: int | None = None,
        seed: int = 0,
        shuffle: bool = False,
        augment: dict[str, Any] | None = None,
        data_config: dict[str, Any] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        device_transform: bool | None = None,
    ) -> None:
        super().__init__(
            path="scikit-learn:digits",
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            limit_per_class=limit_per_class,
            seed=seed,
            shuffle=shuffle,
            augment=augment,
            data_config=data_config,
            interpolation=interpolation,
            crop_pct=crop_pct,
            device_transform=device_transform,
        )

    def prepare_data(self) -> None:
        """Nothing: the digits come with scikit-learn."""

    def _open(self, splits: Sequence[str]) -> dict[str, ImageRows]:
        digits = require("sklearn.datasets", "quickstart").load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        labels = digits.target.astype(np.int64)
        names = [str(name) for name in digits.target_names]
        parts = {"train": slice(None, -_TEST_ROWS), "test": slice(-_TEST_ROWS, None)}
        return {split: ArrayRows(images[parts[split]], labels[parts[split]], names) for split in splits}
