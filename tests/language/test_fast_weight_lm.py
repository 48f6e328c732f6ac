"""FastWeightLM: learning, predicting, generating, switching, saving, and leaving no trace."""

import copy

import pytest
import torch

from lightning_faast.associative import Ridge
from lightning_faast.associative.files import save_tensors
from lightning_faast.language import FastWeightLM
from tests.associative.oracles import relative
from tests.language.models import FAMILIES, T, V, gpt2, llama, loss, text

MODES = {
    "residual": {},
    "passes": {"passes": 2},
    "key_layers": {"key_layers": [0, -1]},
    "embedding": {"mode": "embedding"},
    "chunked": {"mode": "chunked", "update_size": 200, "memory_size": 400},
    "middle": {"layer": "middle", "update_size": 200, "memory_size": 400},
}


def learned(model, **options):
    lm = FastWeightLM(model, **options)
    if options.get("layer") == "middle":  # as if its slow weights were trained
        torch.nn.init.normal_(lm.learner.out_proj.weight, std=0.02)
    for ids in text().split(8):
        lm.learn(ids)
    return lm


def fingerprint(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return hooks, {name: t.clone() for name, t in model.state_dict().items()}, [m.training for m in model.modules()]


@pytest.mark.parametrize("name", FAMILIES)
def test_learned_text_becomes_likelier(name):
    model, new = FAMILIES[name](), text(8, seed=1)
    before = loss(model, new)
    lm = learned(model)
    assert loss(lm, new) < before - 0.005  # a softcap of 3 leaves little room
    assert lm.tokens == 24 * 39
    assert loss(lm.reset(), new) == before


@pytest.mark.parametrize("mode", MODES)
def test_detaching_leaves_the_model_bit_for_bit(mode):
    model, ids = llama().train(), text(2)
    model.model.layers[1].eval()
    hooks, state, training = fingerprint(model)
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(ids).logits
    with learned(model, **MODES[mode]) as lm:
        lm.solve()
        assert not torch.equal(lm.model.eval()(ids).logits, logits)
        model.train()
        model.model.layers[1].eval()
    after_hooks, after_state, after_training = fingerprint(model)
    assert (hooks, training) == (after_hooks, after_training)
    assert all(torch.equal(state[n], after_state[n]) for n in state)
    assert not any("fast" in name for name in vars(model))
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, logits)


@pytest.mark.parametrize("mode", MODES)
def test_generation_is_the_same_with_and_without_cache(mode):
    lm = learned(llama(), **MODES[mode])
    prompt = text(2, 10, seed=2)
    options = {"max_new_tokens": 12, "do_sample": False}
    cached = lm.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, lm.generate(prompt, use_cache=False, **options))
    base = lm.model
    lm.detach()
    if mode != "middle":
        assert not torch.equal(cached, base.generate(prompt, **options))


def test_beams_and_sampling():
    lm = learned(llama(), key_layers=[1])
    prompt = text(2, 10, seed=2)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    beams = lm.generate(prompt, **options)
    assert torch.equal(beams, lm.generate(prompt, use_cache=False, **options))
    sampled = lm.generate(prompt, max_new_tokens=8, do_sample=True, top_k=5)
    assert sampled.shape[0] == 2
    assert not torch.equal(beams, lm.detach().generate(prompt, **options))


def test_batches_and_calls_do_not_matter():
    model, ids = llama(), text()
    one = FastWeightLM(model, step=1.0, key_ridge=1e-3, value_ridge=0.1).learn(ids)
    one.solve()
    weight, gram = one.learner.weight.clone(), one.learner._everything().statistics.gram
    one.reset()
    for part in ids.split([1, 5, 18]):
        one.learn(part)
    one.solve()
    assert relative(one.learner._everything().statistics.gram, gram) < 1e-6
    assert relative(one.learner.weight, weight) < 1e-3


def test_labels_choose_what_is_learned():
    lm, ids = FastWeightLM(llama()), text(4)
    labels = ids.clone()
    labels[:, :20] = -100
    lm.learn(ids, labels=labels)
    assert lm.tokens == 4 * 20
    with pytest.raises(ValueError, match="nothing to learn"):
        lm.learn(ids, labels=torch.full_like(ids, -100))


def test_several_adaptations_on_one_model():
    model, ids = llama(), text(4, seed=3)
    base = loss(model, ids)
    lm = learned(model)
    first = loss(lm, ids)
    lm.add("other", value_ridge=0.3, key_ridge=1e-2, step=0.5)
    lm.use("other").learn(text(8, seed=9))
    second = loss(lm, ids)
    assert len({base, first, second}) == 3
    assert loss(lm.use("default"), ids) == first
    assert loss(lm.use(None), ids) == base
    assert loss(lm.use("other"), ids) == second
    assert list(lm.adaptations) == ["default", "other"]
    lm.add("paper", layer="middle")
    assert loss(lm.use("paper"), ids) == base
    with pytest.raises(KeyError, match="no adaptation 'nothing'"):
        lm.use("nothing")
    with pytest.raises(ValueError, match="'other' already"):
        lm.add("other")
    lm.use(None)
    with pytest.raises(RuntimeError, match="No adaptation is in use"):
        lm.learn(ids)


def test_merging_and_forgetting():
    ids = text()
    lm = FastWeightLM(llama(), step=1.0, key_ridge=1e-3, value_ridge=0.1)
    lm.learn(ids)
    lm.solve()
    whole = lm.learner.weight.clone()
    lm.add("one")
    lm.add("two")
    lm.use("one").learn(ids[:10])
    lm.solve()
    one = lm.learner.weight.clone()
    lm.use("two").learn(ids[10:])
    lm.use("one").merge("two").solve()
    assert relative(lm.learner.weight, whole) < 1e-3
    lm.subtract("two").solve()
    assert relative(lm.learner.weight, one) < 1e-3
    base = loss(lm.use(None), ids)
    assert loss(lm.use("one").subtract("one"), ids) == base
    assert lm.tokens == 0
    with pytest.raises(KeyError, match="no adaptation 'three'"):
        lm.merge("three")
    lm.add("paper", mode="embedding")
    with pytest.raises(ValueError, match="cannot be combined"):
        lm.merge("paper")
    with pytest.raises(ValueError, match="another model"):
        lm.merge(FastWeightLM(llama()))


@pytest.mark.parametrize("mode", MODES)
def test_saving_and_loading(mode, tmp_path):
    model, ids = llama(), text(4, seed=3)
    lm = learned(model, **MODES[mode])
    expected = loss(lm, ids)
    path = lm.save(tmp_path / "a" / "adaptation.safetensors")
    lm.learn(text(8, seed=5))
    further = loss(lm, ids)
    lm.detach()
    again = FastWeightLM.from_file(model, path)
    assert loss(again, ids) == expected
    assert again.tokens == 24 * 39
    again.learn(text(8, seed=5))
    assert loss(again, ids) == pytest.approx(further, abs=1e-6)
    again.detach()
    small = FastWeightLM.from_file(model, path)
    small.save(tmp_path / "small", learning=False)
    assert loss(small.reset().load(tmp_path / "small"), ids) == expected
    assert small.tokens == 0


def test_files_of_others_are_refused(tmp_path):
    model = llama()
    lm = learned(model)
    path = lm.save(tmp_path / "adaptation")
    lm.add("paper", mode="embedding")
    with pytest.raises(ValueError, match=r"holds an adaptation \(layer, mode\)"):
        lm.use("paper").load(path)
    lm.add("wide", key_layers=[0])
    with pytest.raises(ValueError, match="other options"):
        lm.use("wide").load(path)
    with pytest.raises(FileNotFoundError, match="No adaptation file"):
        lm.load(tmp_path / "nothing")
    save_tensors({"x": torch.zeros(1)}, tmp_path / "foreign", {})
    with pytest.raises(ValueError, match="holds no adaptation"):
        lm.load(tmp_path / "foreign")
    (tmp_path / "broken").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        lm.load(tmp_path / "broken")
    other = llama()
    with pytest.raises(ValueError, match="another model"):
        FastWeightLM.from_file(other, path)
    FastWeightLM(other)  # the failed one left it free
    with pytest.raises(ValueError, match="another model"):
        FastWeightLM(llama(vocab_size=V + 1)).load(path)


def test_objects_among_the_options_are_asked_for_again(tmp_path):
    model = llama()
    path = learned(model, mode="embedding", regularization=Ridge(0.5)).save(tmp_path / "adaptation")
    other = llama()
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"regularization=Ridge\(mu=0.5\)"):
        FastWeightLM.from_file(other, path)
    assert FastWeightLM.from_file(other, path, regularization=Ridge(0.5)).tokens == 24 * 39


def test_figures_and_sizes():
    lm = learned(llama())
    figures = lm.figures()
    assert figures["tokens"] == 24 * 39
    assert figures["perplexity_after"] < figures["perplexity_before"]
    assert "held-out perplexity" in lm.summary()
    d, vocabulary = 32, 97
    assert lm.bytes_to_predict == 4 * (d * d + d + vocabulary)
    packed = 8 * (2 * d) * (2 * d + 1) // 2
    assert lm.bytes_to_update >= packed


def test_mistakes_are_named():
    model = llama()
    for options, message in (
        ({"layer": "first"}, "layer must be"),
        ({"mode": "magic"}, "mode must be one of"),
        ({"layer": "middle", "mode": "residual"}, "no mode but"),
        ({"mixing": 3}, "no option 'mixing'"),
        ({"mode": "embedding", "key_layers": [0]}, "no option 'key_layers'"),
        ({"key_layers": [7]}, "no decoder layer 7"),
        ({"layers": "model.nothing", "layer": "middle"}, "leads to no list"),
    ):
        with pytest.raises(ValueError, match=message):
            FastWeightLM(model, **options)
    lm = FastWeightLM(model)
    with pytest.raises(ValueError, match="adapted already"):
        FastWeightLM(model)
    lm.detach()
    FastWeightLM(model)


def test_one_forward_pass_without_the_vocabulary_for_learning():
    model, calls, rows = gpt2(), [], []
    lm = FastWeightLM(model)
    model.transformer.register_forward_hook(lambda *_: calls.append(1))
    model.lm_head.register_forward_hook(lambda _, __, out: rows.append(out.shape[1]))
    lm.learn(text(4))
    assert len(calls) == 1
    assert rows == [0]


def test_loss_of_labels_is_that_of_the_adapted_logits():
    lm, ids = learned(llama()), text(3, seed=4)
    with torch.no_grad():
        out = lm(input_ids=ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(out.loss, expected)


def test_longest_sequence_is_learned():
    FastWeightLM(llama()).learn(text(2, T))
