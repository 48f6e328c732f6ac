"""A language model in Lightning: one pass, training, or as it is."""

import logging

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from lightning_faast import FaastCallback
from lightning_faast.data import LanguageDataModule
from lightning_faast.language import FastWeightLM, LanguageModule
from lightning_faast.training import FullFinetuning, Lora
from tests.language.projects import save_model, text

WINDOW = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text(120), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FAAST_CACHE", str(tmp_path))


def data_of(file, **options):
    return LanguageDataModule(file, **{"test_split": None, "holdout": 0.2, "window": WINDOW, **options})


def trainer_of(*callbacks, **options):
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return pl.Trainer(
        accelerator="cpu", callbacks=list(callbacks), **{**dict.fromkeys(off, False), "max_epochs": 1, **options}
    )


def fitted(module, data, callback=None, **options):
    trainer = trainer_of(*([callback] if callback else []), **options)
    trainer.fit(module, datamodule=data)
    return trainer


def measure(module, data):
    return trainer_of().test(module, datamodule=data, verbose=False)[0]


def test_a_pass_in_lightning_is_the_pass_of_fast_weight_lm(folder, file):
    module, data, callback = LanguageModule(folder), data_of(file), FaastCallback()
    trainer = fitted(module, data, callback)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    lm = FastWeightLM(model)
    for batch in data.train_dataloader():
        lm.learn(batch["input_ids"], labels=batch["labels"])
    lm.solve()
    torch.testing.assert_close(module.head.weight, lm.learner.weight, rtol=1e-6, atol=1e-9)
    pairs = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in data.train_dataloader())
    assert callback.metrics["faast/rows"] == pairs == lm.tokens
    assert trainer.current_epoch == 1
    assert not any(optimizer.param_groups for optimizer in trainer.optimizers)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "residual", "key_layers": [0, 1], "passes": 2},
        {"mode": "embedding"},
        {"mode": "chunked", "update_size": 64, "memory_size": 128},
        {"layer": "middle"},
    ],
    ids=str,
)
def test_every_layer_is_driven(folder, file, options):
    module, callback = LanguageModule(folder, fast_weights=options), FaastCallback()
    data = data_of(file, limit_tokens=600)
    fitted(module, data, callback)
    assert callback.metrics["faast/rows"] == module.head.rows > 500
    assert measure(module, data)["test/loss"] > 0


def test_learning_lowers_perplexity_and_the_vocabulary_is_not_multiplied(folder, file, monkeypatch):
    module, data = LanguageModule(folder), data_of(file)
    before = measure(module, data)
    rows = []
    hook = module.model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    fitted(module, data, FaastCallback())
    hook.remove()
    assert set(rows) == {0}
    after = measure(module, data)
    assert after["test/perplexity"] < before["test/perplexity"] / 10
    assert after["test/bits_per_byte"] < before["test/bits_per_byte"] / 2


def test_figures_are_those_of_the_model(folder, file):
    module, data = LanguageModule(folder, fast_weights=False), data_of(file)
    figures = measure(module, data)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    losses, right = [], []
    with torch.no_grad():
        for batch in data.test_dataloader():
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                n = int((labels != -100).nonzero().max()) + 1
                out = model(input_ids=ids[None, :n], labels=ids[None, :n])
                losses.append((float(out.loss) * (n - 1), n - 1))
                right.append(int((out.logits[0, :-1].argmax(-1) == ids[1:n]).sum()))
    tokens = sum(n for _, n in losses)
    loss = sum(total for total, _ in losses) / tokens
    assert figures["test/loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["test/perplexity"] == pytest.approx(float(torch.tensor(loss).exp()), rel=1e-4)
    assert figures["test/accuracy"] == pytest.approx(sum(right) / tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sliding_windows_give_each_token_its_context(tmp_path, file, family):
    folder = str(save_model(tmp_path / "model", family))
    module = LanguageModule(folder, fast_weights={"key_layers": [1]})
    data = data_of(file, window=32, stride=8, test_tokens=75, limit_tokens=500)
    fitted(module, data, FaastCallback())
    (scores,) = [trainer_of().predict(module, datamodule=data_of(
        file, window=32, stride=8, test_tokens=75, limit_tokens=500, eval_batch_size=99))]  # fmt: skip
    found = torch.cat([part["log_likelihood"] for part in scores])
    start, end = data._span("test")
    ids = data._stream("test").ids[start:end].long()
    assert len(found) == len(ids) - 1
    expected = []
    with torch.no_grad():
        for place in range(1, len(ids)):
            begin = 0 if place < 32 else 8 * ((place - 32) // 8 + 1)
            logits = module(ids[None, begin:place]).logits[0, -1]
            expected.append(logits.log_softmax(-1)[ids[place]])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", [Lora(r=4), FullFinetuning(layer_decay=1.0)], ids=["lora", "full"])
def test_training_lowers_the_loss(folder, file, adapter):
    module = LanguageModule(
        folder, fast_weights=False, adapter=adapter, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2)
    )
    data = data_of(file, limit_tokens=1000, batch_size=2)
    before = measure(module, data)["test/loss"]
    fitted(module, data)
    assert measure(module, data)["test/loss"] < before - 0.05


def test_checkpoint_holds_what_was_learned(folder, file, tmp_path):
    data = data_of(file)
    module = LanguageModule(folder)
    trainer = fitted(module, data, FaastCallback())
    trainer.save_checkpoint(tmp_path / "learned.ckpt")
    state = torch.load(tmp_path / "learned.ckpt")["state_dict"]
    assert {name.removeprefix("network.adaptations.default.") for name in state} == {"weight", "offset", "token_bias"}
    again = LanguageModule(folder)
    assert trainer_of().test(again, datamodule=data, ckpt_path=tmp_path / "learned.ckpt", verbose=False)[0] == measure(
        module, data
    )
    other = LanguageModule(str(save_model(tmp_path / "other", seed=1)))
    with pytest.raises(ValueError, match="another model"):
        trainer_of().test(other, datamodule=data, ckpt_path=tmp_path / "learned.ckpt", verbose=False)


def test_checkpoint_of_lora_holds_the_updates(folder, file, tmp_path):
    data = data_of(file, limit_tokens=200)
    module = LanguageModule(folder, fast_weights=False, adapter=Lora(r=2))
    fitted(module, data).save_checkpoint(tmp_path / "lora.ckpt")
    assert all("lora_" in name for name in torch.load(tmp_path / "lora.ckpt")["state_dict"])
    again = LanguageModule(folder, fast_weights=False, adapter=Lora(r=2))
    trainer_of().test(again, datamodule=data, ckpt_path=tmp_path / "lora.ckpt", verbose=False)
    mine, theirs = module.state_dict(), again.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_frozen_models_stay_in_eval_mode_and_without_gradients(tmp_path):
    module = LanguageModule(str(save_model(tmp_path / "model", "gpt2"))).train()
    assert not any(part.training for part in module.model.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_progress_and_closing_line_are_in_tokens(folder, file, caplog):
    shown = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            shown.update(trainer.progress_bar_metrics)

    data = data_of(file, limit_tokens=300)
    trainer = trainer_of(FaastCallback(), Look(), enable_progress_bar=True)
    with caplog.at_level(logging.INFO):
        trainer.fit(LanguageModule(folder), datamodule=data)
    assert shown["tokens"].isdigit() or "," in shown["tokens"]
    assert "tokens/s" in shown
    line = next(record.message for record in caplog.records if record.message.startswith("FAAST: 2"))
    assert line.startswith("FAAST: 293 tokens, d 32, c ")  # 300 in 7 windows, the first of each has none before it


def test_dict_batches_without_a_datamodule(folder):
    ids = torch.arange(40).repeat(8, 1)
    loader = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)
    module = LanguageModule(folder)
    trainer_of(FaastCallback()).fit(module, loader)
    assert "test/bits_per_byte" not in trainer_of().test(module, loader, verbose=False)[0]


def test_what_cannot_be_is_refused(folder, file):
    with pytest.raises(ValueError, match="fast_weights beside an adapter"):
        LanguageModule(folder, adapter=Lora())
    with pytest.raises(ValueError, match="has no option 'pases'"):
        LanguageModule(folder, fast_weights={"pases": 2})
    with pytest.raises(RuntimeError, match="nothing to optimize: no parameter of the language model"):
        fitted(LanguageModule(folder), data_of(file))
    with pytest.raises(ValueError, match=r"window=65, and the model was made for 64 .*--data.window=64"):
        fitted(LanguageModule(folder), data_of(file, window=65), FaastCallback())
    with pytest.raises(ValueError, match="leaves out labels of -100 by itself"):
        fitted(LanguageModule(folder), data_of(file), FaastCallback(ignore_index=-100))
    with pytest.raises(FileNotFoundError, match=r"model_name='\./nowhere'"):
        LanguageModule("./nowhere")
    with pytest.raises(ConnectionError, match=r"--model.model_name=DIR"):
        LanguageModule("someone/no-such-model-here")
