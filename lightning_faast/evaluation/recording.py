"""A record of a fit and its test, written by the run itself."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_faast.associative import Learner
from lightning_faast.evaluation.measure import PeakMemory, device_name, synchronize
from lightning_faast.evaluation.records import Record, save_record
from lightning_faast.evaluation.watching import watch
from lightning_faast.reporting import Stopwatch


class RecordRun(Callback):
    """Measures a fit and the test that follows it, and writes both to a file of a comparison.

    The clock runs from the start of the fit to its end, whatever the method does in between. Time in the encoder's
    forward and in waiting for data counts as encoding, the time of a learner's solve as solving, the rest as fitting.

    Args:
        path: The JSON file; what was said of each test row goes beside it.
        method: Name of the method in the record.
        shots: Examples a class, or tokens learned; None for all.
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
        self._watch = watch(pl_module)
        self._handles = [
            self._watch.encoder.register_forward_pre_hook(lambda *_: self._encoder_watch.__enter__()),
            self._watch.encoder.register_forward_hook(self._after_encoder, with_kwargs=True),
        ]
        self._peak = PeakMemory(device)
        self._start = time.perf_counter()

    def _after_encoder(self, _: nn.Module, args: Any, inputs: dict[str, Any], output: Any) -> None:
        self._encoder_watch.__exit__()
        self._encoded += self._watch.encoded(inputs, output)

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
            "train_rows": self._watch.train_rows(trainer),
            "details": {"epochs": trainer.current_epoch, **_learned(pl_module)},
        }

    # ------------------------------------------------------------------ the test

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch what the module says of each row."""
        self._watch = watch(pl_module)
        self._handles = self._watch.start_test()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch a batch."""
        self._watch.before_test_batch()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        """Keep what was said of a batch."""
        self._watch.after_test_batch(outputs, batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record."""
        self._remove_hooks()
        measured, rows = self._watch.result()
        record = Record(
            method=self.method,
            shots=self.shots,
            seed=self.seed,
            status="done",
            command=shlex.join([Path(sys.executable).name, "-m", "lightning_faast", *sys.argv[1:]]),
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


def _learned(module: LightningModule) -> dict[str, float]:
    """Figures of what was solved; none of what was not."""
    head = module.head
    return head.figures() if isinstance(head, Learner) and head.rows else {}
