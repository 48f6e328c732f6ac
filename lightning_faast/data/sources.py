"""Where labelled images come from: one split of a data set as rows that are decoded when asked for."""

import os
from abc import abstractmethod
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from lightning_faast.data.columns import find_image_column, find_label_column
from lightning_faast.data.extras import require
from lightning_faast.data.huggingface import (
    HOLD_OUT,
    WHOLE,
    DatasetSource,
    Kind,
    class_names,
    describe_files,
    find_kind,
    no_split,
    read_labels,
    refuse_options,
)
from lightning_faast.data.rows import LabelledRows, digest

_TORCHVISION = "torchvision:"
_SUFFIXES = (".parquet",)


class ImageRows(LabelledRows):
    """Labelled images of one split. Reading the labels decodes no image."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The image of one row, in any mode and size."""


class DatasetRows(ImageRows):
    """Rows of a memory-mapped Hugging Face data set.

    Args:
        dataset: One split, a ``datasets.Dataset``.
        origin: What changes whenever the files behind the split do.
        image_column: Column of the images; ``None`` to find it.
        label_column: Column of the labels; ``None`` to find it.
    """

    def __init__(
        self, dataset: Any, origin: str, image_column: str | None = None, label_column: str | None = None
    ) -> None:
        datasets = require("datasets", "vision")
        self.image_column = find_image_column(dataset.features, image_column)
        label_column = find_label_column(dataset.features, label_column)
        images = dataset.select_columns([self.image_column])
        feature = dataset.features[self.image_column]
        if not isinstance(feature, datasets.Image):
            # written without the hub's metadata: a struct of bytes and path, or the bytes alone
            try:
                images = images.cast_column(self.image_column, datasets.Image())
            except (TypeError, ValueError, NotImplementedError) as error:  # the last is pyarrow's
                raise ValueError(
                    f"Column {self.image_column!r} cannot be read as images ({error}). Set image_column to one of: "
                    f"{', '.join(dataset.column_names)}."
                ) from error
        elif not feature.decode:
            images = images.cast_column(self.image_column, datasets.Image())
        self.images = images
        self.origin = f"{origin} {dataset.split} {self.image_column}"
        super().__init__(read_labels(dataset, label_column), class_names(dataset, label_column))

    def image(self, index: int) -> Image.Image:
        """The image of one row, in any mode and size."""
        image = self.images[index][self.image_column]
        if image is None:
            raise ValueError(f"Row {index} has no image in column {self.image_column!r}. Remove the row.")
        return image

    def fingerprint(self) -> str:
        """From the files' names, sizes and times, or from the revision on the hub; the split and the column."""
        return digest(self.origin.encode())


class FileRows(ImageRows):
    """Rows of image files.

    Args:
        root: The folder that holds them all.
        paths: One file a row.
        labels: Class names, ``(rows,)``.
    """

    def __init__(self, root: Path, paths: Sequence[str], labels: np.ndarray) -> None:
        super().__init__(labels)
        self.root = root
        self.paths = paths

    def image(self, index: int) -> Image.Image:
        """The image of one row, in any mode and size."""
        with Image.open(self.paths[index]) as image:
            image.load()
            return image

    def fingerprint(self) -> str:
        """From the files' names within the root, their sizes and times, as they are now."""
        return digest(describe_files(self.root, self.paths).encode())


class ArrayRows(ImageRows):
    """Rows of small images in one array, for sources that are in memory anyway.

    Args:
        images: uint8, ``(rows, height, width)`` or ``(rows, height, width, 3)``.
        labels: int64, ``(rows,)``.
        class_names: Names of the classes; ``None`` where the source has none.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: list[str] | None) -> None:
        super().__init__(labels, class_names)
        self.images = images

    def image(self, index: int) -> Image.Image:
        """The image of one row, greyscale or RGB."""
        return Image.fromarray(self.images[index])

    def fingerprint(self) -> str:
        """From the pixels."""
        return digest(str(self.images.shape).encode(), np.ascontiguousarray(self.images).data)


class ImageSource:
    """A data set with named splits, found by its path.

    Args:
        path: A local folder in the hub's parquet layout, a ``.parquet`` file, a root of ``split/class/image`` folders,
            a root of ``class/image`` folders (torchvision's ``ImageFolder``; all of it is the split ``train``),
            ``torchvision:CLASS``, or else a data set's name on the Hugging Face hub.
        name: Configuration of a Hugging Face data set.
        root: Folder of the downloaded files of a torchvision data set.
        image_column: Column of the images in a Hugging Face data set or parquet file.
        label_column: Column of the labels there.

    Raises:
        FileNotFoundError: Where the path is neither there nor a possible name on the hub.
        ValueError: Where an option does not belong to this kind of source, or a folder has no known layout.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        root: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.root = root
        self.image_column = image_column
        self.label_column = label_column
        self.kind = _find_kind(path)
        if self.kind in ("torchvision", "folders", "classes"):
            self._refuse(name=name, image_column=image_column, label_column=label_column)
        if self.kind == "file":
            self._refuse(name=name)
        if self.kind != "torchvision":
            self._refuse(root=root)
        elif root is None:
            raise ValueError(f"path={path!r} needs root, the folder of the downloaded files (--data.root=DIR).")

    def _refuse(self, **options: str | None) -> None:
        refuse_options(self.path, _KINDS[self.kind], **options)

    def _dataset(self) -> DatasetSource:
        return DatasetSource(self.path, self.name, cast(Kind, self.kind), _SUFFIXES, "vision")

    def download(self, splits: Sequence[str]) -> None:
        """Fetch what is not on this machine yet; on several processes, call it in one."""
        if self.kind in ("folders", "classes"):
            return
        for split in splits:
            if self.kind == "torchvision":
                self._load_torchvision(split, download=True)
            else:
                self._dataset().load(split)

    def open(self, split: str) -> ImageRows:
        """The rows of one split.

        Args:
            split: A split's name; for Hugging Face data sets and parquet files also a slice such as ``train[:80%]``.

        Raises:
            ValueError: Where there is no such split or column; the message lists those that there are.
            ConnectionError: Where the data set is on the hub and cannot be reached.
        """
        if self.kind in ("folders", "classes"):
            return self._open_folders(split)
        if self.kind == "torchvision":
            dataset = self._load_torchvision(split, download=False)
            classes = getattr(dataset, "classes", None)  # USPS has none
            return ArrayRows(np.asarray(dataset.data), np.asarray(dataset.targets), classes and list(classes))
        dataset, origin = self._dataset().open(split)
        return DatasetRows(dataset, origin, self.image_column, self.label_column)

    def _open_folders(self, split: str) -> ImageRows:
        root = Path(self.path).expanduser()
        if self.kind == "classes" and split != WHOLE:
            raise ValueError(
                f"path={self.path!r} holds one folder a class, all of it the split {WHOLE!r}, and no split {split!r}. "
                f"{HOLD_OUT}"
            )
        folder = root if self.kind == "classes" else root / split
        if not folder.is_dir():
            raise no_split(self.path, split, [entry.name for entry in _folders_in(root)])
        reader = require("torchvision.datasets.folder", "vision")
        names = [entry.name for entry in _folders_in(folder)]
        try:
            # as ImageFolder reads it, which would take hidden folders for classes
            samples = reader.make_dataset(
                str(folder), {name: index for index, name in enumerate(names)}, extensions=reader.IMG_EXTENSIONS
            )
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{folder} must hold one folder of images a class. ({error})") from error
        samples = [(path, index) for path, index in samples if not _is_hidden(Path(path).relative_to(folder))]
        return FileRows(folder, [path for path, _ in samples], np.asarray([names[index] for _, index in samples]))

    def _load_torchvision(self, split: str, download: bool) -> Any:
        catalog = require("torchvision.datasets", "vision")
        name = self.path.removeprefix(_TORCHVISION)
        kind = getattr(catalog, name, None)
        if not isinstance(kind, type) or not {"train", "download"} <= set(signature(kind).parameters):
            raise ValueError(
                f"path={self.path!r}: torchvision.datasets has no {name} with a train and a test split in one argument "
                "train; CIFAR10, CIFAR100, MNIST and FashionMNIST are such."
            )
        if split not in ("train", "test"):
            raise no_split(self.path, split, ["train", "test"])
        try:
            return kind(self.root, train=split == "train", download=download)
        except OSError as error:
            raise ConnectionError(
                f"The files of {self.path!r} are not in root={self.root!r} and cannot be downloaded ({error}). "
                "Put them there, or give a local folder in the hub's parquet layout instead (--data.path=DIR)."
            ) from error
        except RuntimeError as error:
            raise FileNotFoundError(
                f"The files of {self.path!r} are not in root={self.root!r}. Call prepare_data(), which downloads them, "
                f"or put them there. ({error})"
            ) from error


_KINDS = {
    "torchvision": "a torchvision data set",
    "folders": "folders of images",
    "classes": "folders of images",
    "file": "a parquet file",
    "layout": "a folder in the hub's parquet layout",
    "hub": "a data set on the Hugging Face hub",
}


def _find_kind(path: str) -> str:
    if path.startswith(_TORCHVISION):
        return "torchvision"
    return find_kind(path, _SUFFIXES) or _find_folder_kind(path, Path(path).expanduser())


def _find_folder_kind(path: str, root: Path) -> str:
    """Whether the images lie in ``class/image`` or in ``split/class/image``.

    Images right inside the first folders make these the classes. Some folders with and some without images, or folders
    of images beside images, could be either, and a wrong guess would take splits for classes.
    """
    folders = _folders_in(root)
    with_images = [folder for folder in folders if _holds_images(folder)]
    if not with_images:
        if any(_folders_in(folder) for folder in folders):
            return "folders"
        raise ValueError(
            f"path={path!r} holds neither .parquet files nor folders of images: class/image (cat/1.png, dog/1.png, …) "
            "or split/class/image (train/cat/1.png, test/cat/1.png, …)."
        )
    for folder in folders:
        inner = next((inner for inner in _folders_in(folder) if _holds_images(inner)), None)
        if inner is not None:
            raise ValueError(
                f"path={path!r} mixes layouts: {with_images[0].name} holds images, and {folder.name}/{inner.name} does "
                "too. Expected class/image or split/class/image, throughout."
            )
    return "classes"


def _folders_in(folder: Path) -> list[Path]:
    """Folders of a folder, sorted; hidden ones (``.ipynb_checkpoints``) are none of the data."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return [folder / name for name in names]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _holds_images(folder: Path) -> bool:
    extensions = require("torchvision.datasets.folder", "vision").IMG_EXTENSIONS
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(extensions) and entry.is_file() for entry in entries)
