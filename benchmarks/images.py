"""Images to measure with: the small CIFAR-10 beside the checkout where it is there, else generated ones."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared"
CLASSES = 10
_SIDE = 32


@dataclass(frozen=True)
class Images:
    """A data set of small images.

    Attributes:
        path: For ``ImageDataModule(path)``.
        described: For the report.
    """

    path: str
    described: str

    def encoded(self) -> list[bytes]:
        """The files of the training split, still encoded, in memory."""
        folder = Path(self.path)
        if (files := sorted(folder.glob("train/*/*.png"))) != []:
            return [file.read_bytes() for file in files]
        from datasets import Image as ImageFeature
        from datasets import load_dataset

        rows = load_dataset(self.path, split="train")
        column = next(name for name, feature in rows.features.items() if isinstance(feature, ImageFeature))
        return [row["bytes"] for row in rows.cast_column(column, ImageFeature(decode=False))[column]]


@contextmanager
def small_images(per_class: int, generated: bool = False) -> Iterator[Images]:
    """At least ``per_class`` images of 32 x 32 pixels in each of ten classes.

    Args:
        per_class: How many to generate where there is no data set.
        generated: Generate them whatever there is.
    """
    shared = SHARED / "data" / "cifar10-small"
    if shared.is_dir() and not generated:
        yield Images(str(shared), "CIFAR-10 (`../shared/data/cifar10-small`)")
        return
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for label in range(CLASSES):
            directory = Path(folder, "train", f"class_{label}")
            directory.mkdir(parents=True)
            for index in range(per_class):
                # smooth, as photographs are: noise would be slower to decode
                coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((_SIDE, _SIDE)).save(directory / f"{index:05d}.png")
        yield Images(folder, "generated 32 x 32 images (no `../shared/data/cifar10-small` beside the checkout)")


def decode(encoded: bytes) -> np.ndarray:
    """An RGB image [height, width, 3], uint8."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.array(image.convert("RGB"))
