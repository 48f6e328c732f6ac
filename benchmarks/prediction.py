"""Predicting with a solved layer against ``nn.Linear`` of the same shape and weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Row, Section, Settings, Target, interleave, quiet, samples
from lightning_faast import FaastCallback
from lightning_faast.associative import FastWeights

TITLE = "Prediction"
TARGET = Target("at most", 1.05)


def run(settings: Settings) -> Section:
    """Measure."""
    widths, outputs = ((16,), (3,)) if settings.quick else ((384, 768), (10, 151))
    section = Section(
        TITLE,
        "A fitted `FastWeights().eval()` called on float32 keys, against an `nn.Linear` with the very same weight and "
        "bias, both under `torch.inference_mode()`. Many calls inside one timing; times are of one call. Each is "
        "short: three times the runs.",
    )
    for width, columns in itertools.product(widths, outputs):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(4 * columns) % columns
        fast = FastWeights(width, columns).fit(torch.randn(len(labels), width, generator=generator), labels).eval()
        plain = nn.Linear(width, columns).eval()
        weight, bias = fast.linear()
        with torch.no_grad():
            plain.weight.copy_(weight)
            plain.bias.copy_(bias)
        for batch in (1, 256):
            keys = torch.randn(batch, width, generator=generator)
            calls = 20 if settings.quick else 20_000 if batch == 1 else 1_000
            subjects = {"fast": _calling(fast, keys, calls), "plain": _calling(plain, keys, calls)}
            with torch.inference_mode():
                assert torch.equal(fast(keys), plain(keys))
                measured = interleave(subjects, 3 * settings.runs)
            section.rows.append(
                Row.compare(
                    f"`FastWeights`, batch {batch}, d {width}, c {columns}",
                    samples([t / calls for t in measured["fast"]]),
                    "`nn.Linear`",
                    samples([t / calls for t in measured["plain"]]),
                    TARGET,
                )
            )
    if _solved_head_is_linear():
        section.notes.append(
            "A head that `FaastCallback` solves in a user's own module stays that module's `nn.Linear`, the very "
            "object (checked in this run): its predictions are the peer's, and the ratio is 1 by construction."
        )
    return section


def _calling(layer: nn.Module, keys: Tensor, calls: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(calls):
            layer(keys)

    return call


class _Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.fc = nn.Linear(16, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.fc(self.body(batch[0]).relu()), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def _solved_head_is_linear() -> bool:
    net = _Net()
    head, before = net.fc, net.fc.weight.clone()
    inputs = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=50)
    with quiet():
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[FaastCallback(head="fc")],
        )
        trainer.fit(net, loader)
    return net.fc is head and type(head) is nn.Linear and not torch.equal(head.weight, before)
