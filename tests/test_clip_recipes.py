"""The CLIP recipes and the zero-shot overlay: end to end with a tiny random CLIP, and against the golden vectors."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_faast import FastWeights
from lightning_faast.lightning_cli import FaastCLI
from tests.clip_models import make_open_clip

pytest.importorskip("open_clip")

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
GOLDEN = SHARED / "golden" / "vision_readers.safetensors"
RECIPES = {
    "recipes/clip_cifar.yaml": SHARED / "data/cifar10-small",
    "recipes/clip_miniimagenet.yaml": SHARED / "data/mini-imagenet",
}
PRIOR_COUNTS = {"recipes/clip_cifar.yaml": 400.0, "recipes/clip_miniimagenet.yaml": 800.0}
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_open_clip(tmp_path_factory.mktemp("clip"), seed=5)


@pytest.fixture(params=RECIPES)
def recipe(request):
    if not RECIPES[request.param].is_dir():
        pytest.skip(f"no {RECIPES[request.param]}")
    return request.param


def options(recipe, clip):
    return [
        f"--model.encoder.model_name=open_clip:local-dir:{clip}",
        f"--data.path={RECIPES[recipe]}",
        "--data.limit_per_class=4",
        "--trainer.limit_test_batches=2",
        *QUIET,
    ]


def overlay(method):
    return [] if method is None else ["--config", f"configs/methods/{method}.yaml"]


def resolved(capsys, *args):
    """The configuration that a command line amounts to."""
    with pytest.raises(SystemExit) as stopped:
        FaastCLI(["fit", *args, "--print_config"])
    captured = capsys.readouterr()
    assert stopped.value.code in (0, None), captured.err
    return yaml.safe_load(captured.out)


@pytest.mark.parametrize("method", [None, "faast", "faast_paper", "faast_regression"])
def test_recipe_blends_and_tests(tmp_path, monkeypatch, capsys, clip, recipe, method):
    monkeypatch.chdir(tmp_path)
    cli = FaastCLI(["fit", "--config", recipe, *overlay(method), *options(recipe, clip)])
    measured = cli.trainer.callback_metrics
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"test/accuracy {measured['test/accuracy']:.3f}"
    head, classes = cli.model.head, cli.datamodule.num_classes
    rows = 4 * classes
    assert head.prior_count == PRIOR_COUNTS[recipe]
    assert head.blend.item() == pytest.approx(rows / (rows + head.prior_count))
    assert torch.equal(head.zero_shot, torch.eye(16))
    assert torch.equal(head.class_embeddings, cli.model.encoder.embed_classes(cli.datamodule.class_names))

    (checkpoint,) = Path("logs/version_0/checkpoints").glob("*.ckpt")
    again = FaastCLI(["test", "--config", "logs/version_0/config.yaml", f"--ckpt_path={checkpoint}"])
    for name, value in again.trainer.callback_metrics.items():
        assert value == measured[name], name


def test_zero_shot_learns_nothing(tmp_path, monkeypatch, capsys, clip, recipe):
    monkeypatch.chdir(tmp_path)
    cli = FaastCLI(["fit", "--config", recipe, *overlay("zero_shot"), *options(recipe, clip)])
    measured = cli.trainer.callback_metrics
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"test/accuracy {measured['test/accuracy']:.3f}"
    assert cli.trainer.global_step == 0
    assert cli.model.head.blend.item() == 0

    embeddings = cli.model.encoder.embed_classes(cli.datamodule.class_names)
    right = rows = 0
    for batch, _ in zip(cli.datamodule.test_dataloader(), range(2), strict=False):
        images, labels = cli.datamodule.on_after_batch_transfer(batch, 0)
        logits = 100 * cli.model.encoder(images) @ embeddings.T
        torch.testing.assert_close(cli.model(images), logits, atol=1e-4, rtol=1e-4)
        right, rows = right + (logits.argmax(1) == labels).sum().item(), rows + len(labels)
    assert measured["test/accuracy"] == pytest.approx(right / rows)


def test_miniimagenet_has_twenty_classes_that_can_be_read(clip):
    if not RECIPES["recipes/clip_miniimagenet.yaml"].is_dir():
        pytest.skip("no mini-ImageNet")
    from lightning_faast.data import ImageDataModule
    from lightning_faast.encoders import ClipEncoder
    from lightning_faast.encoders.class_names import name_classes

    config = yaml.safe_load((ROOT / "recipes/clip_miniimagenet.yaml").read_text())["data"]["init_args"]
    encoder = ClipEncoder(f"open_clip:local-dir:{clip}")
    data = ImageDataModule(
        **{**config, "path": str(RECIPES["recipes/clip_miniimagenet.yaml"])}, data_config=encoder.data_config
    )
    data.prepare_data()
    data.setup("fit")
    names = name_classes(data.class_names)
    assert len(names) == 20
    assert {"nematode", "king crab", "African hunting dog", "trifle"} <= set(names)
    for loader in (data.train_dataloader(), data.test_dataloader()):
        assert len(loader.dataset) == 20 * 300


class TestOverlays:
    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("method", [None, "faast", "faast_paper", "faast_regression", "zero_shot"])
    def test_keep_the_zero_shot_weights(self, capsys, recipe, method):
        model = resolved(capsys, "--config", recipe, *overlay(method))["model"]
        assert model["class_embeddings"] is True
        assert model["head"]["class_path"] == "lightning_faast.FastWeights"
        given = model["head"]["init_args"]
        assert (given["zero_shot"], given["prior_count"]) == ("identity", PRIOR_COUNTS[recipe])
        rule = given["regularization"]
        assert (rule["init_args"] if rule else None) == ({"alpha": 0.8} if method == "faast_paper" else None)

    @pytest.mark.parametrize("method", sorted(path.stem for path in (ROOT / "configs/methods").glob("*.yaml")))
    def test_of_other_heads_drop_them(self, capsys, method):
        head = resolved(capsys, "--config", "recipes/clip_cifar.yaml", *overlay(method))["model"]["head"]
        if isinstance(head, str):  # a function
            return
        if not head["class_path"].endswith("FastWeights"):
            assert not {"zero_shot", "prior_count"} & set(head.get("init_args") or {})

    def test_zero_shot_needs_an_encoder_of_names(self):
        arguments = ["--config", "recipes/vit_cifar.yaml", *overlay("zero_shot"), "--model.encoder.pretrained=false"]
        with pytest.raises(ValueError, match="VisionEncoder has no embed_classes"):
            FaastCLI(["fit", *arguments])

    def test_zero_shot_needs_names(self, tmp_path, monkeypatch, clip):
        pytest.importorskip("sklearn")
        monkeypatch.chdir(tmp_path)
        encoder = ["--model.encoder=lightning_faast.encoders.ClipEncoder"]
        encoder += [f"--model.encoder.model_name=open_clip:local-dir:{clip}", *QUIET]
        data = ["--data=lightning_faast.data.DigitsDataModule"]
        with pytest.raises(ValueError, match=r"'0', '1', .* say nothing .* class_texts"):
            FaastCLI(["fit", *encoder, *data, *overlay("zero_shot")])
        words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        texts = yaml.safe_dump({str(number): word for number, word in enumerate(words)}, default_flow_style=True)
        cli = FaastCLI(["fit", *encoder, f"--model.encoder.class_texts={texts}", *data, *overlay("zero_shot")])
        assert cli.trainer.callback_metrics["test/accuracy"] >= 0


# ------------------------------------------------------------------------------------------ the authors' numbers


class GoldenKeys(nn.Module):
    """Keys as they come, and the golden class embeddings for whatever classes."""

    num_features = 64

    def forward(self, keys):
        return keys

    def embed_classes(self, class_names):
        return load_file(GOLDEN)["class_embeddings"]


class GoldenData(LightningDataModule):
    class_names = [f"class {number}" for number in range(10)]  # noqa: RUF012
    num_classes = 10

    def loader(self, keys, labels):
        golden = load_file(GOLDEN)
        return DataLoader(TensorDataset(golden[keys], golden[labels].long()), batch_size=64)

    def train_dataloader(self):
        return self.loader("keys", "labels")

    def test_dataloader(self):
        return self.loader("queries", "query_labels")


@pytest.mark.skipif(not GOLDEN.is_file(), reason="golden vectors are not here")
def test_recipe_with_the_papers_rule_gives_the_authors_logits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = FaastCLI(
        [
            *("fit", "--config", "recipes/clip_cifar.yaml", "--config", "configs/methods/faast_paper.yaml"),
            *("--model.encoder=tests.test_clip_recipes.GoldenKeys", "--data=tests.test_clip_recipes.GoldenData"),
            *QUIET,
        ]
    )
    golden = load_file(GOLDEN)
    head = cli.model.head
    assert isinstance(head, FastWeights)
    logits = golden["logits_inverse_n0_400"]
    cosines = (cli.model(golden["queries"]) - head.log_prior) * head.temperature
    assert (cosines - logits).norm() / logits.norm() < 1e-5
    weight = golden["W_inverse"]
    assert (head.weight - weight).norm() / weight.norm() < 1e-5
