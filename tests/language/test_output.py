"""The gradient of the log-likelihood, against autograd through the model itself and through one dense product."""

import pytest
import torch
from torch import nn

from lightning_faast.language import architecture
from lightning_faast.language.output import OutputLayer
from tests.language.models import FAMILIES, V, gemma2, llama, text


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block", [7, 1000, 2**21])
def test_gradient_is_that_of_the_log_likelihood(scale, softcap, bias, block):
    output = OutputLayer(nn.Linear(16, 50, bias=bias, dtype=torch.float64), scale, softcap)
    hidden = (3 * torch.randn(30, 16, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(50, (30,))
    loss = nn.functional.cross_entropy(output.logits(hidden), targets, reduction="none")
    loss.sum().backward()
    gradient, found, expected = output.gradient(hidden.detach(), targets, block)
    torch.testing.assert_close(gradient, -hidden.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.loss(hidden.detach(), targets, block), found, rtol=0, atol=0)
    torch.testing.assert_close(expected, output.logits(hidden).softmax(-1).sum(0).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_bias_of_tokens_is_under_the_softcap(softcap):
    output = OutputLayer(nn.Linear(16, 50, dtype=torch.float64), 0.3, softcap)
    hidden = (3 * torch.randn(30, 16, dtype=torch.float64)).requires_grad_()
    targets, bias, weights = torch.randint(50, (30,)), torch.randn(50), torch.rand(30)
    logits = output.logits(hidden, bias)
    raw = 0.3 * output.linear(hidden) + bias
    torch.testing.assert_close(logits, raw if softcap is None else softcap * torch.tanh(raw / softcap))
    nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    gradient, loss, expected = output.gradient(hidden.detach(), targets, 100, bias, weights)
    torch.testing.assert_close(gradient, -hidden.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.loss(hidden.detach(), targets, 100, bias), loss, rtol=0, atol=0)
    torch.testing.assert_close(expected, (logits.softmax(-1) * weights[:, None]).sum(0).detach())


def test_large_logits_do_not_overflow():
    output = OutputLayer(nn.Linear(4, 20, bias=False))
    gradient, loss, _ = output.gradient(1e4 * torch.randn(10, 4), torch.arange(10), 60)
    assert gradient.isfinite().all()
    assert loss.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_is_that_of_the_model(name):
    model = FAMILIES[name]().double()
    output = architecture.output_layer(model)
    ids, seen = text(2, 12), []

    def trace(module, args):
        seen.append(args[0].detach().requires_grad_())
        return (seen[0],)

    with output.module.register_forward_pre_hook(trace):
        logits = model(input_ids=ids).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1), reduction="sum")
    loss.backward()
    gradient, _, _ = output.gradient(seen[0].detach()[:, :-1].reshape(-1, output.width), ids[:, 1:].reshape(-1), 300)
    torch.testing.assert_close(gradient, -seen[0].grad[:, :-1].reshape(gradient.shape), rtol=1e-6, atol=1e-9)


class Odd(nn.Module):
    """A model whose logits get something that no known configuration names."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, **inputs):
        out = self.inner(**inputs)
        out.logits = out.logits - 0.1 * out.logits**2
        return out


def test_unknown_logits_are_refused():
    with pytest.raises(ValueError, match="does something to its logits"):
        architecture.output_layer(Odd(llama()))


def test_softcap_that_the_configuration_hides_is_refused():
    model = gemma2()
    output = architecture.output_layer(model)
    assert output.softcap == 3.0
    with pytest.raises(ValueError, match="does something to its logits"):
        architecture._check(model, OutputLayer(output.module))


def test_no_plain_output_layer_is_refused():
    model = llama()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"must give a torch\.nn\.Linear"):
        architecture.output_layer(model)
    with pytest.raises(ValueError, match="is none"):
        architecture.output_layer(nn.Linear(2, 2))


@pytest.mark.parametrize("name", FAMILIES)
def test_decoder_layers_are_found(name):
    model = FAMILIES[name]()
    layers = architecture.decoder_layers(model)
    assert len(layers) == 3
    assert architecture.final_norm(model) is not None
    assert architecture.max_positions(model) == 64
    assert architecture.hidden_width(model) == 32


def test_unknown_family_says_what_to_pass():
    model = llama()
    model.model.blocks = model.model.layers
    del model.model.layers
    with pytest.raises(ValueError, match=r"layers='path\.to\.layers'.*'model\.blocks'"):
        architecture.decoder_layers(model)
    assert len(architecture.decoder_layers(model, "model.blocks")) == 3
    with pytest.raises(ValueError, match="leads to no list"):
        architecture.decoder_layers(model, "model.norm")
    with pytest.raises(ValueError, match="no decoder layer 3"):
        architecture.layer_at(architecture.decoder_layers(model, "model.blocks"), 3)
