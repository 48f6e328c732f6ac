"""The same run in every logger, read back from what it wrote."""

import csv
from pathlib import Path

import pytest
import yaml

from lightning_faast.lightning_cli import FaastCLI
from tests.wandb_files import read_run

TINY = [
    "--config", "recipes/quickstart.yaml", "--model.encoder.model_name=test_resnet", "--model.encoder.pretrained=false",
    "--model.encoder.checkpoint_path=null", "--model.encoder.image_size=32", "--data.limit_per_class=8",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip
TEST_METRICS = {"test/accuracy", "test/calibration_error", "test/loss", "test/top5_accuracy"}


def fit(*options):
    """Fit and return the metrics that the run must have logged."""
    metrics = FaastCLI(["fit", *TINY, *options]).trainer.callback_metrics
    assert set(metrics) >= TEST_METRICS
    return {name: float(metrics[name]) for name in TEST_METRICS}


def assert_logged(logged, expected):
    assert {name: logged[name] for name in expected} == {name: pytest.approx(v) for name, v in expected.items()}
    assert any(name.startswith("faast/") for name in logged)


def test_csv(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = fit("--config", "configs/logger/csv.yaml")
    rows = list(csv.DictReader(Path("logs/version_0/metrics.csv").read_text().splitlines()))
    logged = {name: float(value) for row in rows for name, value in row.items() if value}
    assert_logged(logged, expected)
    assert yaml.safe_load(Path("logs/version_0/config.yaml").read_text())["data"]["init_args"]["limit_per_class"] == 8


def test_tensorboard(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    expected = fit("--config", "configs/logger/tensorboard.yaml")
    events = accumulator.EventAccumulator("logs/version_0")
    events.Reload()
    logged = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert_logged(logged, expected)
    assert Path("logs/version_0/config.yaml").is_file()
    assert list(Path("logs/version_0/checkpoints").glob("*.ckpt"))


def test_wandb_runs_of_two_methods_in_one_directory(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    expected = {}
    for readout, method in (("auto", "faast"), ("regression", "faast_regression")):
        metrics = fit("--config", "configs/logger/wandb.yaml", "--config", f"configs/methods/{method}.yaml")
        expected[readout] = (metrics, wandb.run.id)
        wandb.finish()
    assert not Path("config.yaml").exists()  # where Lightning's own callback has the runs overwrite each other

    files = sorted(Path("logs/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    for file in files:
        _, config, summary, history, *_ = read_run(file)
        readout = config["model"]["head"]["init_args"]["readout"]
        metrics, run = expected.pop(readout)
        assert file.stem == f"run-{run}"
        assert config["data"]["init_args"]["limit_per_class"] == 8
        assert config["method"]["class_path"].endswith("FaastCallback")
        assert_logged(summary, metrics)
        assert_logged({name: value for row in history for name, value in row.items()}, metrics)
        folder = Path("logs/lightning-faast") / run
        assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["head"]["init_args"]["readout"] == readout
        assert list((folder / "checkpoints").glob("*.ckpt"))
    assert not expected
