"""Labelled images for any encoder."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_faast.data.labels import choose_per_class, encode_labels, hold_out
from lightning_faast.data.sources import ImageRows, ImageSource
from lightning_faast.data.transforms import DecodeTransform, DeviceTransform, WorkerTransform, complete_data_config

_SMALL_SIDE = 128  # pixels; larger images of one size are too often a coincidence of those looked at
_LOOKED_AT = 64  # images a split

#: What rows are for; test rows are those of ``predict`` too.
Stage = Literal["train", "val", "test"]


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


class ImageDataModule(LightningDataModule):
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
        super().__init__()
        if train_split is None and val_split is None and test_split is None:
            raise ValueError("train_split, val_split and test_split are all None: name at least one split.")
        for option, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("limit_per_class", limit_per_class),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{option}={value} must be at least 1.")
        for option, value in (("seed", seed), ("holdout_seed", holdout_seed)):
            if value < 0:
                raise ValueError(f"{option}={value} must not be negative.")
        if holdout is not None:
            _check_holdout(holdout, train_split, test_split)
        if persistent_workers and num_workers == 0:
            raise ValueError("persistent_workers=True needs num_workers of at least 1.")
        # no save_hyperparameters: Lightning refuses a name that module and data module log with different values
        self.path = path
        self.name = name
        self.root = root
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split
        self.holdout = holdout
        self.holdout_seed = holdout_seed
        self.image_column = image_column
        self.label_column = label_column
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.limit_per_class = limit_per_class
        self.seed = seed
        self.shuffle = shuffle
        self.augment = augment
        self.data_config = data_config
        self.interpolation = interpolation
        self.crop_pct = crop_pct
        self.device_transform = device_transform

        self._rows: dict[str, ImageRows] = {}  # by split
        self._labels: dict[str, np.ndarray] = {}  # by split
        self._indices: dict[Stage, np.ndarray] = {}  # rows of its split that a stage has
        self._fitted_on: np.ndarray = np.zeros(0, np.int64)  # those of the training rows that limit_per_class leaves
        self._class_names: list[str] | None = None
        self._size: tuple[int, int] | None = None  # the one size of all images, where they are prepared on the device
        self._config: dict[str, Any] = {}
        self._on_device: DeviceTransform | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their indices."""
        if self._class_names is None:
            raise RuntimeError("The classes are known after setup: call prepare_data() and setup() first.")
        return self._class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def has_test(self) -> bool:
        """Whether there are test rows: of ``test_split``, or held out."""
        return self._split_of("test") is not None

    @property
    def transform_description(self) -> str:
        """How images are prepared, as JSON: the data configuration, and whether in batches on the device."""
        if not self._config:
            raise RuntimeError("How images are prepared is known after setup: call prepare_data() and setup() first.")
        return json.dumps({**self._config, "device_transform": self._on_device is not None}, sort_keys=True)

    def labels(self, stage: Stage) -> np.ndarray:
        """Class indices of all rows of a stage, int64 ``(rows,)``, in order.

        Args:
            stage: ``"train"`` (without the rows held out; ``limit_per_class`` does not apply), ``"val"`` or ``"test"``.

        Raises:
            RuntimeError: Before ``setup``.
            ValueError: Where the stage has no split.
        """
        split = self._opened_split(stage)
        return self._labels[split][self._indices[stage]]

    def fingerprint(self, stage: Stage) -> str:
        """32 hexadecimal digits that change whenever the rows of :meth:`labels`, their order or labels do.

        Image files and parquet files count by their names within the data set, sizes and times of last change, which is
        quick; data sets on the hub by their revision; arrays by their content.

        Args:
            stage: ``"train"``, ``"val"`` or ``"test"``.

        Raises:
            RuntimeError: Before ``setup``.
            ValueError: Where the stage has no split.
        """
        split = self._opened_split(stage)
        state = hashlib.sha256()
        state.update(json.dumps([self._rows[split].fingerprint(), self.class_names]).encode())
        state.update(self._indices[stage].tobytes())
        state.update(self.labels(stage).tobytes())
        return state.hexdigest()[:32]

    def ordered_loader(self, stage: Stage) -> DataLoader[tuple[Tensor, int]]:
        """All rows of a stage, in the order of :meth:`labels`, prepared as for evaluation.

        Neither ``limit_per_class`` nor ``shuffle`` nor ``augment`` applies. :meth:`on_after_batch_transfer` ends the
        preparation, as for the other loaders.

        Args:
            stage: ``"train"``, ``"val"`` or ``"test"``.

        Raises:
            RuntimeError: Before ``setup``.
            ValueError: Where the stage has no split.
        """
        self._opened_split(stage)
        return self._loader(stage, self._indices[stage], self.eval_batch_size or self.batch_size)

    def prepare_data(self) -> None:
        """Download what is not on this machine yet."""
        self._source().download(self._splits())

    def setup(self, stage: str | None = None) -> None:
        """Open the splits and settle how images are prepared.

        Args:
            stage: Whatever it is, all splits are opened: the training split defines the classes.
        """
        if self._class_names is None:
            self._open_splits()
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

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """The training rows."""
        self._opened_split("train")
        return self._loader("train", self._fitted_on, self.batch_size, self.shuffle, self.augment)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]] | list[Any]:
        """The validation split; an empty list, which Lightning takes for no validation, where there is none."""
        return [] if self.val_split is None else self.ordered_loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """The test rows: the test split, or what is held out of the training split."""
        return self.ordered_loader("test")

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """The test rows."""
        return self.test_dataloader()

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
        """Rows of each split; what a data module of another source replaces, together with ``prepare_data``."""
        source = self._source()
        return {split: source.open(split) for split in splits}

    def _split_of(self, stage: Stage) -> str | None:
        if stage == "test" and self.holdout is not None:
            return self.train_split
        return {"train": self.train_split, "val": self.val_split, "test": self.test_split}[stage]

    def _opened_split(self, stage: Stage) -> str:
        if stage not in get_args(Stage):
            raise ValueError(f"stage={stage!r} must be one of {', '.join(get_args(Stage))}.")
        split = self._split_of(stage)
        if split is None:
            purpose = {"train": "fit", "val": "validate", "test": "test"}[stage]
            or_share = ", or hold out a share of the training split (--data.holdout=0.2)" if stage == "test" else ""
            raise ValueError(
                f"{stage}_split=None: name the split to {purpose} on (--data.{stage}_split=NAME){or_share}."
            )
        if split not in self._rows or not self._config:
            raise RuntimeError("Call prepare_data() and setup() first; a Trainer does.")
        return split

    def _splits(self) -> list[str]:
        named = (self.train_split, self.val_split, self.test_split)
        return list(dict.fromkeys(split for split in named if split is not None))

    def _open_splits(self) -> None:
        self._rows = self._open(self._splits())
        # the classes of a checkpoint that is only evaluated are those declared, whether its rows have them or not
        class_names, self._labels = encode_labels(self._rows, keep_unused=self.train_split is None)
        for stage in get_args(Stage):
            split = self._split_of(stage)
            if split is not None:
                self._indices[stage] = np.arange(len(self._rows[split]))
        if self.holdout is not None and self.train_split is not None:
            labels = self._labels[self.train_split]
            self._indices["train"], self._indices["test"] = hold_out(
                labels, class_names, self.holdout, self.holdout_seed
            )
        if self.train_split is not None:
            training = self._indices["train"]
            if self.limit_per_class is not None:
                labels = self._labels[self.train_split][training]
                training = training[self._choose(labels, class_names, self.limit_per_class)]
            self._fitted_on = training
        self._class_names = class_names

    def _choose(self, labels: np.ndarray, class_names: list[str], limit: int) -> np.ndarray:
        chosen, counts = choose_per_class(labels, len(class_names), limit, self.seed)
        short = [f"{class_names[i]} ({counts[i]})" for i in np.flatnonzero(counts < limit)]
        if short:
            listed = ", ".join(short[:10]) + (f" and {len(short) - 10} more" if len(short) > 10 else "")
            rank_zero_warn(
                f"limit_per_class={limit}, but some classes of the split {self.train_split!r} have fewer images, all "
                f"of which are taken: {listed}."
            )
        return chosen

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

    def _loader(
        self,
        stage: Stage,
        indices: np.ndarray,
        batch_size: int,
        shuffle: bool = False,
        augment: dict[str, Any] | None = None,
    ) -> DataLoader[tuple[Tensor, int]]:
        split = self._opened_split(stage)
        transform: Callable[[Image.Image], Tensor]
        if augment is None and self._on_device is not None and self._size is not None:
            transform = DecodeTransform(self._size)
        else:
            transform = WorkerTransform(self._config, augment)
        return DataLoader(
            ImageDataset(self._rows[split], self._labels[split], indices, transform),
            batch_size=batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(self.seed) if shuffle else None,
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            persistent_workers=self.persistent_workers,
        )


def _check_holdout(holdout: float, train_split: str | None, test_split: str | None) -> None:
    if not 0 < holdout < 1:
        raise ValueError(f"holdout={holdout} must lie between 0 and 1: the share of each class to test on.")
    if train_split is None:
        raise ValueError(f"holdout={holdout} is a share of the training split, and train_split=None.")
    if test_split is not None:
        raise ValueError(
            f"holdout={holdout} makes test rows of training rows, and test_split={test_split!r} names others. Set "
            "test_split=None (--data.test_split=null), or leave holdout out."
        )


def _collate(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    images, labels = default_collate(rows)
    return images, labels
