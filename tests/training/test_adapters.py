"""Adapters: what is trained at which rate, what stays bit for bit, and what is refused."""

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_faast import FaastModule
from lightning_faast.encoders import VisionEncoder
from lightning_faast.training import Adapter, FullFinetuning, Lora
from lightning_faast.training.adapters import attention_linears


def make_encoder(name="test_vit"):
    torch.manual_seed(0)
    return VisionEncoder(name, pretrained=False, image_size=32, normalize=False)


def images(rows=12, seed=0):
    x = torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, torch.arange(rows) % 2), batch_size=6)


def fit(tmp_path, module, epochs=1, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", max_epochs=epochs, **quiet, **options)
    trainer.fit(module, images())
    return trainer


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


class Stack(nn.Module):
    """An encoder that is no timm model: stem, three layers, norm."""

    def __init__(self, kind=nn.ModuleList):
        super().__init__()
        self.num_features = 4
        self.stem = nn.Linear(5, 4)
        self.layers = kind(nn.Linear(4, 4) for _ in range(3)) if kind is nn.ModuleList else kind(nn.Linear(4, 4))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------- full fine-tuning


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("layer_decay", [0.5, 0.75, 1.0])
def test_rates_and_decays_are_timms(name, layer_decay):
    module = FaastModule(
        make_encoder(name),
        nn.Linear,
        num_classes=2,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.3, weight_decay=0.05),
        adapter=FullFinetuning(layer_decay),
    )
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    model = module.encoder.model
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    expected = {
        names[id(parameter)]: (0.3 * group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(
            model, weight_decay=0.05, no_weight_decay_list=listed, layer_decay=layer_decay
        )
        for parameter in group["params"]
    }
    expected |= {"head.weight": (0.3, 0.05), "head.bias": (0.3, 0.05)}
    groups = module.configure_optimizers().param_groups
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert found == expected
    assert not any("lr_scale" in group for group in groups)  # applied once and for all


def test_layers_of_an_encoder_that_is_not_timms():
    encoder = FullFinetuning(0.5).adapt(Stack())
    groups = FullFinetuning(0.5).parameter_groups(encoder)
    scales = {id(p): (group["lr_scale"], "weight_decay" in group) for group in groups for p in group["params"]}
    layers = [encoder.stem, *encoder.layers, encoder.norm]
    for layer, scale in zip(layers, [0.25, 0.25, 0.5, 1.0, 1.0], strict=True):
        assert scales.pop(id(layer.bias)) == (scale, True)
        assert scales.pop(id(layer.weight)) == (scale, layer is encoder.norm)
    assert not scales


def test_an_encoder_without_layers_needs_no_decay():
    encoder = Stack(nn.Sequential)
    with pytest.raises(ValueError, match=r"layer_decay=0.75, but the encoder Stack has no .* Set layer_decay=1"):
        FullFinetuning().parameter_groups(encoder)
    groups = FullFinetuning(layer_decay=1).parameter_groups(encoder)
    assert sum(len(group["params"]) for group in groups) == len(list(encoder.parameters()))


def test_an_encoder_without_parameters_is_refused():
    with pytest.raises(ValueError, match="Identity has no parameters"):
        FullFinetuning().adapt(nn.Identity())


@pytest.mark.parametrize("layer_decay", [0, 1.5])
def test_layer_decay_out_of_range(layer_decay):
    with pytest.raises(ValueError, match=f"layer_decay={layer_decay} must be"):
        FullFinetuning(layer_decay)


@pytest.mark.parametrize("keep_statistics", [True, False])
def test_every_parameter_moves_and_statistics_where_asked(tmp_path, keep_statistics):
    adapter = FullFinetuning(keep_statistics=keep_statistics)
    module = FaastModule(make_encoder("test_resnet"), nn.Linear, 2, optimizer=torch.optim.Adam, adapter=adapter)
    before = state(module)
    trainer = fit(tmp_path, module, epochs=4, enable_checkpointing=False)
    kept = {name for name, value in module.state_dict().items() if torch.equal(value, before[name])}
    statistics = {name for name, _ in module.named_buffers() if "running_" in name or "num_batches" in name}
    assert statistics
    assert kept == (statistics if keep_statistics else set())
    trainer.validate(module, images(), verbose=False)
    in_eval_mode = {type(part) for part in module.train().modules() if not part.training}
    assert all(issubclass(kind, nn.BatchNorm2d) for kind in in_eval_mode)
    assert bool(in_eval_mode) is keep_statistics


def test_the_encoders_rate_relative_to_the_heads():
    encoder = FullFinetuning().adapt(make_encoder())
    whole, tenth = (FullFinetuning(0.5, lr_scale).parameter_groups(encoder) for lr_scale in (1.0, 0.1))
    assert [group["lr_scale"] for group in tenth] == pytest.approx([0.1 * group["lr_scale"] for group in whole])
    (group,) = Lora(lr_scale=0.3).parameter_groups(Lora().adapt(make_encoder()))
    assert group["lr_scale"] == 0.3
    for adapter in (FullFinetuning, Lora):
        with pytest.raises(ValueError, match=r"lr_scale=0.0 must be positive"):
            adapter(lr_scale=0.0)


def test_the_base_class_leaves_the_encoder_as_it_is(tmp_path):
    module = FaastModule(make_encoder("test_resnet"), nn.Linear, 2, optimizer=sgd, adapter=Adapter())
    before = state(module.encoder)
    fit(tmp_path, module, enable_checkpointing=False)
    assert all(torch.equal(value, before[name]) for name, value in module.encoder.state_dict().items())
    assert module.encoder.frozen


# ---------------------------------------------------------------------------------------------------------------- LoRA


def base(state_dict):
    """The encoder's own tensors by their own names."""
    return {name.replace(".base_layer", ""): value for name, value in state_dict.items() if "lora_" not in name}


class WithBatchNorm(nn.Module):
    """A frozen BatchNorm below an attention."""

    def __init__(self):
        super().__init__()
        self.num_features = 8
        self.norm = nn.BatchNorm1d(27)
        self.attn = nn.ModuleDict({"proj": nn.Linear(27, 8)})
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.attn["proj"](self.norm(x.flatten(2).mean(1)[:, :27])))


@pytest.mark.parametrize("make", [make_encoder, WithBatchNorm])
def test_lora_keeps_the_encoders_own_state_bit_for_bit(tmp_path, make):
    encoder = make()
    before = state(encoder)
    module = FaastModule(encoder, nn.Linear, 2, optimizer=sgd, adapter=Lora(r=2))
    assert module.encoder is encoder
    updates = {name: value for name, value in state(encoder).items() if "lora_" in name}
    fit(tmp_path, module, enable_checkpointing=False)
    after = encoder.state_dict()
    assert base(after).keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in base(after).items())
    assert updates
    assert all(not torch.equal(after[name], value) for name, value in updates.items())


def test_lora_starts_as_the_encoder_itself():
    x, _ = next(iter(images()))
    with torch.no_grad():
        expected = make_encoder()(x)
        assert torch.equal(Lora().adapt(make_encoder()).eval()(x), expected)


def test_frozen_parts_are_in_eval_mode_and_dropout_is_not():
    module = FaastModule(WithBatchNorm(), nn.Linear, 2, adapter=Lora(dropout=0.1)).train()
    encoder = module.encoder
    assert not encoder.norm.training
    assert encoder.dropout.training
    assert encoder.attn["proj"].lora_dropout["default"].training
    assert not any(part.training for part in module.eval().modules())


def test_lora_trains_as_many_numbers_as_it_should():
    encoder = Lora(r=3).adapt(make_encoder())
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    width, blocks = encoder.num_features, len(encoder.model.blocks)
    assert trained == blocks * 3 * ((width + 3 * width) + (width + width))
    assert not encoder.frozen


def test_lora_keeps_the_attributes_of_the_encoder():
    encoder = make_encoder()
    expected = encoder.num_features, encoder.data_config
    module = FaastModule(encoder, nn.Linear, 2, adapter=Lora())
    assert (module.encoder.num_features, module.encoder.data_config) == expected


def test_lora_without_attention_is_refused():
    with pytest.raises(ValueError, match=r"VisionEncoder\(ResNet\) has none.*Lora\(target_modules=\[\.\.\.\]\)"):
        Lora().adapt(make_encoder("test_resnet"))
    encoder = Lora(target_modules=["layer1.0.conv1"]).adapt(make_encoder("test_resnet"))
    assert any("lora_A" in name for name, _ in encoder.named_parameters())


def test_lora_checkpoint_loads_strictly(tmp_path):
    module = FaastModule(make_encoder(), nn.Linear, 2, optimizer=sgd, adapter=Lora(r=2))
    trainer = fit(tmp_path, module)
    again = FaastModule(make_encoder(), nn.Linear, 2, adapter=Lora(r=2))
    Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False).test(
        again, images(), ckpt_path=trainer.checkpoint_callback.best_model_path, verbose=False
    )
    x, _ = next(iter(images()))
    with torch.no_grad():
        assert torch.equal(again.eval()(x), module.eval()(x))


@pytest.mark.parametrize(
    ("architecture", "options", "layers", "leaves"),
    [
        ("bert", {"num_attention_heads": 2, "intermediate_size": 8}, "num_hidden_layers", {"query", "key", "value"}),
        ("gpt2", {"n_head": 2}, "n_layer", {"c_attn", "c_proj"}),
        (
            "llama",
            {"num_attention_heads": 2, "intermediate_size": 8},
            "num_hidden_layers",
            {"q_proj", "k_proj", "v_proj", "o_proj"},
        ),
    ],
)
def test_attention_of_transformers(architecture, options, layers, leaves):
    transformers = pytest.importorskip("transformers")
    width = "n_embd" if architecture == "gpt2" else "hidden_size"
    config = transformers.AutoConfig.for_model(architecture, vocab_size=30, **{width: 8, layers: 2}, **options)
    model = transformers.AutoModel.from_config(config)
    found = attention_linears(model)
    assert {name.rpartition(".")[2] for name in found} == leaves
    assert len(found) == 2 * len(leaves)
    assert not any("mlp" in name for name in found)
    Lora(r=2).adapt(model)
    tokens = torch.arange(5)[None]
    model(input_ids=tokens).last_hidden_state.sum().backward()
    # B is zero, so that A has no gradient yet; every update takes part
    moved = {name: p.grad is not None for name, p in model.named_parameters() if "lora_" in name}
    assert moved
    assert all(moved.values())


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swinv2_tiny_window8_256"])
def test_layers_that_are_read_without_being_called_get_no_update(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    assert {leaf.rpartition(".")[2] for leaf in attention_linears(model)} == {"proj"}


class ReadsWeights(nn.Module):
    """Pools by an attention whose layers are not called, as CLIP's ResNets do."""

    def __init__(self):
        super().__init__()
        self.num_features = 8
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(27, 8), "out_proj": nn.Linear(8, 8)})

    def forward(self, x):
        x = nn.functional.linear(x.flatten(2).mean(1)[:, :27], self.attn["q_proj"].weight)
        return self.attn["out_proj"](x)


def test_an_update_without_effect_is_refused(tmp_path):
    module = FaastModule(ReadsWeights(), nn.Linear, 2, optimizer=sgd, adapter=Lora())
    with pytest.raises(ValueError, match=r"no effect on attn.q_proj: the encoder ReadsWeights does not call"):
        fit(tmp_path, module, enable_checkpointing=False)
    named = Lora(target_modules=["out_proj"])
    fit(tmp_path, FaastModule(ReadsWeights(), nn.Linear, 2, optimizer=sgd, adapter=named), enable_checkpointing=False)


def test_multihead_attention_gets_no_update_without_effect():
    assert not attention_linears(nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)}))
