"""FaastModule: the head and when it is built, backpropagation, frozen parts, metrics, checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_faast import FaastCallback, FaastModule, FastWeights
from lightning_faast.training import Adapter

WIDTH = 8


class Encoder(nn.Module):
    """With everything that moves in train mode: weights, BatchNorm statistics, dropout."""

    num_features = WIDTH

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.3))

    def forward(self, x):
        return self.net(x)


def make_encoder(frozen=True):
    torch.manual_seed(0)
    return Encoder().requires_grad_(not frozen)


def blobs(num_classes, rows, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_classes, 5, generator=torch.Generator().manual_seed(99)) * 2
    labels = torch.arange(rows) % num_classes
    return TensorDataset(centers[labels] + spread * torch.randn(rows, 5, generator=generator), labels)


class Blobs(LightningDataModule):
    def __init__(self, num_classes=3, rows=120, val=True):
        super().__init__()
        self.classes, self.rows, self.val = num_classes, rows, val
        self.num_classes = None

    def setup(self, stage):
        self.num_classes = self.classes

    def train_dataloader(self):
        return DataLoader(blobs(self.classes, self.rows), batch_size=32)

    def val_dataloader(self):
        return DataLoader(blobs(self.classes, 103, seed=1), batch_size=32) if self.val else []

    def test_dataloader(self):
        return DataLoader(blobs(self.classes, 103, seed=1), batch_size=32)

    predict_dataloader = test_dataloader


def make_trainer(tmp_path, **options):
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **options},
    )


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal_states(before, after):
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), f"{name} changed"


# ---------------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize(
    "head",
    [nn.Linear, lambda d, c: nn.Linear(d, c), nn.Linear(WIDTH, 3), FastWeights, FastWeights(WIDTH, 3)],
    ids=["class", "function", "instance", "FastWeights class", "FastWeights instance"],
)
def test_head_is_built_in_setup_from_the_datamodule(tmp_path, head):
    module = FaastModule(make_encoder(), head)
    trainer = make_trainer(tmp_path, callbacks=[FaastCallback()], enable_checkpointing=False)
    trainer.fit(module, datamodule=Blobs())
    assert module.num_classes == 3
    assert module(torch.zeros(2, 5)).shape == (2, 3)
    if isinstance(head, nn.Module):
        assert module.head is head


def test_head_is_built_at_once_where_the_number_of_classes_is_given():
    module = FaastModule(make_encoder(), nn.Linear, num_classes=4)
    assert (module.head.in_features, module.head.out_features) == (WIDTH, 4)


def test_number_of_classes_of_a_head_given_as_a_module():
    assert FaastModule(make_encoder(), nn.Linear(WIDTH, 7)).num_classes == 7


def test_setup_keeps_a_head_that_is_there(tmp_path):
    module = FaastModule(make_encoder(), nn.Linear)
    make_trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, datamodule=Blobs())
    head, before = module.head, state(module)
    make_trainer(tmp_path).test(module, datamodule=Blobs(), verbose=False)
    assert module.head is head
    assert_equal_states(before, state(module))


def test_refuses_an_encoder_without_num_features():
    with pytest.raises(TypeError, match=r"Sequential has num_features=None; expected an int.*Set encoder.num_features"):
        FaastModule(nn.Sequential(nn.Linear(5, 8)))


def test_refuses_a_head_that_builds_no_module():
    with pytest.raises(TypeError, match=r"head returned a tuple; expected an nn.Module"):
        FaastModule(make_encoder(), lambda d, c: (d, c), num_classes=3)


def test_refuses_a_head_of_another_number_of_classes(tmp_path):
    with pytest.raises(ValueError, match=r"out_features=7 and the data 3 classes"):
        FaastModule(make_encoder(), nn.Linear(WIDTH, 7), num_classes=3)


def test_refuses_a_single_class():
    with pytest.raises(ValueError, match=r"num_classes=1; expected at least 2"):
        FaastModule(make_encoder(), num_classes=1)


def test_says_how_to_give_the_number_of_classes(tmp_path):
    loader = DataLoader(blobs(3, 30), batch_size=10)
    with pytest.raises(ValueError, match=r"there is no datamodule. Pass FaastModule\(num_classes=…\)"):
        make_trainer(tmp_path).test(FaastModule(make_encoder(), nn.Linear), loader)

    class Silent(Blobs):
        def setup(self, stage):
            pass

    with pytest.raises(ValueError, match=r"Silent.num_classes is None"):
        make_trainer(tmp_path).test(FaastModule(make_encoder(), nn.Linear), datamodule=Silent())


def test_forward_before_the_head_exists():
    with pytest.raises(RuntimeError, match="no head yet"):
        FaastModule(make_encoder(), nn.Linear)(torch.zeros(1, 5))


# --------------------------------------------------------------------------------------------------- backpropagation


def test_linear_probe_moves_the_head_alone(tmp_path):
    module = FaastModule(make_encoder(), nn.Linear, num_classes=3, optimizer=lambda p: torch.optim.AdamW(p, lr=0.05))
    encoder, head = state(module.encoder), state(module.head)
    trainer = make_trainer(tmp_path, max_epochs=8, enable_checkpointing=False)
    trainer.fit(module, datamodule=Blobs())
    assert_equal_states(encoder, state(module.encoder))  # BatchNorm statistics too
    assert not torch.equal(head["weight"], module.head.weight)
    assert trainer.global_step == 8 * 4
    assert trainer.callback_metrics["val/accuracy"] > 0.75  # chance is 0.33
    assert "train/loss" in trainer.callback_metrics


def test_fine_tuning_moves_the_encoder(tmp_path):
    module = FaastModule(make_encoder(frozen=False), nn.Linear, num_classes=3)
    before = state(module.encoder)
    make_trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, datamodule=Blobs())
    after = state(module.encoder)
    assert all(not torch.equal(before[name], after[name]) for name in before)  # BatchNorm statistics too


def test_a_frozen_encoder_stays_in_eval_mode_and_an_unfrozen_one_does_not():
    frozen = FaastModule(make_encoder(), nn.Linear, num_classes=3)
    assert not any(part.training for part in frozen.encoder.modules())
    frozen.train()
    assert frozen.head.training
    assert not any(part.training for part in frozen.encoder.modules())
    unfrozen = FaastModule(make_encoder(frozen=False), nn.Linear, num_classes=3)
    assert all(part.training for part in unfrozen.encoder.modules())
    assert not unfrozen.eval().encoder.training


def test_nothing_to_optimize_says_what_to_do(tmp_path):
    module = FaastModule(make_encoder(), FastWeights, num_classes=3)
    with pytest.raises(
        RuntimeError, match=r"nothing to optimize: .*Encoder.*FastWeights.*FaastCallback\(\).*torch.nn.Linear"
    ):
        make_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(module, datamodule=Blobs())


@pytest.mark.parametrize("head", [FastWeights, nn.Linear])
def test_a_fit_of_no_epochs_trains_nothing(tmp_path, head):
    module = FaastModule(make_encoder(frozen=False), head, num_classes=3)
    before = state(module)
    trainer = make_trainer(tmp_path, max_epochs=0)
    trainer.fit(module, datamodule=Blobs())
    assert not any(optimizer.param_groups for optimizer in trainer.optimizers)
    assert trainer.global_step == 0
    assert_equal_states(before, state(module))


def test_a_frozen_part_of_an_encoder_that_trains_stays_as_it_is(tmp_path):
    encoder = make_encoder(frozen=False)
    encoder.net[1].requires_grad_(False)
    module = FaastModule(encoder, nn.Linear, num_classes=3)
    before = state(encoder.net[1])
    assert not encoder.net[1].training
    assert encoder.net[3].training  # dropout has nothing that could be frozen
    make_trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, datamodule=Blobs())
    assert_equal_states(before, state(encoder.net[1]))


class SlowEncoder(Adapter):
    """Gives the encoder a tenth of the rate."""

    def parameter_groups(self, encoder):
        return [group | {"lr_scale": 0.1, "momentum": 0.5} for group in super().parameter_groups(encoder)]


def test_the_adapters_groups_reach_optimizer_and_schedule(tmp_path):
    module = FaastModule(
        make_encoder(frozen=False),
        nn.Linear,
        num_classes=3,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
        adapter=SlowEncoder(),
    )
    trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, datamodule=Blobs())
    groups = trainer.optimizers[0].param_groups
    assert [(group["lr"], group["momentum"]) for group in groups] == [(pytest.approx(0.05), 0.5), (0.5, 0)]
    assert [len(group["params"]) for group in groups] == [4, 2]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1),
        lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/accuracy", mode="min", patience=0, factor=0.1),
    ],
    ids=["StepLR", "ReduceLROnPlateau"],
)
def test_scheduler_steps_once_an_epoch(tmp_path, scheduler):
    module = FaastModule(
        make_encoder(), nn.Linear, 3, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3), lr_scheduler=scheduler
    )
    trainer = make_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(module, datamodule=Blobs())
    expected = 1e-3 * (
        0.01 if isinstance(trainer.lr_scheduler_configs[0].scheduler, torch.optim.lr_scheduler.StepLR) else 0.1
    )
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)


# ----------------------------------------------------------------------------------------------------------- metrics


class Scaled(nn.Module):
    """Hands its input on, so that a test chooses the logits."""

    num_features = 10

    def forward(self, x):
        return x


def evaluate(tmp_path, logits, labels, batch_size, precision="32-true"):
    module = FaastModule(Scaled(), nn.Identity(), num_classes=logits.shape[1])
    trainer = make_trainer(tmp_path, precision=precision)
    (metrics,) = trainer.test(module, DataLoader(TensorDataset(logits, labels), batch_size=batch_size), verbose=False)
    (validation,) = trainer.validate(
        module, DataLoader(TensorDataset(logits, labels), batch_size=batch_size), verbose=False
    )
    assert {name.removeprefix("val/"): v for name, v in validation.items()} == {
        name.removeprefix("test/"): v for name, v in metrics.items()
    }
    return metrics


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("batch_size", [1, 32, 103])  # 103 rows: the last batch is smaller
def test_metrics_by_hand(tmp_path, batch_size, precision):
    generator = torch.Generator().manual_seed(0)
    logits, labels = 2 * torch.randn(103, 10, generator=generator), torch.arange(103) % 10
    logits[torch.arange(103), labels] += 1.5
    metrics = evaluate(tmp_path, logits, labels, batch_size, precision)

    probabilities = logits.double().softmax(-1)
    confidence, predicted = probabilities.max(-1)
    right = (predicted == labels).double()
    bins = (confidence * 15).long().clamp(max=14)
    error = sum(abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(15)) / 103
    top5 = (logits.topk(5).indices == labels[:, None]).any(-1).double().mean()
    assert metrics == {
        "test/loss": pytest.approx(float(F.cross_entropy(logits.double(), labels)), abs=1e-5),
        "test/accuracy": pytest.approx(float(right.mean()), abs=1e-6),
        "test/top5_accuracy": pytest.approx(float(top5), abs=1e-6),
        "test/calibration_error": pytest.approx(float(error), abs=1e-5),
    }


def test_logits_between_zero_and_one_are_not_taken_for_probabilities(tmp_path):
    logits = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    metrics = evaluate(tmp_path, logits, torch.tensor([0, 1]), batch_size=2)
    confidence = logits.softmax(-1).max(-1).values
    assert metrics["test/calibration_error"] == pytest.approx(float((1 - confidence).mean()), abs=1e-6)


def test_top5_stays_apart_from_top1_after_a_first_batch_that_is_all_right(tmp_path):
    logits, labels = torch.zeros(20, 10), torch.zeros(20, dtype=torch.long)
    logits[:10, 0] = 1.0  # the first batch: right in both
    logits[10:, 9], logits[10:, 0] = 2.0, 1.0  # the second: second best
    metrics = evaluate(tmp_path, logits, labels, batch_size=10)
    assert metrics["test/accuracy"] == pytest.approx(0.5)
    assert metrics["test/top5_accuracy"] == pytest.approx(1.0)


@pytest.mark.parametrize(("num_classes", "expected"), [(2, False), (5, False), (6, True)])
def test_top5_needs_more_than_five_classes(tmp_path, num_classes, expected):
    metrics = evaluate(tmp_path, torch.randn(12, num_classes), torch.arange(12) % num_classes, batch_size=5)
    assert ("test/top5_accuracy" in metrics) is expected


def test_predict_step_returns_labels_and_probabilities(tmp_path):
    module = FaastModule(make_encoder(), nn.Linear, num_classes=3)
    batches = make_trainer(tmp_path).predict(module, DataLoader(blobs(3, 10), batch_size=4))
    assert [set(batch) for batch in batches] == [{"label", "probabilities"}] * 3
    x, labels = blobs(3, 10).tensors
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), labels)
    with torch.no_grad():
        expected = module(x).softmax(-1)
    torch.testing.assert_close(torch.cat([batch["probabilities"] for batch in batches]), expected)


# ------------------------------------------------------------------------------------------- one pass and checkpoints


@pytest.mark.parametrize("head", [nn.Linear, FastWeights])
def test_one_pass_agrees_with_the_estimator(tmp_path, head):
    encoder = make_encoder()
    module = FaastModule(encoder, head)
    before = state(encoder)
    trainer = make_trainer(tmp_path, callbacks=[FaastCallback()])
    trainer.fit(module, datamodule=Blobs())
    assert_equal_states(before, state(encoder))
    keys, labels = blobs(3, 120).tensors
    test, expected = blobs(3, 103, seed=1).tensors
    with torch.no_grad():
        estimator = FastWeights().fit(encoder(keys), labels)
        assert trainer.callback_metrics["val/accuracy"] == pytest.approx(estimator.score(encoder(test), expected))


@pytest.mark.parametrize("head", [nn.Linear, FastWeights])
def test_checkpoint_loads_with_the_encoder_passed(tmp_path, head):
    module = FaastModule(make_encoder(), head)
    trainer = make_trainer(tmp_path, callbacks=[FaastCallback()])
    trainer.fit(module, datamodule=Blobs())
    path = trainer.checkpoint_callback.best_model_path
    assert path
    loaded = FaastModule.load_from_checkpoint(path, encoder=Encoder().requires_grad_(False), head=head)
    assert loaded.num_classes == 3
    x = blobs(3, 20, seed=2).tensors[0]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert not torch.load(path, weights_only=True).get("hyper_parameters")


def test_checkpoint_of_another_number_of_classes_is_refused(tmp_path):
    module = FaastModule(make_encoder(), nn.Linear)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, datamodule=Blobs())
    with pytest.raises(ValueError, match="written for 3 classes and this module has 4"):
        trainer.test(
            FaastModule(make_encoder(), nn.Linear),
            datamodule=Blobs(num_classes=4),
            ckpt_path=trainer.checkpoint_callback.best_model_path,
        )
