"""The data module's loader with two workers against decoding alone."""

from __future__ import annotations

import torch

from benchmarks.harness import Row, Samples, Section, Settings, Target, interleave, samples
from benchmarks.images import CLASSES, decode, small_images
from lightning_faast.data import ImageDataModule

TITLE = "Loader"
TARGET = Target(note="(images/s: higher is better)")
_WORKERS = 2
_CONFIG = {
    "input_size": (3, 98, 98),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def run(settings: Settings) -> Section:
    """Measure."""
    with small_images(5 if settings.quick else 500, generated=settings.quick) as images:
        encoded = images.encoded()
        rows = len(encoded)

        def module(device_transform: bool) -> ImageDataModule:
            data = ImageDataModule(
                images.path,
                test_split=None,
                batch_size=10 if settings.quick else 64,
                num_workers=_WORKERS,
                data_config=_CONFIG,
                device_transform=device_transform,
            )
            data.prepare_data()
            data.setup()
            assert data.num_classes == CLASSES
            return data

        small, whole = module(True), module(False)

        def alone() -> None:
            for image in encoded:
                torch.from_numpy(decode(image))

        def workers() -> None:
            assert sum(len(labels) for _, labels in small.train_dataloader()) == rows

        def prepared() -> None:
            batches = (small.on_after_batch_transfer(batch, 0) for batch in small.train_dataloader())
            assert sum(len(labels) for _, labels in batches) == rows

        def timm() -> None:
            assert sum(len(labels) for _, labels in whole.train_dataloader()) == rows

        measured = interleave({"alone": alone, "workers": workers, "prepared": prepared, "timm": timm}, settings.runs)

    def rate(name: str) -> Samples:
        return samples([rows / t for t in measured[name]], "images/s")

    section = Section(
        TITLE,
        f"{images.described}, {rows:,} images, one pass over the training loader of `ImageDataModule` with {_WORKERS} "
        "workers, which start and stop within the time. The peer decodes the same files, already in memory, one after "
        "another in one process. The ratio is of images/s, ours over the peer's.",
    )
    section.rows = [
        Row.compare(what, rate(name), "PIL decoding to an RGB tensor", rate("alone"), TARGET)
        for name, what in (
            ("workers", "batches as they leave the workers (decoded, uint8)"),
            (
                "prepared",
                "batches ready for the encoder: resized to 98 px and normalized in batches, after the workers",
            ),
            ("timm", "batches ready for the encoder: timm's transform in the workers (`device_transform=False`)"),
        )
    ]
    return section
