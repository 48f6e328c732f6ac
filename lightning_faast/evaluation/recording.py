"""A record of a fit and its test, written by the run itself."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_faast.associative import Learner
from lightning_faast.evaluation.measure import PeakMemory, device_name, microseconds, quality, synchronize
from lightning_faast.evaluation.records import Record, save_record
from lightning_faast.reporting import Stopwatch

_TIMED_KEYS = 256


class RecordRun(Callback):
    """Measures a fit and the test that follows it, and writes both to a file of a comparison.

    The clock runs from the start of the fit to its end, whatever the method does in between. Time in the encoder's
    forward and in waiting for data counts as encoding, the time of a learner's solve as solving, the rest as fitting.

    Args:
        path: The JSON file; what was said of each test row goes beside it.
        method: Name of the method in the record.
        shots: Examples a class; None for all.
        seed: Of the choice of examples.

    Example::

        trainer = Trainer(callbacks=[RecordRun("runs/probe.json", method="linear_probe")], max_epochs=20)
    """

    def __init__(self, path: str, method: str, shots: int | None = None, seed: int = 0) -> None:
        self.path = Path(path)
        self.method = method
        self.shots = shots
        self.seed = seed
        self._handles: list[Any] = []
        self._figures: dict[str, Any] = {}

    # ------------------------------------------------------------------ the fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse several processes, each of which would see a part of the test rows."""
        if trainer.world_size > 1:
            raise ValueError(
                f"RecordRun measures one process, and there are {trainer.world_size}. Use --trainer.devices=1."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and watch the encoder."""
        device = pl_module.device
        self._encoder_watch, self._loading = Stopwatch(device), 0.0
        self._encoded, self._last_end = 0, time.perf_counter()
        encoder = _encoder(pl_module)
        self._handles = [
            encoder.register_forward_pre_hook(lambda *_: self._encoder_watch.__enter__()),
            encoder.register_forward_hook(self._after_encoder),
        ]
        self._peak = PeakMemory(device)
        self._start = time.perf_counter()

    def _after_encoder(self, _: nn.Module, args: Any, output: Tensor) -> None:
        self._encoder_watch.__exit__()
        self._encoded += len(output)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Waiting for data ends."""
        self._loading += time.perf_counter() - self._last_end

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Waiting for data starts."""
        self._last_end = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What happened since the last batch was not waiting for data."""
        self._last_end = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        synchronize(pl_module.device)
        total = time.perf_counter() - self._start
        self._remove_hooks()
        encode = self._encoder_watch.seconds() + self._loading
        solve = float(trainer.callback_metrics.get("faast/seconds_solve", 0.0))
        self._figures = {
            "seconds_encode": encode,
            "seconds_solve": solve,
            "seconds_fit": max(0.0, total - encode - solve),
            "examples_encoded": self._encoded,
            "peak_memory": self._peak.growth(),
            **_sizes(trainer, pl_module),
            "train_rows": _train_rows(trainer),
            "details": {"epochs": trainer.current_epoch},
        }

    # ------------------------------------------------------------------ the test

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch what the module says of each row, and the keys of the first."""
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._keys: Tensor | None = None
        self._handles = [
            pl_module.register_forward_hook(self._after_module),
            _encoder(pl_module).register_forward_hook(self._keep_keys),
        ]

    def _after_module(self, _: nn.Module, args: Any, output: Tensor) -> None:
        self._logits.append(output.float())

    def _keep_keys(self, _: nn.Module, args: Any, output: Tensor) -> None:
        if self._keys is None or len(self._keys) < _TIMED_KEYS:
            new = output.detach()
            self._keys = new if self._keys is None else torch.cat([self._keys, new])

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        """Keep the labels."""
        self._labels.append(batch[1])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record."""
        self._remove_hooks()
        logits, labels = torch.cat(self._logits), torch.cat(self._labels).long()
        measured, rows = quality(logits.log_softmax(-1), labels)
        assert self._keys is not None
        head: Any = pl_module.head
        record = Record(
            method=self.method,
            shots=self.shots,
            seed=self.seed,
            status="done",
            command=shlex.join([Path(sys.executable).name, "-m", "lightning_faast", *sys.argv[1:]]),
            num_classes=logits.shape[1],
            key_width=self._keys.shape[1],
            test_rows=len(labels),
            microseconds_1=microseconds(head, self._keys, 1),
            microseconds_256=microseconds(head, self._keys, 256),
            device=device_name(pl_module.device),
            **measured,
            **self._figures,
        )
        save_record(record, rows, self.path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _encoder(module: LightningModule) -> nn.Module:
    encoder = getattr(module, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"RecordRun needs a module with an encoder and a head, and {type(module).__name__} has none.")
    return encoder


def _train_rows(trainer: Trainer) -> int:
    try:
        return len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
    except (AttributeError, TypeError):  # max_epochs=0: no loader was made
        return 0


def _sizes(trainer: Trainer, module: LightningModule) -> dict[str, int]:
    """Bytes and numbers of what was learnt, beside the frozen encoder."""
    head = module.head
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    held = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    if isinstance(head, Learner):
        return {
            "bytes_to_predict": head.bytes_to_predict + held,
            "bytes_to_update": head.bytes_to_update + held,
            "parameters": head.num_solved,
        }
    moments = [
        value
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return {
        "bytes_to_predict": held,
        "bytes_to_update": held + sum(value.numel() * value.element_size() for value in moments),
        "parameters": sum(parameter.numel() for parameter in trained),
    }
