"""Every method on texts, through fit and compare, with tiny models."""

import logging
import os

import pytest
from rich.console import Console

pytest.importorskip("transformers")

from lightning_faast.evaluation.compare import Comparer
from lightning_faast.evaluation.keys import KeyStore
from lightning_faast.evaluation.methods import shipped_methods
from lightning_faast.lightning_cli import FaastCLI
from lightning_faast.training import AugmentImages, FullFinetuning, Lora
from tests.text_models import make_bert, make_llama, write_reviews

RECIPE = "recipes/sst2_minilm.yaml"
TRAINED = ("full_finetuning", "linear_probe", "linear_probe_tuned", "lora")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"bert": make_bert(root / "bert"), "llama": make_llama(root / "llama")}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return write_reviews(tmp_path_factory.mktemp("data") / "reviews")


def options(reviews, model):
    return [
        f"--data.path={reviews}",
        f"--model.encoder.model_name={model}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_model_summary=false",
    ]


@pytest.mark.parametrize("model", ["bert", "llama"])
@pytest.mark.parametrize("method", TRAINED)
def test_training_runs(tmp_path, monkeypatch, caplog, models, reviews, method, model):
    monkeypatch.chdir(tmp_path)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"]
    overlay = ["--config", f"configs/methods/{method}.yaml"]
    with caplog.at_level(logging.INFO):
        cli = FaastCLI(["fit", "--config", RECIPE, *overlay, *options(reviews, models[model]), *quiet])
    assert 0 <= cli.trainer.callback_metrics["test/accuracy"] <= 1
    assert cli.trainer.global_step == 2  # 24 rows in batches of 16
    adapter = {"full_finetuning": FullFinetuning, "lora": Lora}.get(method)
    assert adapter is None or isinstance(cli.model.adapter, adapter)
    if method == "full_finetuning":
        assert any(isinstance(callback, AugmentImages) for callback in cli.trainer.callbacks)
        assert "No augmentation: TextDataModule has no images" in caplog.text


def test_zero_shot_is_refused(reviews, models):
    overlay = ["--config", "configs/methods/zero_shot.yaml"]
    with pytest.raises(ValueError, match="TextEncoder has no embed_classes"):
        FaastCLI(["fit", "--config", RECIPE, *overlay, *options(reviews, models["bert"])])


def test_every_one_pass_method_in_a_comparison(tmp_path, reviews, models):
    methods = [method for method in shipped_methods(RECIPE) if method not in TRAINED]
    quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    given = (RECIPE, methods, [4, None], 1, tmp_path / "out", options(reviews, models["bert"]))
    records = Comparer(*given, store=KeyStore(tmp_path / "keys"), console=quiet).run()
    assert {record.method for record in records} == set(methods)
    for record in records:
        expected = "refused" if record.method == "zero_shot" else "done"
        assert record.status == expected, (record.method, record.reason)
    assert "no embed_classes" in next(record.reason for record in records if record.status == "refused")
