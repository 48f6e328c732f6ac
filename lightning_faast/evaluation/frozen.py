"""Methods on keys that were encoded once: every method, number of shots and seed in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jsonargparse import Namespace
from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lightning_faast.associative import FastWeights, Learner
from lightning_faast.data.labels import choose_per_class
from lightning_faast.evaluation.keys import Keys, KeyStore, digest_of, fingerprint
from lightning_faast.evaluation.measure import PeakMemory, device_name, microseconds, quality, synchronize
from lightning_faast.evaluation.methods import Method, make
from lightning_faast.evaluation.records import Record, Rows

_BLOCK = 1024  # test rows predicted at once
_OF_DATA = (
    "class_names",
    "labels",
    "fingerprint",
    "ordered_loader",
    "transform_description",
    "on_after_batch_transfer",
)


class _Data(Protocol):
    class_names: list[str]
    transform_description: str

    def prepare_data(self) -> None: ...
    def setup(self, stage: str) -> None: ...
    def labels(self, stage: Any) -> np.ndarray: ...
    def fingerprint(self, stage: Any) -> str: ...
    def ordered_loader(self, stage: Any) -> Any: ...
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any: ...


@dataclass(frozen=True)
class Bench:
    """An encoder and its data, ready for every method.

    Attributes:
        encoder: In eval mode, on its device.
        data: Set up; labelled rows by stage.
        fabric: Device and precision.
        about: What determines its keys, beside the rows.
    """

    encoder: nn.Module
    data: _Data
    fabric: Fabric
    about: dict[str, str]

    @classmethod
    def from_config(cls, config: Namespace) -> Bench:
        """Make encoder and data of a resolved configuration.

        Raises:
            ValueError: For a data module that cannot name its rows.
        """
        fabric = Fabric(
            accelerator=config.trainer.accelerator or "auto", devices=1, precision=config.trainer.precision or 32
        )
        encoder = fabric.setup_module(make(nn.Module, config.model.encoder).eval(), move_to_device=True)
        data = _make_data(config.data, encoder)
        about = {
            "encoder": fingerprint(encoder.module),
            "precision": str(config.trainer.precision or 32),
            "transform": data.transform_description,
        }
        return cls(encoder, data, fabric, about)

    @property
    def device_name(self) -> str:
        """Of the GPU, or ``cpu``."""
        return device_name(self.fabric.device)

    @property
    def summary(self) -> dict[str, str]:
        """What a reader of a report needs to know of it."""
        encoder: Any = self.encoder.module
        name = getattr(encoder, "model_name", None)
        return {
            "encoder": type(encoder).__name__ + (f" {name}" if name else ""),
            "classes": str(len(self.data.class_names)),
        }

    def description(self, stage: str) -> dict[str, str]:
        """What determines the keys of a stage."""
        return {**self.about, "data": self.data.fingerprint(stage), "stage": stage}

    @property
    def identity(self) -> str:
        """Hash of all that determines the keys of both stages."""
        return digest_of({stage: self.description(stage) for stage in ("train", "test")})

    def keys(self, stage: str, store: KeyStore, advance: Callable[[int], None]) -> Keys:
        """Keys of a stage, encoded where the store has none.

        Args:
            stage: ``"train"`` or ``"test"``.
            store: Where keys are kept.
            advance: Told the rows of every batch encoded.
        """
        rows = len(self.data.labels(stage))
        return store.get_or_encode(self.description(stage), rows, lambda: self._encode(stage, advance))

    @torch.no_grad()
    def _encode(self, stage: str, advance: Callable[[int], None]) -> Iterator[tuple[Tensor, Tensor]]:
        waiting: tuple[Tensor, Tensor] | None = None
        for batch in self.data.ordered_loader(stage):
            inputs, labels = self.data.on_after_batch_transfer(self.fabric.to_device(batch), 0)
            keys = self.encoder(inputs)
            if waiting is not None:  # is copied while the device works on the next batch
                yield waiting
            waiting = (keys, labels)
            advance(len(labels))
        if waiting is not None:
            yield waiting
        report = getattr(self.encoder.module, "report_truncation", None)
        if report is not None:  # an encoder of text, which may have cut some
            report()


def _make_data(config: Namespace, encoder: Any) -> _Data:
    config = config.clone()
    options = config.init_args
    for name, value in (("limit_per_class", None), ("shuffle", False), ("augment", None)):
        if name in options:
            options[name] = value
    if "data_config" in options and options.data_config is None:
        options.data_config = getattr(encoder, "data_config", None)
    data: Any = make(LightningDataModule, config)
    data.prepare_data()
    data.setup("fit")
    missing = [name for name in _OF_DATA if not hasattr(data, name)]
    if missing:
        raise ValueError(
            f"A comparison encodes rows once and takes subsets of them, and {type(data).__name__} has no "
            f"{', '.join(missing)}. Use a data module of lightning_faast.data, or add these as it has them."
        )
    return data


@dataclass(frozen=True)
class FrozenRun:
    """A method, a number of shots and a seed, on stored keys.

    Attributes:
        method: What learns.
        shots: Examples a class; None for all.
        seed: Of the choice of examples.
        bench: Encoder and data.
        train: Keys of the training rows.
        test: Keys of the test rows.
    """

    method: Method
    shots: int | None
    seed: int
    bench: Bench
    train: Keys
    test: Keys

    def measure(self) -> tuple[Record, Rows]:
        """Learn, predict every test row, and measure both."""
        device = self.bench.fabric.device
        head = self._make_head().to(device)
        chosen = torch.zeros(0, dtype=torch.int64)
        fit = solve = 0.0
        peak = PeakMemory(device)
        if isinstance(head, Learner) and self.method.config.get("method") is not None:
            chosen = self._choose()
            fit, solve = _learn(head, self.train, chosen, device)
        memory = _together(self.train.peak_memory, peak.growth())
        log_probabilities = predict(head, self.test, device)
        figures, rows = quality(log_probabilities, self.test.labels)
        first = self.test.take(torch.arange(min(256, self.test.rows))).to(device)
        return Record(
            method=self.method.name,
            shots=self.shots,
            seed=self.seed,
            status="done",
            num_classes=log_probabilities.shape[1],
            key_width=self.test.width,
            train_rows=len(chosen),
            test_rows=self.test.rows,
            seconds_encode=self.train.seconds * len(chosen) / self.train.rows,
            seconds_fit=fit,
            seconds_solve=solve,
            examples_encoded=len(chosen),
            peak_memory=memory if len(chosen) else 0,
            bytes_to_predict=head.bytes_to_predict if isinstance(head, Learner) else None,
            bytes_to_update=head.bytes_to_update if isinstance(head, Learner) and len(chosen) else 0,
            microseconds_1=microseconds(head, first, 1),
            microseconds_256=microseconds(head, first, 256),
            parameters=head.num_solved if isinstance(head, Learner) and len(chosen) else 0,
            device=self.bench.device_name,
            details=_details(head) if len(chosen) else {},
            **figures,
        ), rows

    def _make_head(self) -> nn.Module:
        names = self.bench.data.class_names
        if not self.method.embeds_classes:
            return self.method.make_head(self.test.width, len(names))
        embed = getattr(self.bench.encoder, "embed_classes", None)
        if embed is None:
            raise ValueError(
                f"{self.method.name} needs embeddings of class names, and "
                f"{type(self.bench.encoder.module).__name__} has no embed_classes: it needs a CLIP encoder."
            )
        return self.method.make_head(self.test.width, len(names), class_embeddings=embed(names))

    def _choose(self) -> Tensor:
        labels = self.train.labels.numpy()
        if self.shots is None:
            return torch.arange(len(labels))
        chosen, _ = choose_per_class(labels, len(self.bench.data.class_names), self.shots, self.seed)
        return torch.from_numpy(chosen)


def _learn(head: Learner, keys: Keys, chosen: Tensor, device: torch.device) -> tuple[float, float]:
    """Seconds of the updates, reading keys left out, and of the solve."""
    head.reset()
    fit = 0.0
    with torch.no_grad():
        for block, labels in keys.blocks(chosen):
            block, labels = block.to(device), labels.to(device)
            synchronize(device)
            start = time.perf_counter()
            head.update(block, labels)
            synchronize(device)
            fit += time.perf_counter() - start
        start = time.perf_counter()
        head.solve()
        synchronize(device)
    return fit, time.perf_counter() - start


@torch.inference_mode()
def predict(head: nn.Module, keys: Keys, device: torch.device) -> Tensor:
    """Log probabilities [N, c] float32 on the CPU."""
    head.eval()
    parts = []
    for block, _ in keys.blocks(torch.arange(keys.rows), _BLOCK):
        parts.append(head(block.to(device)).float().log_softmax(-1).cpu())
    return torch.cat(parts)


def _together(encoding: int | None, learning: int | None) -> int | None:
    return None if encoding is None or learning is None else encoding + learning


def _details(head: nn.Module) -> dict[str, Any]:
    if not isinstance(head, Learner):
        return {}
    details: dict[str, Any] = dict(head.figures())
    if isinstance(head, FastWeights) and head.solution is not None:
        choice = head.solution.regularization
        if choice.grid is not None and choice.scores is not None:
            order = choice.grid.argsort()  # a search does not go through its values in order
            path = {
                "grid": choice.grid[order].tolist(),
                "scores": choice.scores[order].tolist(),
                "chosen": choice.value,
            }
            details["path"] = {"kind": choice.kind, **path}
    return details
