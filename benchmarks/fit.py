"""``Trainer.fit`` in one pass against nothing but the encoder over the same loader."""

from __future__ import annotations

import time

import torch
from lightning.pytorch import Trainer

from benchmarks.harness import Row, Section, Settings, Target, interleave, quiet, samples
from benchmarks.images import CLASSES, SHARED, small_images
from lightning_faast import FaastCallback, FaastModule, FastWeights
from lightning_faast.data import ImageDataModule
from lightning_faast.encoders import VisionEncoder

TITLE = "Fit"
TARGET = Target("at most", 1.03)
_TARGET_ROWS = 5_000
_WEIGHTS = SHARED / "models" / "vit_small_patch14_dinov2.fp16.safetensors"


def run(settings: Settings) -> Section:
    """Measure."""
    per_class = 2 if settings.quick else 26
    batch_size = 10 if settings.quick else 64
    rows = per_class * CLASSES
    encoder, described = _encoder(settings.quick)
    width = encoder.num_features
    with small_images(per_class, generated=settings.quick) as images, quiet():
        data = ImageDataModule(
            images.path,
            test_split=None,
            batch_size=batch_size,
            limit_per_class=per_class,
            data_config=encoder.data_config,
        )
        data.prepare_data()
        data.setup()
        passes: list[dict[str, float]] = []

        def fit() -> None:
            callback = FaastCallback()
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
                callbacks=[callback],
            )
            trainer.fit(FaastModule(encoder, num_classes=CLASSES), datamodule=data)
            assert callback.metrics["faast/rows"] == rows
            passes.append(callback.metrics)

        @torch.no_grad()
        def bare() -> None:
            for batch in data.train_dataloader():
                inputs, _ = data.on_after_batch_transfer(batch, 0)
                encoder(inputs)

        start = time.perf_counter()
        fit()
        cold = time.perf_counter() - start
        cold_start_up = cold - _seconds_of_pass(passes[0])
        passes.clear()
        measured = interleave({"fit": fit, "bare": bare}, settings.runs)
    passes = passes[1:]  # the first is the warm-up
    assert len(passes) == settings.runs

    solve_rows = 200 if settings.quick else _TARGET_ROWS
    solve = _solve_seconds(width, solve_rows, batch_size, settings)
    in_pass = [_seconds_of_pass(p) for p in passes]
    start_up = [whole - own for whole, own in zip(measured["fit"], in_pass, strict=True)]
    forward = [p["faast/seconds_encode"] for p in passes]
    sums = [p["faast/seconds_statistics"] for p in passes]
    grown = _TARGET_ROWS / rows
    estimate = [s + (f + a) * grown + solve for s, f, a in zip(start_up, forward, sums, strict=True)]
    bare_times = samples(measured["bare"])
    peer = "`for batch in loader: encoder(batch)`"
    whole_peer, of_rows = f"{peer}, N {rows}", f"N {rows}"
    section = Section(
        TITLE,
        f"{described}; {images.described}, batches of {batch_size}, no workers, no validation, no logger, no "
        "checkpoint, no progress bar. The same loader and transforms on both sides.",
    )
    section.rows = [
        Row.compare(
            f"`Trainer(…).fit` with `FaastCallback`, {of_rows}",
            samples(measured["fit"]),
            whole_peer,
            bare_times,
            TARGET,
        ),
        Row.compare(
            f"the pass in it (encoder, statistics, solve), {of_rows}",
            samples(in_pass),
            whole_peer,
            bare_times,
            Target(),
        ),
        Row.compare(
            f"*estimate* of `Trainer(…).fit` at N {_TARGET_ROWS:,}",
            samples(estimate),
            f"*estimate*: {_TARGET_ROWS:,}/{rows} times {peer}",
            samples([b * grown for b in measured["bare"]]),
            TARGET,
        ),
    ]
    section.notes = [
        f"Inside `fit`, medians: Trainer start-up and shut-down {samples(start_up)}, encoder and loop "
        f"{samples(forward)}, statistics {samples(sums)}, solve {samples([p['faast/seconds_solve'] for p in passes])}.",
        f"The estimate is not a measurement: start-up, {_TARGET_ROWS:,}/{rows} times (encoder and loop, statistics), "
        f"both as measured at N {rows}, and a solve, {solve:.3f} s, measured at N {solve_rows:,} on synthetic keys of "
        f"the same width, {width}.",
        f"The first `fit` of the process, not counted above, took {cold:.2f} s, {cold_start_up:.2f} s of it outside "
        "its pass.",
    ]
    return section


def _encoder(quick: bool) -> tuple[VisionEncoder, str]:
    if quick:
        name, size = "vit_tiny_patch16_224", 32
        return VisionEncoder(name, pretrained=False, image_size=size), f"{name} at {size} px, random weights"
    name, size = "vit_small_patch14_dinov2.lvd142m", 98
    if _WEIGHTS.is_file():
        encoder = VisionEncoder(name, checkpoint_path=str(_WEIGHTS), image_size=size)
        return encoder, f"DINOv2 ViT-S/14 at {size} px (`../shared/models/{_WEIGHTS.name}`)"
    encoder = VisionEncoder(name, pretrained=False, image_size=size)
    return encoder, f"ViT-S/14 at {size} px, random weights (no `../shared/models/{_WEIGHTS.name}` beside the checkout)"


def _seconds_of_pass(metrics: dict[str, float]) -> float:
    return sum(metrics[f"faast/seconds_{part}"] for part in ("encode", "statistics", "solve"))


def _solve_seconds(width: int, rows: int, batch_size: int, settings: Settings) -> float:
    """A solve with a full reservoir, which the few rows of the measured fit do not fill."""
    generator = torch.Generator().manual_seed(0)
    learner = FastWeights(width, CLASSES)
    for first in range(0, rows, batch_size):
        count = min(batch_size, rows - first)
        labels = torch.arange(first, first + count) % CLASSES
        learner.update(torch.randn(count, width, generator=generator), labels)
    return samples(interleave({"solve": learner.solve}, settings.runs)["solve"]).median
