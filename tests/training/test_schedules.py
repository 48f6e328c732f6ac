"""The schedule's values, alone and in a fit."""

import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_faast import FaastModule
from lightning_faast.encoders import Identity
from lightning_faast.training import WarmupCosine


def rates(warmup, steps, groups=(1.0,)):
    parameters = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in groups]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    scheduler = WarmupCosine(warmup)(optimizer, steps)
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


def test_values_by_hand():
    seen = [rate for (rate,) in rates(0.25, 8)]
    assert seen[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert seen[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])


def test_without_warm_up_it_starts_at_the_top():
    assert rates(0.0, 4)[0] == [1.0]


def test_groups_keep_their_ratios():
    assert all(low == pytest.approx(0.1 * high) for high, low in rates(0.2, 10, groups=(1.0, 0.1)))


@pytest.mark.parametrize("warmup", [-0.1, 1.0])
def test_warmup_out_of_range(warmup):
    with pytest.raises(ValueError, match=f"warmup={warmup} must be"):
        WarmupCosine(warmup)


def test_training_without_an_end_is_refused():
    with pytest.raises(ValueError, match="a schedule over inf steps: training must have an end"):
        WarmupCosine()(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), math.inf)


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_covers_the_whole_schedule(accumulate):
    witness = Rates()
    module = FaastModule(
        Identity(4),
        nn.Linear,
        num_classes=2,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5),
        lr_scheduler=WarmupCosine(0.25),
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[witness],
        accumulate_grad_batches=accumulate,
        **dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False),
    )
    rows = TensorDataset(torch.randn(16, 4), torch.arange(16) % 2)
    trainer.fit(module, DataLoader(rows, batch_size=4))
    expected = [0.5 * rate for (rate,) in rates(0.25, 8 // accumulate)]
    assert witness.seen[::accumulate] == pytest.approx(expected)
