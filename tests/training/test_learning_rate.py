"""The search for a learning rate: the choice, what it leaves alone, and what it refuses."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_faast import FaastModule
from lightning_faast.encoders import Identity
from lightning_faast.training import LearningRateSearch, WarmupCosine, learning_rate
from lightning_faast.training.learning_rate import hold_out_fifth

QUIET = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)


def rows_of(rows=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(3, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % 3
    return TensorDataset(centers[labels] + 0.7 * torch.randn(rows, 6, generator=generator), labels)


class Blobs(LightningDataModule):
    num_classes = 3

    def __init__(self, rows=60, augment=None):
        super().__init__()
        self.rows, self.augment = rows, augment

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(3)
        return DataLoader(rows_of(self.rows), batch_size=8, shuffle=True, generator=generator)


def sgd(lr=1e-3):
    return lambda groups: torch.optim.SGD(groups, lr=lr, momentum=0.9)


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)


def fit(search, lr=1e-3, schedule=None, epochs=4, encoder=None, data=None, **options):
    torch.manual_seed(0)
    module = FaastModule(encoder or Identity(6), nn.Linear, 3, optimizer=sgd(lr), lr_scheduler=schedule)
    callbacks = [] if search is None else [search]
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, **{**QUIET, **options})
    trainer.fit(module, datamodule=data or Blobs())
    return module, trainer


@pytest.mark.parametrize("schedule", [None, step_lr, WarmupCosine(0.25)], ids=["constant", "epochs", "steps"])
def test_each_rate_scores_as_if_it_were_trained_alone(monkeypatch, schedule):
    monkeypatch.setattr(learning_rate, "_ENOUGH_ROWS", 12)  # the first fifth alone
    search = LearningRateSearch(rates=[1e-3, 0.1, 1.0])
    fit(search, schedule=schedule)
    dataset = rows_of()
    held_out = hold_out_fifth(dataset.tensors[1])
    keys = nn.functional.normalize(dataset.tensors[0], dim=-1)
    for rate, accuracy in search.accuracies.items():
        torch.manual_seed(0)
        head = nn.Linear(6, 3)
        optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
        scheduler = (
            None if schedule is None else (schedule(optimizer, 24) if schedule is not step_lr else step_lr(optimizer))
        )
        generator = torch.Generator().manual_seed(0)
        rows = (~held_out).nonzero()[:, 0]
        for _ in range(4):
            for part in rows[torch.randperm(48, generator=generator)].split(8):
                optimizer.zero_grad()
                nn.functional.cross_entropy(head(keys[part]), dataset.tensors[1][part]).backward()
                optimizer.step()
                if isinstance(schedule, WarmupCosine):
                    scheduler.step()
            if schedule is step_lr:
                scheduler.step()
        right = head(keys[held_out]).argmax(-1) == dataset.tensors[1][held_out]
        assert accuracy == pytest.approx(float(right.double().mean()))


class Offset(Blobs):
    """Two directions that differ far less than what they have in common: low rates never tell them apart."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(5)
        labels = torch.arange(300) % 3
        signal = nn.functional.one_hot(labels, 6).float() + 0.3 * torch.randn(300, 6, generator=generator)
        return DataLoader(TensorDataset(signal + 3 * torch.eye(6)[5], labels), batch_size=8)


def test_picks_the_best_rate_and_says_so(caplog):
    with caplog.at_level("INFO"):
        search = LearningRateSearch(rates=[10.0, 1e-4, 1e-3])
        fit(search, data=Offset())
    assert search.rates == [1e-4, 1e-3, 10.0]
    assert search.rate == 10.0
    assert search.accuracies[10.0] > max(search.accuracies[1e-4], search.accuracies[1e-3])
    assert (
        f"Learning rate 10, by the accuracy on 240 held-out of 300 rows: 0.0001 {search.accuracies[1e-4]:.3f}"
        in caplog.text
    )
    assert search.examples_encoded == 300
    assert 0 < search.seconds_encode < search.seconds


def test_a_rate_that_diverges_is_not_picked():
    def explosive(groups):  # weight decay that overshoots: the weights grow without bound at a high rate
        return torch.optim.SGD(groups, lr=1e-3, weight_decay=1.0)

    torch.manual_seed(0)
    module = FaastModule(Identity(6), nn.Linear, 3, optimizer=explosive)
    search = LearningRateSearch(rates=[0.1, 1e30])
    Trainer(accelerator="cpu", max_epochs=4, callbacks=[search], **QUIET).fit(module, datamodule=Blobs())
    assert search.rate == 0.1
    assert module.head.weight.isfinite().all()


def test_of_equal_accuracies_the_lower_loss_decides():
    far = TensorDataset(10 * nn.functional.one_hot(torch.arange(30) % 3, 6).float(), torch.arange(30) % 3)

    class Far(Blobs):
        def train_dataloader(self):
            return DataLoader(far, batch_size=8)

    search = LearningRateSearch(rates=[3.0, 30.0])
    fit(search, data=Far(), epochs=10)
    assert search.accuracies == {3.0: 1.0, 30.0: 1.0}
    assert search.rate == 30.0


@pytest.mark.parametrize("schedule", [None, step_lr, WarmupCosine(0.25)], ids=["constant", "epochs", "steps"])
def test_the_fit_goes_on_as_if_the_rate_had_been_given(schedule):
    search = LearningRateSearch(rates=[0.5])
    found, _ = fit(search, lr=1e-3, schedule=schedule)
    given, _ = fit(None, lr=0.5, schedule=schedule)
    torch.testing.assert_close(found.head.weight, given.head.weight)


def test_the_same_seed_finds_the_same():
    first, second = LearningRateSearch(), LearningRateSearch()
    one, _ = fit(first)
    two, _ = fit(second)
    assert (first.rate, first.accuracies) == (second.rate, second.accuracies)
    assert torch.equal(one.head.weight, two.head.weight)


def test_one_row_a_class_cannot_be_held_out():
    search = LearningRateSearch(rates=[0.1, 1.0, 10.0])
    fit(search, data=Blobs(rows=3))
    assert (search.rate, search.accuracies) == (1.0, {})


def test_a_resumed_fit_keeps_the_rate(tmp_path):
    search = LearningRateSearch(rates=[0.5])
    module, trainer = fit(search, epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = LearningRateSearch(rates=[7.0])
    trainer = Trainer(accelerator="cpu", max_epochs=4, callbacks=[again], **QUIET)
    trainer.fit(module, datamodule=Blobs(), ckpt_path=tmp_path / "half.ckpt")
    assert again.rate is None
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(("counts", "held"), [([5, 5], [1, 1]), ([100, 50], [20, 10]), ([1, 1], [0, 0])])
def test_a_fifth_of_every_class_is_held_out(counts, held):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    mask = hold_out_fifth(labels, seed=1)
    assert labels[mask].bincount(minlength=len(counts)).tolist() == held
    assert torch.equal(mask, hold_out_fifth(labels, seed=1))
    if max(counts) > 20:
        assert not torch.equal(mask, hold_out_fifth(labels, seed=2))


def test_the_fifths_are_disjoint_and_cover_all():
    labels = torch.arange(4).repeat(13)
    folds = torch.stack([hold_out_fifth(labels, fold=fold) for fold in range(5)])
    assert (folds.sum(0) == 1).all()


def test_few_rows_a_class_are_held_out_in_some_classes_and_never_all_of_one():
    labels = torch.arange(10).repeat(2)
    mask = hold_out_fifth(labels)
    assert mask.sum() == 4
    assert labels[mask].bincount().max() == 1


# ------------------------------------------------------------------------------------------------------------- refused


class Trained(nn.Module):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x)


class Foreign(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="the encoder Trained is trained and its keys change"):
        fit(LearningRateSearch(), encoder=Trained())
    with pytest.raises(ValueError, match=r"augmented images differ in every epoch.*--data.augment=null"):
        fit(LearningRateSearch(), data=Blobs(augment={"hflip": 0.5}))
    with pytest.raises(ValueError, match="ReduceLROnPlateau, which waits for a validation metric"):
        fit(LearningRateSearch(), schedule=lambda optimizer: ReduceLROnPlateau(optimizer, monitor="train/loss"))
    with pytest.raises(ValueError, match="needs a number of epochs; got max_epochs=-1"):
        fit(LearningRateSearch(), epochs=-1)
    with pytest.raises(ValueError, match="must be at least one positive learning rate"):
        LearningRateSearch(rates=[0.1, 0.0])
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[LearningRateSearch()], **QUIET)
    with pytest.raises(TypeError, match="the head of a FaastModule, and got a Foreign"):
        trainer.fit(Foreign(), DataLoader(rows_of(), batch_size=8))
