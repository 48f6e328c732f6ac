"""The overlays that train by backpropagation, end to end on tiny models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_faast.lightning_cli import FaastCLI
from lightning_faast.training import FullFinetuning, LearningRateSearch, Lora

VIT, RESNET = "test_vit", "test_resnet"


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """An image folder of two colors: split/class/image."""
    root = tmp_path_factory.mktemp("colors")
    generator = np.random.default_rng(0)
    for split, images in (("train", 16), ("test", 6)):
        for name, channel in (("blue", 2), ("red", 0)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = generator.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def fit(colors, method, model, *options):
    return FaastCLI(
        [
            *("fit", "--config", "recipes/vit_cifar.yaml", "--config", f"configs/methods/{method}.yaml"),
            f"--data.path={colors}",
            f"--model.encoder.model_name={model}",
            *("--model.encoder.pretrained=false", "--model.encoder.image_size=32", "--trainer.accelerator=cpu"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
            *options,
        ]
    )


@pytest.mark.parametrize(
    ("method", "model", "options"),
    [
        # what a pretrained encoder does not need: these features all but coincide
        ("linear_probe", RESNET, ["--model.optimizer.lr=10"]),
        ("linear_probe_tuned", RESNET, ["--method.rates=[3.0,10.0]"]),
        ("full_finetuning", RESNET, []),
        ("full_finetuning", VIT, []),
        ("lora", VIT, []),
    ],
)
def test_method_runs_end_to_end(tmp_path, monkeypatch, colors, method, model, options):
    monkeypatch.chdir(tmp_path)
    cli = fit(colors, method, model, *options)
    assert cli.trainer.current_epoch == cli.trainer.max_epochs
    assert cli.trainer.callback_metrics["test/accuracy"] == 1
    (checkpoint,) = Path("logs/version_0/checkpoints").glob("*.ckpt")
    again = FaastCLI(["test", "--config", "logs/version_0/config.yaml", f"--ckpt_path={checkpoint}"])
    assert again.trainer.callback_metrics["test/loss"] == cli.trainer.callback_metrics["test/loss"]


def test_linear_probe_has_the_settings_of_the_paper(tmp_path, monkeypatch, colors):
    monkeypatch.chdir(tmp_path)
    cli = fit(colors, "linear_probe", RESNET)
    encoder = fit(colors, "linear_probe", RESNET, "--trainer.max_epochs=0").model.encoder  # of the same seed
    before, after = encoder.state_dict(), cli.model.encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)  # BatchNorm statistics too
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (1e-3, 0.9, 0)
    assert group["lr"] == pytest.approx(1e-5)  # lowered at the 10th and the 20th of 20 epochs
    assert cli.trainer.global_step == 20 * 2
    assert type(cli.model.head) is torch.nn.Linear


def test_the_other_overlays_hold_what_they_say(tmp_path, monkeypatch, colors):
    monkeypatch.chdir(tmp_path)
    short = "--trainer.max_epochs=1"
    tuned = fit(colors, "linear_probe_tuned", VIT, short)
    (search,) = (c for c in tuned.trainer.callbacks if isinstance(c, LearningRateSearch))
    assert tuned.trainer.optimizers[0].param_groups[0]["initial_lr"] == search.rate
    whole = fit(colors, "full_finetuning", VIT, short)
    assert isinstance(whole.model.adapter, FullFinetuning)
    assert all(parameter.requires_grad for parameter in whole.model.parameters())
    assert whole.datamodule.augment
    lora = fit(colors, "lora", VIT, short)
    assert isinstance(lora.model.adapter, Lora)
    assert lora.datamodule.augment is None


def test_lora_of_an_encoder_without_attention_is_refused(tmp_path, monkeypatch, colors):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"VisionEncoder\(ResNet\) has none"):
        fit(colors, "lora", RESNET)


def test_a_fit_of_no_epochs_ends_in_the_test_accuracy(tmp_path, monkeypatch, colors, capsys):
    monkeypatch.chdir(tmp_path)
    cli = fit(colors, "linear_probe", VIT, "--trainer.max_epochs=0")
    assert cli.trainer.global_step == 0
    accuracy = cli.trainer.callback_metrics["test/accuracy"]
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"test/accuracy {accuracy:.3f}"
