"""Keys from a file, and the encoder that passes them through."""

import json

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file

from lightning_faast import FaastCallback, FaastModule
from lightning_faast.data import KeysDataModule
from lightning_faast.data.labels import choose_per_class
from lightning_faast.encoders import Identity


def tensors(n=60, d=5, dtype=torch.float32):
    centers = 3 * torch.randn(3, d, generator=torch.Generator().manual_seed(1))
    made = {}
    for seed, split in enumerate(("train", "test")):
        labels = torch.arange(n) % 3
        noise = torch.randn(n, d, generator=torch.Generator().manual_seed(seed + 2))
        made[f"{split}_keys"], made[f"{split}_labels"] = (centers[labels] + noise).to(dtype), labels
    return made


def written(path, made=None, **metadata):
    save_file(made or tensors(), path, metadata=metadata or None)
    return str(path)


def opened(path, **kwargs):
    data = KeysDataModule(path, **kwargs)
    data.setup()
    return data


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_fits_what_was_encoded_elsewhere(tmp_path, dtype):
    data = KeysDataModule(written(tmp_path / "k.safetensors", tensors(dtype=dtype)))
    options = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = Trainer(callbacks=[FaastCallback()], accelerator="cpu", **options)
    module = FaastModule(Identity(5, normalize=False))
    trainer.fit(module, datamodule=data)
    assert trainer.test(module, datamodule=data, verbose=False)[0]["test/accuracy"] > 0.9


def test_names_come_from_the_metadata(tmp_path):
    names = json.dumps(["a", "b", "c", "d"])
    assert opened(written(tmp_path / "k.safetensors", class_names=names)).class_names == ["a", "b", "c", "d"]
    assert opened(written(tmp_path / "n.safetensors")).class_names == ["0", "1", "2"]


def test_limit_takes_the_rows_that_a_comparison_takes(tmp_path):
    made = tensors()
    data = opened(written(tmp_path / "k.safetensors", made), limit_per_class=4, seed=3)
    chosen, _ = choose_per_class(data.labels("train"), 3, 4, 3)
    (batch,) = data.train_dataloader()
    assert torch.equal(batch[0], made["train_keys"][chosen])
    (everything,) = data.ordered_loader("train")
    assert torch.equal(everything[0], made["train_keys"])


def test_shuffling_is_seeded(tmp_path):
    path = written(tmp_path / "k.safetensors")
    orders = [next(iter(opened(path, shuffle=True, seed=seed).train_dataloader()))[1].tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_fingerprint_follows_the_content(tmp_path):
    made = tensors()
    first = opened(written(tmp_path / "a.safetensors", made))
    made["train_keys"][0, 0] += 1e-6
    second = opened(written(tmp_path / "b.safetensors", made))
    assert first.fingerprint("test") == second.fingerprint("test")
    assert first.fingerprint("train") != second.fingerprint("train")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"test_labels": torch.full((60,), 3)}, r"test_labels lie in \[3, 3\], expected \[0, 2\]"),
        ({"train_labels": torch.arange(60) % 3 - 1}, r"train_labels lie in \[-1, 1\]"),
        ({"train_labels": torch.arange(59) % 3}, r"train_keys must be \[N, d\] with N labels"),
        ({"train_keys": torch.zeros(60)}, r"train_keys must be \[N, d\]"),
    ],
)
def test_bad_content_is_refused(tmp_path, change, says):
    data = KeysDataModule(written(tmp_path / "k.safetensors", tensors() | change))
    with pytest.raises(ValueError, match=says):
        data.setup()


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        opened(str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match="must be a safetensors file of train_keys"):
        opened(written(tmp_path / "other.safetensors", {"weight": torch.zeros(2)}))
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        opened(str(tmp_path / "text.safetensors"))
    with pytest.raises(RuntimeError, match="setup"):
        KeysDataModule("x").labels("train")


def test_identity_refuses_another_width():
    with pytest.raises(ValueError, match=r"keys must be \[B, 3\], got \(2, 4\)"):
        Identity(3)(torch.zeros(2, 4))
    assert torch.equal(Identity(3)(torch.zeros(1, 3)), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="num_features=0"):
        Identity(0)
