"""FaastCallback against every fact of Lightning it rests on, in projects nobody edited."""

import copy
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_faast import FaastCallback, FastWeights
from lightning_faast.associative import PaperRule, Ridge
from tests import projects
from tests.projects import CLASSES, WIDTH, DictDataset, examples, loader


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


@pytest.fixture
def lightning() -> ModuleType:
    return importlib.import_module("lightning.pytorch")


def trainer_in(tmp_path: Path, pl: ModuleType, *callbacks: Any, **kwargs: Any) -> Any:
    settings = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **kwargs})


def keys_of(module: nn.Module, inputs: Tensor) -> Tensor:
    """What an encoder in eval mode gives, the oracle of every captured key."""
    with torch.no_grad():
        return copy.deepcopy(module).eval()(inputs)


def expected(keys: Tensor, values: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return FastWeights(out_features=CLASSES, **options).fit(keys, values).linear()


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---------------------------------------------------------------------- unedited projects


def test_fits_an_unedited_module(tmp_path: Path, pl: ModuleType) -> None:
    module = projects.plain(pl)()
    before = copy.deepcopy(module.state_dict())
    checkpoint = pl.callbacks.ModelCheckpoint(monitor="val_acc", mode="max")
    trainer = trainer_in(
        tmp_path,
        pl,
        FaastCallback(head="net.fc"),
        pl.callbacks.EarlyStopping("val_loss"),
        pl.callbacks.LearningRateMonitor(),
        checkpoint,
        max_epochs=7,
        gradient_clip_val=1.0,
        accumulate_grad_batches=3,
    )
    trainer.fit(module, loader(), loader(seed=1))

    assert differing(before, module.state_dict()) == {"net.fc.weight", "net.fc.bias"}
    assert not module.seen_in_training_mode
    inputs, labels = examples()
    weight, bias = expected(keys_of(module.net["body"], inputs), labels)
    torch.testing.assert_close(module.net["fc"].weight.data, weight)
    torch.testing.assert_close(module.net["fc"].bias.data, bias)
    assert type(module.net["fc"]) is nn.Linear
    assert trainer.current_epoch == 1
    # The validation of the same epoch saw the solved head.
    val_inputs, val_labels = examples(seed=1)
    with torch.no_grad():
        accuracy = (copy.deepcopy(module).eval()(val_inputs).argmax(-1) == val_labels).float().mean()
    assert trainer.callback_metrics["val_acc"] == pytest.approx(float(accuracy), abs=1e-6)
    assert accuracy > 0.6
    # The checkpoint is an ordinary one.
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    fresh = projects.plain(pl)()
    fresh.load_state_dict(saved["state_dict"])
    assert not differing(module.state_dict(), fresh.state_dict())
    assert saved["global_step"] == 1
    assert not any("statistics" in str(state) for state in saved["callbacks"].values())


def test_everything_is_given_back_and_the_module_fine_tunes(tmp_path: Path, pl: ModuleType) -> None:
    module = projects.plain(pl)()
    module.net["body"][1].eval()  # a frozen BatchNorm of the user's own
    trainer = trainer_in(
        tmp_path, pl, FaastCallback(head="net.fc"), max_epochs=4, max_steps=9, accumulate_grad_batches=2,
        check_val_every_n_epoch=5,
    )  # fmt: skip
    trainer.fit(module, loader())
    assert (trainer.max_epochs, trainer.max_steps, trainer.accumulate_grad_batches) == (4, 9, 2)
    assert trainer.check_val_every_n_epoch == 5
    assert module.automatic_optimization
    assert not {"training_step", "configure_optimizers", "log"} & set(vars(module))
    assert module.training
    assert not module.net["body"][1].training
    solved = copy.deepcopy(module.state_dict())
    trainer_in(tmp_path, pl, max_epochs=1).fit(module, loader())
    assert "net.body.0.weight" in differing(solved, module.state_dict())
    assert module.seen_in_training_mode


@pytest.mark.parametrize("head", [None, "classifier.2"])
def test_dict_batches_head_in_setup_onecycle(
    tmp_path: Path, pl: ModuleType, caplog: pytest.LogCaptureFixture, head: str | None
) -> None:
    module = projects.dict_batches(pl)()
    callback = FaastCallback(head=head)
    train = DataLoader(DictDataset(), batch_size=16, shuffle=True)
    val = DataLoader(DictDataset(seed=1), batch_size=16)
    trainer = trainer_in(
        tmp_path, pl, callback, pl.callbacks.EarlyStopping("val/loss"), pl.callbacks.LearningRateMonitor(),
        gradient_clip_val=0.5, max_epochs=3,
    )  # fmt: skip
    with caplog.at_level("INFO"):
        trainer.fit(module, train, val)
    assert ("the head is 'classifier.2'" in caplog.text) == (head is None)
    inputs, labels = examples()
    weight, _ = expected(keys_of(nn.Sequential(module.encoder, module.classifier[:2]), inputs), labels)
    torch.testing.assert_close(module.classifier[2].weight.data, weight, rtol=1e-3, atol=1e-4)
    assert trainer.callback_metrics["val/accuracy"] > 0.5
    assert not {name for name in trainer.callback_metrics if name.startswith("train/")}


def test_one_logit_through_the_modules_own_metric(tmp_path: Path, pl: ModuleType) -> None:
    inputs, labels = examples(300)
    data = TensorDataset(inputs, (labels == 2).long())
    module = projects.one_logit(pl)()
    trainer = trainer_in(tmp_path, pl, FaastCallback())
    trainer.fit(module, DataLoader(data, batch_size=50), DataLoader(data, batch_size=50))
    keys = keys_of(module.backbone, inputs)
    two = FastWeights(out_features=2).fit(keys, data.tensors[1])
    agreement = (two.predict(keys) == data.tensors[1]).float().mean()
    assert trainer.callback_metrics["val_accuracy"] == pytest.approx(float(agreement), abs=0.01)
    assert agreement > 0.8


def test_multi_hot_soft_and_regression_targets(tmp_path: Path, lightning: ModuleType) -> None:
    inputs, labels = examples(200)
    targets = {
        "multi-hot": (torch.stack([labels == 0, labels != 1, inputs[:, 0] > 0], 1).float(), "discriminant"),
        "soft": (F.one_hot(labels, CLASSES) * 0.7 + 0.1, "regression"),
        "regression": (inputs[:, :CLASSES] * 2 + 1, "regression"),
        "one-hot": (F.one_hot(labels, CLASSES).float(), "discriminant"),
    }
    for name, (values, readout) in targets.items():

        class Net(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.fc = projects.body(), nn.Linear(16, CLASSES)

            def training_step(self, batch: Any) -> Tensor:
                return F.mse_loss(self.fc(self.body(batch[0])), batch[1])

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.Adam(self.parameters())

        module, callback = Net(), FaastCallback(head="fc")
        trainer_in(tmp_path, lightning, callback).fit(module, DataLoader(TensorDataset(inputs, values), batch_size=32))
        assert callback.solution is not None
        assert callback.solution.readout == readout, name
        weight, bias = FastWeights(out_features=CLASSES).fit(keys_of(module.body, inputs), values).linear()
        torch.testing.assert_close(module.fc.weight.data, weight, msg=name)
        torch.testing.assert_close(module.fc.bias.data, bias, msg=name)


def test_leading_dimensions_and_ignore_index(tmp_path: Path, lightning: ModuleType) -> None:
    flat, labels = examples(120)
    inputs, tags = flat.view(30, 4, WIDTH), labels.view(30, 4).clone()
    tags[:, 3] = -100
    module = projects.tokens(lightning)()
    callback = FaastCallback(ignore_index=-100)
    trainer_in(tmp_path, lightning, callback).fit(module, DataLoader(TensorDataset(inputs, tags), batch_size=7))
    kept = tags.flatten() != -100
    weight, _ = expected(keys_of(module.embed, flat).tanh()[kept], labels[kept])
    torch.testing.assert_close(module.tag.weight.data, weight)
    assert callback.metrics["faast/rows"] == 90

    with pytest.raises(ValueError, match=r"label is outside \[0, 3\)"):
        trainer_in(tmp_path, lightning, FaastCallback()).fit(
            projects.tokens(lightning)(), DataLoader(TensorDataset(inputs, tags), batch_size=7)
        )


def test_compiled_encoder(tmp_path: Path, lightning: ModuleType) -> None:
    module = projects.plain(lightning)()
    module.net["body"] = torch.compile(module.net["body"], backend="eager")
    trainer_in(tmp_path, lightning, FaastCallback(head="net.fc")).fit(module, loader())
    inputs, labels = examples()
    weight, _ = expected(keys_of(module.net["body"], inputs), labels)
    torch.testing.assert_close(module.net["fc"].weight.data, weight)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_every_precision(tmp_path: Path, lightning: ModuleType, precision: str) -> None:
    module = projects.plain(lightning)()
    before = copy.deepcopy(module.state_dict())
    callback = FaastCallback(head="net.fc")
    trainer = trainer_in(tmp_path, lightning, callback, precision=precision)
    trainer.fit(module, loader(), loader(seed=1))
    assert trainer.callback_metrics["val_acc"] > 0.6
    assert trainer.checkpoint_callback.best_model_path
    after = {name: value.to(before[name].dtype) for name, value in module.state_dict().items()}
    changed = differing(before, after)
    assert {"net.fc.weight", "net.fc.bias"} <= changed
    if precision != "bf16-true":  # which rounds every parameter
        assert changed == {"net.fc.weight", "net.fc.bias"}


def test_fast_weights_head_is_found_and_solved_in_place(tmp_path: Path, lightning: ModuleType) -> None:
    module = projects.plain(lightning)()
    module.net["fc"] = FastWeights(16, CLASSES, normalize=True)
    callback = FaastCallback()
    trainer = trainer_in(tmp_path, lightning, callback)
    trainer.fit(module, loader(), loader(seed=1))
    inputs, labels = examples()
    alone = FastWeights(normalize=True).fit(keys_of(module.net["body"], inputs), labels)
    torch.testing.assert_close(module.net["fc"].weight, alone.weight)
    assert trainer.callback_metrics["val_acc"] > 0.6
    fresh = projects.plain(lightning)()
    fresh.net["fc"] = FastWeights(normalize=True)
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    fresh.load_state_dict(saved["state_dict"])
    torch.testing.assert_close(fresh.eval()(inputs), copy.deepcopy(module).eval()(inputs))


def test_no_validation_input_is_kept(tmp_path: Path, lightning: ModuleType) -> None:
    callback = FaastCallback(head="net.fc")

    class Watch(lightning.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            assert callback._capture is not None
            assert callback._capture._inputs == []

    trainer_in(tmp_path, lightning, callback, Watch()).fit(projects.plain(lightning)(), loader(), loader(seed=1))


def test_readout_and_regularization_are_used(tmp_path: Path, lightning: ModuleType) -> None:
    inputs, labels = examples()
    for options in ({"regularization": Ridge(3.0), "readout": "regression"}, {"regularization": PaperRule()}):
        module = projects.plain(lightning)()
        trainer_in(tmp_path, lightning, FaastCallback(head="net.fc", **options)).fit(module, loader())
        weight, bias = expected(keys_of(module.net["body"], inputs), labels, **options)
        torch.testing.assert_close(module.net["fc"].weight.data, weight)
        torch.testing.assert_close(module.net["fc"].bias.data, bias)


def test_head_without_bias(tmp_path: Path, lightning: ModuleType) -> None:
    module = projects.plain(lightning)()
    module.net["fc"] = nn.Linear(16, CLASSES, bias=False)
    callback = FaastCallback(head="net.fc")
    trainer_in(tmp_path, lightning, callback).fit(module, loader())
    assert callback.solution is not None
    assert callback.solution.readout == "regression"
    inputs, labels = examples()
    weight, _ = expected(keys_of(module.net["body"], inputs), labels, bias=False)
    torch.testing.assert_close(module.net["fc"].weight.data, weight)


def test_several_epochs_go_on_summing(tmp_path: Path, lightning: ModuleType) -> None:
    module, callback = projects.plain(lightning)(), FaastCallback(head="net.fc", epochs=3)
    trainer = trainer_in(tmp_path, lightning, callback)
    trainer.fit(module, loader(), loader(seed=1))
    assert callback.metrics["faast/rows"] == 360
    assert trainer.current_epoch == 3


def test_a_second_fit_begins_anew(tmp_path: Path, lightning: ModuleType) -> None:
    module, callback = projects.plain(lightning)(), FaastCallback(head="net.fc")
    trainer = trainer_in(tmp_path, lightning, callback)
    for n in (120, 60):
        trainer.fit(module, loader(n))
        assert callback.metrics["faast/rows"] == n


# ---------------------------------------------------------------------- the trainer's settings


@pytest.mark.parametrize(
    "settings",
    [
        {"val_check_interval": 0.5},
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        {"check_val_every_n_epoch": 5},
        {"max_steps": 2},
        {"max_time": {"seconds": 0}},
        {"min_epochs": 3, "max_epochs": 9},
        {"max_epochs": -1},
        {"limit_train_batches": 5},
        {"fast_dev_run": True},
        {"num_sanity_val_steps": 0},
        {"reload_dataloaders_every_n_epochs": 1},
        {"overfit_batches": 4},
        {"val_check_interval": "00:00:00:01"},
    ],
    ids=str,
)
def test_settings_that_would_misplace_the_solve(
    tmp_path: Path, lightning: ModuleType, settings: dict[str, Any]
) -> None:
    class Watch(lightning.Callback):
        validations: list[float] = []  # noqa: RUF012 - one test, one list

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                self.validations.append(float(pl_module.net["fc"].weight.abs().sum()))

    watch, module, callback = Watch(), projects.plain(lightning)(), FaastCallback(head="net.fc")
    Watch.validations = []
    trainer = trainer_in(tmp_path, lightning, watch, callback, **settings)
    trainer.fit(module, loader(), loader(seed=1))
    assert watch.validations == [pytest.approx(float(module.net["fc"].weight.abs().sum()))]
    batches = settings.get("limit_train_batches") or settings.get("overfit_batches") or 8
    rows = 16 if "fast_dev_run" in settings else min(16 * batches, 120)
    assert callback.metrics["faast/rows"] == rows


@pytest.mark.parametrize(
    "schedule", [{"every_n_train_steps": 100}, {"every_n_epochs": 5}, {"every_n_train_steps": 1}, {"save_last": True}]
)
def test_a_checkpoint_is_written_whatever_its_schedule(
    tmp_path: Path, lightning: ModuleType, schedule: dict[str, Any]
) -> None:
    checkpoint = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path / "checkpoints", **schedule)
    module = projects.plain(lightning)()
    trainer_in(tmp_path, lightning, FaastCallback(head="net.fc"), checkpoint).fit(module, loader(), loader(seed=1))
    files = list((tmp_path / "checkpoints").glob("*.ckpt"))
    assert files
    saved = torch.load(files[0], weights_only=True)["state_dict"]
    assert torch.equal(saved["net.fc.weight"], module.net["fc"].weight)


def test_iterable_data_and_an_epoch_cut_short(tmp_path: Path, lightning: ModuleType) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(zip(*examples(), strict=True))

    module, callback = projects.plain(lightning)(), FaastCallback(head="net.fc")
    trainer_in(tmp_path, lightning, callback).fit(module, DataLoader(Stream(), batch_size=16), loader(seed=1))
    assert callback.metrics["faast/rows"] == 120

    class Short(projects.plain(lightning)):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    callback = FaastCallback(head="net.fc")
    trainer_in(tmp_path, lightning, callback).fit(Short(), loader())
    assert callback.metrics["faast/rows"] == 48


# ---------------------------------------------------------------------- what is reported


def test_figures_reach_every_logger_under_the_same_names(
    tmp_path: Path, lightning: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    loggers = [lightning.loggers.CSVLogger(tmp_path), lightning.loggers.TensorBoardLogger(tmp_path)]
    callback = FaastCallback(head="net.fc")
    trainer = trainer_in(tmp_path, lightning, callback, logger=loggers)
    with caplog.at_level("INFO"):
        trainer.fit(projects.plain(lightning)(), loader(), loader(seed=1))
    text = Path(loggers[0].log_dir, "metrics.csv").read_text()
    header = text.splitlines()[0].split(",")
    assert set(callback.metrics) <= set(header)
    assert "val_acc" in header
    assert not [name for name in header if name.startswith("train_loss")]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(loggers[1].log_dir)
    events.Reload()
    assert set(callback.metrics) <= set(events.Tags()["scalars"])
    closing = next(r.getMessage() for r in caplog.records if "leave-one-out" in r.getMessage())
    for part in ("120 of 120 rows, d 16, c 3", "effective rank", "ridge", "s encoder", "s solve", "MB of state on cpu"):
        assert part in closing
    assert callback.metrics["faast/leave_one_out_accuracy"] > 0.6
    assert callback.metrics["faast/seconds_encode"] > 0


def test_progress_bar_shows_rows(tmp_path: Path, lightning: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    bar = lightning.callbacks.TQDMProgressBar(refresh_rate=1)
    trainer = trainer_in(tmp_path, lightning, FaastCallback(head="net.fc"), bar, enable_progress_bar=True)
    trainer.fit(projects.plain(lightning)(), loader())
    output = capsys.readouterr().out
    assert "rows=120," in output
    assert "rows/s=" in output


def test_monitor_of_the_own_estimate(tmp_path: Path, lightning: ModuleType) -> None:
    checkpoint = lightning.callbacks.ModelCheckpoint(monitor="faast/leave_one_out_accuracy", mode="max")
    callback = FaastCallback(head="net.fc")
    trainer_in(tmp_path, lightning, callback, checkpoint).fit(projects.plain(lightning)(), loader(), loader(seed=1))
    assert float(checkpoint.best_model_score) == pytest.approx(callback.metrics["faast/leave_one_out_accuracy"])


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("monitor", ["train_loss", "train_loss_epoch", "train_loss_step"])
def test_monitor_of_a_training_metric_is_refused(tmp_path: Path, lightning: ModuleType, monitor: str) -> None:
    stopping = lightning.callbacks.EarlyStopping(monitor, check_on_train_epoch_end=True)
    with pytest.raises(ValueError, match=f"EarlyStopping monitors '{monitor}'.*unsolved head"):
        trainer_in(tmp_path, lightning, FaastCallback(head="net.fc"), stopping).fit(
            projects.plain(lightning)(), loader(), loader(seed=1)
        )


def _manual(module: Any) -> None:
    module.automatic_optimization = False


def _swap_head(head: nn.Module) -> Any:
    def swap(module: Any) -> None:
        module.net["fc"] = head

    return swap


class ScaledLinear(nn.Linear):
    pass


def _tied(module: Any) -> None:
    module.decoder = nn.Linear(16, CLASSES)
    module.decoder.weight = module.net["fc"].weight


@pytest.mark.parametrize(
    ("edit", "options", "message"),
    [
        (_manual, {}, "manual optimization"),
        (None, {"head": "net.head"}, r"'net.head' is no submodule of Plain.*net.body.0, net.fc"),
        (None, {"head": "net.body"}, "must be exactly torch.nn.Linear"),
        (_swap_head(ScaledLinear(16, CLASSES)), {}, "ScaledLinear; it must be exactly"),
        (_swap_head(nn.utils.parametrizations.weight_norm(nn.Linear(16, CLASSES))), {}, "must be exactly|parametrized"),
        (_tied, {}, "shares its weight with decoder.weight"),
        (_swap_head(FastWeights()), {}, "FastWeights without sizes"),
        (_swap_head(FastWeights(16, CLASSES)), {"readout": "regression"}, r"FastWeights\(readout='regression'\)"),
    ],
)  # fmt: skip
def test_refused_before_the_pass(
    tmp_path: Path, lightning: ModuleType, edit: Any, options: dict[str, Any], message: str
) -> None:
    module = projects.plain(lightning)()
    if edit is not None:
        edit(module)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        trainer_in(tmp_path, lightning, FaastCallback(**{"head": "net.fc", **options})).fit(module, loader())
    assert not differing(before, module.state_dict())
    assert "training_step" not in vars(module)


@pytest.mark.parametrize(
    ("name", "value"),
    [("normalize", True), ("class_embeddings", torch.eye(3)), ("prior_count", 5.0), ("zero_shot", torch.eye(3))],
)
def test_options_that_are_not_linear_are_refused_with_the_line_that_works(name: str, value: Any) -> None:
    line = rf"FastWeights\(in_features, out_features, {name}="
    with pytest.raises(ValueError, match=f"{name}: an nn.Linear head cannot.*{line}"):
        FaastCallback(**{name: value})


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"readout": "ridge"}, {"regularisation": Ridge(1.0)}, {"empty_classes": "drop"}]
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        FaastCallback(**options)


def test_callbacks_that_change_weights_are_refused(tmp_path: Path, pl: ModuleType) -> None:
    others = [
        pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-2),
        pl.callbacks.BackboneFinetuning(),
        pl.callbacks.WeightAveraging(),
    ]
    for other in others:
        with pytest.raises(ValueError, match=f"{type(other).__name__} cannot work beside FaastCallback"):
            trainer_in(tmp_path, pl, FaastCallback(head="net.fc"), other).fit(projects.plain(pl)(), loader())


def test_several_train_loaders_are_refused(tmp_path: Path, lightning: ModuleType) -> None:
    for loaders in ([loader(), loader()], {"a": loader(), "b": loader()}):
        with pytest.raises(ValueError, match="several train loaders"):
            trainer_in(tmp_path, lightning, FaastCallback(head="net.fc")).fit(projects.plain(lightning)(), loaders)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_sharded_strategies_are_refused(lightning: ModuleType, strategy: str) -> None:
    from lightning_faast.distributed import check_strategy

    strategies = lightning.strategies
    instance = strategies.FSDPStrategy() if strategy == "fsdp" else object.__new__(strategies.DeepSpeedStrategy)
    with pytest.raises(ValueError, match=f"does not support {type(instance).__name__}.*Use strategy='auto' or 'ddp'"):
        check_strategy(instance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x.index_fill(0, torch.tensor([40]), float("nan")), y), "Batch 2 .*keys hold NaN"),
        (lambda x, y: (x.index_fill(0, torch.tensor([99]), float("inf")), y), "Batch 6 .*keys hold NaN or infinite"),
        (lambda x, y: (x, y.index_fill(0, torch.tensor([70]), 3)), r"Batch 4 .*label is outside \[0, 3\)"),
        (lambda x, y: (x, y.clamp(max=1)), "1 of 3 classes without a row: 2"),
    ],
)
def test_bad_data_is_refused_naming_the_batch(tmp_path: Path, lightning: ModuleType, change: Any, message: str) -> None:
    class NoLoss(projects.plain(lightning)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # a loss that itself accepts such labels
            return self(batch[0]).sum()

    data = DataLoader(TensorDataset(*change(*examples())), batch_size=16)
    with pytest.raises(ValueError, match=message):
        trainer_in(tmp_path, lightning, FaastCallback(head="net.fc")).fit(NoLoss(), data)


def test_masked_empty_class(tmp_path: Path, lightning: ModuleType) -> None:
    inputs, labels = examples()
    data = DataLoader(TensorDataset(inputs, labels.clamp(max=1)), batch_size=16)
    module = projects.plain(lightning)()
    trainer_in(tmp_path, lightning, FaastCallback(head="net.fc", empty_classes="mask")).fit(module, data)
    probabilities = copy.deepcopy(module).eval()(inputs).softmax(-1)
    assert float(probabilities[:, 2].max()) == 0.0
    assert bool(probabilities.isfinite().all())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (5, "target=5 is not in the batch, which is a list of 2"),
        ("labels", "target='labels' is not in the batch"),
        (lambda batch: batch[1][:-1], "read 16 rows .* but the target has 15"),
        (lambda batch: batch[1].tolist(), "must be a tensor, got list"),
        (lambda batch: batch[1].repeat_interleave(5).view(16, 5), "must have 3 columns.* got 5"),
    ],
)
def test_targets_that_do_not_fit(tmp_path: Path, lightning: ModuleType, target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_in(tmp_path, lightning, FaastCallback(head="net.fc", target=target)).fit(
            projects.plain(lightning)(), loader()
        )


@pytest.mark.parametrize("target", [1, lambda batch: batch[1]])
def test_targets_that_fit(tmp_path: Path, lightning: ModuleType, target: Any) -> None:
    callback = FaastCallback(head="net.fc", target=target)
    trainer_in(tmp_path, lightning, callback).fit(projects.plain(lightning)(), loader())
    assert callback.metrics["faast/rows"] == 120


def test_ambiguous_heads_are_refused(tmp_path: Path, lightning: ModuleType) -> None:
    class Net(lightning.LightningModule):
        def __init__(self, forward: Any) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU())
            self.a, self.b, self.norm = nn.Linear(16, CLASSES), nn.Linear(16, CLASSES), nn.LayerNorm(CLASSES)
            self.act = nn.ReLU()
            self.conv = nn.Conv1d(1, CLASSES, WIDTH)
            self.run = forward

        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.run(self, batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    def parallel(net: Any, x: Tensor) -> Tensor:
        h = net.body(x)
        return net.a(h) + net.b(h)

    cases = [
        (parallel, "'a' and 'b' read the same input"),
        (lambda net, x: net.norm(net.a(net.body(x))), "'a', does not give the output: 'norm' ran after"),
        (lambda net, x: net.act(net.a(net.body(x))), "'a', does not give the output: 'act' ran after"),
        (lambda net, x: net.conv(x[:, None]).squeeze(-1), "No torch.nn.Linear ran"),
    ]
    for forward, message in cases:
        with pytest.raises(ValueError, match=message):
            trainer_in(tmp_path, lightning, FaastCallback()).fit(Net(forward), loader())

    def twice(net: Any, x: Tensor) -> Tensor:
        return net.a(net.body(x)) + net.a(net.body(-x))

    with pytest.raises(RuntimeError, match="ran 2 times in one training_step"):
        trainer_in(tmp_path, lightning, FaastCallback(head="a")).fit(Net(twice), loader())


def test_nothing_to_learn_from_is_an_error(tmp_path: Path, lightning: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="fit ended without a solve"):
        trainer_in(tmp_path, lightning, FaastCallback(head="net.fc"), limit_train_batches=0).fit(
            projects.plain(lightning)(), loader()
        )


def test_an_exception_gives_everything_back(tmp_path: Path, pl: ModuleType) -> None:
    class Failing(projects.plain(pl)):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise ZeroDivisionError

    module = Failing()
    trainer = trainer_in(tmp_path, pl, FaastCallback(head="net.fc"), max_epochs=3, num_sanity_val_steps=0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, loader(), loader(seed=1))
    assert not {"training_step", "configure_optimizers", "log"} & set(vars(module))
    assert module.automatic_optimization
    assert trainer.max_epochs == 3
    assert not module.net["fc"]._forward_pre_hooks


def test_validate_and_test_are_left_alone(tmp_path: Path, lightning: ModuleType) -> None:
    module, callback = projects.plain(lightning)(), FaastCallback(head="net.fc")
    trainer = trainer_in(tmp_path, lightning, callback)
    trainer.fit(module, loader(), loader(seed=1))
    solved = copy.deepcopy(module.state_dict())
    result = trainer.validate(module, loader(seed=1))
    assert not differing(solved, module.state_dict())
    assert result[0]["val_acc"] > 0.6


# ---------------------------------------------------------------------- private names


def test_private_names_of_lightning_still_exist(lightning: ModuleType) -> None:
    trainer = lightning.Trainer(logger=False, accelerator="cpu", barebones=True)
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    assert callable(progress.increment_ready)
    assert callable(progress.increment_completed)
    assert trainer.fit_loop.restarted_mid_epoch is False
    assert hasattr(trainer, "_val_check_time_interval")
    assert callable(lightning.strategies.DDPStrategy.configure_ddp)
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper

    wrapper = DistributedSamplerWrapper(torch.utils.data.SubsetRandomSampler(range(4)), num_replicas=2, rank=0)
    assert isinstance(wrapper.dataset._sampler, torch.utils.data.SubsetRandomSampler)


@pytest.mark.cuda
def test_on_a_gpu_as_on_the_cpu(tmp_path: Path, lightning: ModuleType) -> None:
    weights = []
    for accelerator in ("cpu", "cuda"):
        torch.manual_seed(0)
        module, callback = projects.plain(lightning)(), FaastCallback(head="net.fc")
        trainer = trainer_in(tmp_path, lightning, callback, accelerator=accelerator, devices=1, precision="64-true")
        trainer.fit(module, loader(), loader(seed=1))
        weights.append(module.net["fc"].weight.data.cpu())
        assert callback.metrics["faast/seconds_statistics"] > 0
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-8)
