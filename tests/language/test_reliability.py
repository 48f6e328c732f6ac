"""Bad input, half precision, padding, compiled and checkpointed models."""

import importlib.util

import pytest
import torch

from lightning_faast.language import FastWeightLM
from tests.language.models import FAMILIES, V, gpt2, llama, loss, opt, text


def state_of(lm):
    return {name: t.clone() for name, t in lm.learner.learned_state().items()}, [m.training for m in lm.model.modules()]


def refused(lm, message, *args, **kwargs):
    (before, training) = state_of(lm)
    with pytest.raises(ValueError, match=message):
        lm.learn(*args, **kwargs)
    after, after_training = state_of(lm)
    assert training == after_training
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert lm._taps["default"]._read is None


def test_bad_input_is_refused_and_changes_nothing():
    model = llama().train()
    lm, ids = FastWeightLM(model), text(4)
    lm.learn(ids)
    refused(lm, "model has 97 tokens", torch.full((1, 5), V))
    refused(lm, "model has 97 tokens", torch.full((1, 5), -1))
    refused(lm, "is empty", ids[:, :0])
    refused(lm, "is empty", ids[:0])
    refused(lm, "nothing to learn", ids[:, :1])
    refused(lm, "nothing to learn", ids, torch.zeros_like(ids))
    refused(lm, "65 positions", text(1, 65))
    refused(lm, "must be token ids", ids.float())
    refused(lm, "must be token ids", ids[0])
    refused(lm, "attention_mask must be", ids, ids[:, 1:])
    refused(lm, "labels must be", ids, labels=ids[:1])
    refused(lm, "Token id 97 is outside", ids, labels=torch.full_like(ids, V))


def test_nan_hidden_states_are_refused_and_change_nothing():
    model = llama()
    lm, ids = FastWeightLM(model), text(4)
    lm.learn(ids)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    refused(lm, "NaN", ids)


def test_an_exception_in_the_model_changes_nothing():
    model = llama().train()
    lm, ids = FastWeightLM(model), text(4)

    def fail(*_):
        raise ValueError("broken model")

    handle = model.model.layers[1].register_forward_hook(fail)
    refused(lm, "broken model", ids)
    handle.remove()
    lm.learn(ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_on_either_side_gives_the_same_statistics(name):
    model = FAMILIES[name]()
    lm, ids = FastWeightLM(model, step=1.0, key_ridge=1e-3, value_ridge=0.1), text(6, 20)
    lengths = torch.tensor([20, 12, 7, 20, 3, 15])
    grams = []
    for left in (False, True):
        places = torch.arange(20)
        mask = ((20 - lengths)[:, None] <= places if left else places < lengths[:, None]).long()
        padded = torch.zeros_like(ids)
        for row, n in enumerate(lengths.tolist()):
            padded[row, mask[row] > 0] = ids[row, :n]
        lm.reset().learn(padded, mask)
        assert lm.tokens == int((lengths - 1).sum())
        grams.append(lm.learner._everything().statistics.gram)
    assert float((grams[0] - grams[1]).abs().max() / grams[0].abs().max()) < 1e-6
    lm.reset()
    for row, n in enumerate(lengths.tolist()):
        lm.learn(ids[row : row + 1, :n])
    assert float((grams[0] - lm.learner._everything().statistics.gram).abs().max() / grams[0].abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_double_statistics(dtype):
    exact = llama()
    half = llama().to(dtype)
    half.load_state_dict(exact.state_dict())
    ids, new = text(), text(8, seed=1)
    lm = FastWeightLM(half)
    before = loss(lm, new)
    lm.learn(ids)
    assert loss(lm, new) < before - 0.1
    assert lm.learner._everything().statistics.gram.dtype == torch.float64
    assert lm.learner.weight.dtype == torch.float32
    assert lm.generate(new[:1, :5], max_new_tokens=3).shape[1] <= 8
    reference = FastWeightLM(exact).learn(ids)
    gram = reference.learner._everything().statistics.gram
    assert float((lm.learner._everything().statistics.gram - gram).abs().max() / gram.abs().max()) < 0.02


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_tied_and_untied_embeddings(make, tied):
    model = make(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    before = {name: t.clone() for name, t in model.state_dict().items()}
    lm, new = FastWeightLM(model), text(8, seed=1)
    base = loss(lm, new)
    lm.learn(text())
    assert loss(lm, new) < base - 0.1
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_narrow_embeddings():
    model = opt(word_embed_proj_dim=16)
    lm = FastWeightLM(model, key_layers=[0], step=0.5, key_ridge=1e-3, value_ridge=0.3)
    base = loss(lm, text())
    assert lm.learner.widths == (32, 16)
    assert loss(lm.learn(text()), text()) < base


@pytest.mark.parametrize("options", [{}, {"key_layers": [0]}], ids=["output", "key_layers"])
@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in_place"])
def test_compiled_models_see_the_adaptation_come_and_go(options, in_place):
    plain = llama()
    ids = text(4, seed=1)
    base = loss(plain, ids)
    if in_place:
        plain.compile(backend="eager")
        model = plain
    else:
        model = torch.compile(plain, backend="eager")
    assert loss(model, ids) == pytest.approx(base, abs=1e-5)
    lm = FastWeightLM(model, **options).learn(text())
    adapted = loss(lm, ids)
    assert adapted < base - 0.1
    assert loss(lm.detach(), ids) == pytest.approx(base, abs=1e-5)


def test_gradient_checkpointing():
    model, ids = llama(), text()
    plain = FastWeightLM(model).learn(ids)
    gram = plain.learner._everything().statistics.gram
    plain.detach()
    model.train()
    model.gradient_checkpointing_enable()
    lm = FastWeightLM(model).learn(ids)
    torch.testing.assert_close(lm.learner._everything().statistics.gram, gram, rtol=1e-6, atol=1e-8)
    assert model.training
    assert model.is_gradient_checkpointing
    lm(input_ids=ids, labels=ids).loss.backward()  # and the model still trains, through the fast weights
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_dropout_is_off_while_learning():
    model = gpt2(resid_pdrop=0.5).train()
    ids = text(4)
    lm = FastWeightLM(model).learn(ids)
    gram = lm.learner._everything().statistics.gram
    torch.testing.assert_close(lm.reset().learn(ids).learner._everything().statistics.gram, gram, rtol=0, atol=0)


def test_inference_mode_is_no_obstacle():
    model = llama()
    lm = FastWeightLM(model)
    with torch.inference_mode():
        lm.learn(text())
        lm.generate(text(1, 5), max_new_tokens=3)
    lm(input_ids=text(2), labels=text(2)).loss.backward()


def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lm, new = FastWeightLM(model.eval(), key_layers=[0]), text(8, seed=1)
    base = loss(lm, new)
    assert loss(lm.learn(text()), new) < base - 0.1


@pytest.mark.cuda
def test_device_map_over_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    accelerate = pytest.importorskip("accelerate")
    devices = {"model.embed_tokens": 0, "model.layers": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    model = accelerate.dispatch_model(llama(tie_word_embeddings=False), devices)
    lm, new = FastWeightLM(model, key_layers=[0]), text(8, seed=1).cuda()
    base = loss(lm, new)
    assert loss(lm.learn(text().cuda()), new) < base - 0.1


@pytest.mark.cuda
def test_quantized_weights():
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    model = llama(hidden_size=64)
    import tempfile

    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_8bit=True)
    quantized = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map=0)
    lm, new = FastWeightLM(quantized), text(8, seed=1).cuda()
    base = loss(lm, new)
    assert loss(lm.learn(text().cuda()), new) < base


@pytest.mark.cuda
def test_cuda_statistics_are_those_of_the_cpu():
    model, ids = llama(), text(6, 20)
    mask = torch.ones_like(ids)
    mask[1, 12:] = mask[2, :5] = 0
    fixed = {"step": 1.0, "key_ridge": 1e-3, "value_ridge": 0.1}
    gram = FastWeightLM(model, **fixed).learn(ids, mask)
    expected = gram.learner._everything().statistics.gram
    lm = FastWeightLM(gram.detach().cuda(), **fixed).learn(ids.cuda(), mask.cuda())
    torch.testing.assert_close(lm.learner._everything().statistics.gram.cpu(), expected, rtol=1e-3, atol=1e-3)
    lm.solve()


def test_unquantized_output_layer_is_needed():
    model = llama(tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(V, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="keep lm_head unquantized"):
        FastWeightLM(model)
