"""Labelled images for any encoder."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_faast.data.labelled import LabelledDataModule, Stage
from lightning_faast.data.sources import ImageRows, ImageSource
from lightning_faast.data.transforms import DecodeTransform, DeviceTransform, WorkerTransform, complete_data_config

_SMALL_SIDE = 128  # pixels; larger images of one size are too often a coincidence of those looked at
_LOOKED_AT = 64  # images a split


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Rows of a split as tensors, decoded when asked for.

    Args:
        rows: The images.
        labels: Class index of every row, int64.
        indices: The rows that take part, in order.
        transform: From a PIL image to a tensor.
    """

    def __init__(
        self, rows: ImageRows, labels: np.ndarray, indices: np.ndarray, transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.rows = rows
        self.labels = labels
        self.indices = indices
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = int(self.indices[index])
        return self.transform(self.rows.image(row)), int(self.labels[row])


class ImageDataModule(LabelledDataModule[ImageRows]):
    """Labelled images from the Hugging Face hub, local files or torchvision, prepared as an encoder wants them.

    Images are prepared by timm's evaluation transform, in the workers. Where all images have one small size (CIFAR,
    digits), the workers only decode them and the same transform runs in batches on the device, after the transfer of
    small uint8 images, in ``on_after_batch_transfer``; who iterates over a loader without a Trainer calls that hook.

    Batches are tuples ``(images, labels)``: float32 ``(batch, 3, height, width)`` and int64 ``(batch,)``. The training
    split comes in order, unaugmented and whole: what is fitted in closed form gains nothing from chance. Methods with
    epochs set ``shuffle`` and ``augment``.

    Declared classes that no row has are left out where there is a training split. The paper's mini-ImageNet protocol,
    which halves each of the 20 test classes, is ``train_split="test", test_split=None, holdout=0.5``.

    What compares methods encodes each row once, from :meth:`ordered_loader`, keeps the keys under :meth:`fingerprint`
    and :attr:`transform_description`, and takes subsets of the rows of :meth:`labels` with
    :func:`~lightning_faast.data.labels.choose_per_class`, which are those of ``limit_per_class``.

    Args:
        path: A data set's name on the hub (``uoft-cs/cifar10``), a local folder in the hub's parquet layout, a
            ``.parquet`` file, a root of ``split/class/image`` folders, a root of ``class/image`` folders (torchvision's
            ``ImageFolder``; all of it is the split ``train``), or ``torchvision:CIFAR10``.
        name: Configuration of a Hugging Face data set.
        root: Folder of the files of a torchvision data set, which are downloaded there if need be.
        train_split: Split to fit on; ``None`` for data sets that are only evaluated on. Hugging Face data sets and
            parquet files also take slices, such as ``train[:80%]``.
        val_split: Split to validate on; ``None`` for no validation.
        test_split: Split of ``test`` and ``predict``; ``None`` where there is none.
        holdout: Share of each class of ``train_split`` that becomes the test rows, where ``test_split`` is ``None``;
            the others are the training rows. At least one row of each class is on each side.
        holdout_seed: Seed of that choice, which depends on the labels alone.
        image_column: Column of the images; ``None`` to find it by its name and type.
        label_column: Column of the labels (class labels, integers or strings); ``None`` to find it.
        batch_size: Images a batch, on each device.
        eval_batch_size: The same for validation, test and prediction; ``None`` for ``batch_size``.
        num_workers: Processes that read and decode, for each loader.
        pin_memory: Page-locked batches; ``None`` for where CUDA is available.
        persistent_workers: Keep the workers from one epoch to the next.
        limit_per_class: Fit on this many images of each class only, chosen at random from the labels alone.
        seed: Seed of that choice and of shuffling.
        shuffle: Shuffle the training split anew in every epoch.
        augment: Arguments of timm's ``create_transform`` for training, such as ``{"hflip": 0.5, "scale": [0.5, 1.0]}``;
            ``{}`` for timm's defaults. Augmented images are prepared in the workers.
        data_config: What ``timm.data.resolve_model_data_config`` gives; ``None`` for ``data_config`` of the attribute
            ``encoder`` of the module that runs.
        interpolation: Replaces the data configuration's (``bilinear``, ``bicubic``, …).
        crop_pct: Replaces the data configuration's share of the image's side that the center crop keeps.
        device_transform: Prepare images in batches on the device; ``None`` to decide by looking at a few images.

    Attributes:
        class_names: Names of the classes, after ``setup``.
        num_classes: Number of classes, after ``setup``.

    Raises:
        ValueError: For options that cannot be, splits and columns that are not there (the message lists those that
            are), and images of several sizes where ``device_transform`` is set.
        ConnectionError: Where the data set is on the hub and the hub cannot be reached.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from lightning_faast.data import ImageDataModule
        >>> from lightning_faast.encoders import VisionEncoder
        >>> root = Path(tempfile.mkdtemp())
        >>> for split, color in [("train", "red"), ("train", "blue"), ("test", "red"), ("test", "blue")]:
        ...     (root / split / color).mkdir(parents=True)
        ...     Image.new("RGB", (48, 32), color).save(root / split / color / "1.png")
        >>> data = ImageDataModule(str(root), data_config=VisionEncoder("test_vit", pretrained=False).data_config)
        >>> data.setup()
        >>> data.class_names
        ['blue', 'red']
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        root: str | None = None,
        train_split: str | None = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        holdout: float | None = None,
        holdout_seed: int = 42,
        image_column: str | None = None,
        label_column: str | None = None,
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
            train_split=train_split,
            val_split=val_split,
            test_split=test_split,
            holdout=holdout,
            holdout_seed=holdout_seed,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            limit_per_class=limit_per_class,
            seed=seed,
            shuffle=shuffle,
        )
        if persistent_workers and num_workers == 0:
            raise ValueError("persistent_workers=True needs num_workers of at least 1.")
        self.path = path
        self.name = name
        self.root = root
        self.image_column = image_column
        self.label_column = label_column
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.augment = augment
        self.data_config = data_config
        self.interpolation = interpolation
        self.crop_pct = crop_pct
        self.device_transform = device_transform

        self._size: tuple[int, int] | None = None  # the one size of all images, where they are prepared on the device
        self._config: dict[str, Any] = {}
        self._on_device: DeviceTransform | None = None

    @property
    def transform_description(self) -> str:
        """How images are prepared, as JSON: the data configuration, and whether in batches on the device."""
        if not self._config:
            raise RuntimeError("How images are prepared is known after setup: call prepare_data() and setup() first.")
        return json.dumps({**self._config, "device_transform": self._on_device is not None}, sort_keys=True)

    def prepare_data(self) -> None:
        """Download what is not on this machine yet."""
        self._source().download(self._splits())

    def setup(self, stage: str | None = None) -> None:
        """Open the splits and settle how images are prepared.

        Args:
            stage: Whatever it is, all splits are opened: the training split defines the classes.
        """
        super().setup(stage)
        # anew at every setup, as the module may be another
        self._config = complete_data_config(self._find_data_config(), self.interpolation, self.crop_pct)
        wanted = self.device_transform
        if wanted is None:
            wanted = DeviceTransform.unsupported(self._config) is None
        self._on_device = DeviceTransform(self._config) if wanted else None
        if self._on_device is not None and self._size is None:
            self._size = self._find_size()
            if self._size is None:
                self._on_device = None

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Prepare a batch of decoded images on its device; one prepared in the workers passes through."""
        images, labels = batch
        if images.dtype == torch.uint8:
            if self._on_device is None:
                raise RuntimeError("This batch was made before the last setup(): take a new loader.")
            images = self._on_device(images)
        return images, labels

    def _source(self) -> ImageSource:
        return ImageSource(self.path, self.name, self.root, self.image_column, self.label_column)

    def _open(self, splits: Sequence[str]) -> dict[str, ImageRows]:
        source = self._source()
        return {split: source.open(split) for split in splits}

    def _opened_split(self, stage: Stage) -> str:
        split = super()._opened_split(stage)
        if not self._config:  # a setup that failed after it had opened the splits
            raise RuntimeError("Call prepare_data() and setup() first; a Trainer does.")
        return split

    def _find_data_config(self) -> dict[str, Any]:
        if self.data_config is not None:
            return self.data_config
        module = None if self.trainer is None else self.trainer.lightning_module
        config = getattr(getattr(module, "encoder", None), "data_config", None)
        if config is None:
            raise ValueError(
                "data_config is not set, and there is no running module with an attribute encoder that has a "
                "data_config. Pass data_config=timm.data.resolve_model_data_config(model)."
            )
        return config

    def _find_size(self) -> tuple[int, int] | None:
        """The one small size of the images looked at, of every split; ``None`` where there is none."""
        sizes: set[tuple[int, int]] = set()
        for rows in self._rows.values():
            for index in np.unique(np.linspace(0, len(rows) - 1, _LOOKED_AT).astype(int)):
                sizes.add(rows.image(int(index)).size)
                if len(sizes) > 1:
                    if self.device_transform:
                        listed = " and ".join(f"{width}x{height}" for width, height in sorted(sizes))
                        raise ValueError(
                            f"device_transform=True needs images of one size, found {listed}. Set device_transform="
                            "False to resize each image in the workers."
                        )
                    return None
                if self.device_transform is None and max(next(iter(sizes))) > _SMALL_SIDE:
                    return None
        return next(iter(sizes))

    def _loader(self, stage: Stage, indices: np.ndarray, for_training: bool = False) -> DataLoader[tuple[Tensor, int]]:
        split = self._opened_split(stage)
        augment, shuffle = (self.augment, self.shuffle) if for_training else (None, False)
        transform: Callable[[Image.Image], Tensor]
        if augment is None and self._on_device is not None and self._size is not None:
            transform = DecodeTransform(self._size)
        else:
            transform = WorkerTransform(self._config, augment)
        return DataLoader(
            ImageDataset(self._rows[split], self._labels[split], indices, transform),
            batch_size=self.batch_size if for_training else self.eval_batch_size or self.batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(self.seed) if shuffle else None,
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            persistent_workers=self.persistent_workers,
        )


def _collate(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    images, labels = default_collate(rows)
    return images, labels
