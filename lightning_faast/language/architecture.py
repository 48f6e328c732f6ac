"""Where things are in a causal language model of transformers: output layer, decoder layers, final norm, positions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_faast.language.output import OutputLayer

#: Path of the decoder layers -> path of the norm after them.
_LAYERS = {
    "model.layers": "model.norm",  # Llama, SmolLM, Qwen2, Qwen3, Gemma, Mistral
    "transformer.h": "transformer.ln_f",  # GPT-2
    "gpt_neox.layers": "gpt_neox.final_layer_norm",  # GPT-NeoX, Pythia
    "model.decoder.layers": "model.decoder.final_layer_norm",  # OPT
}
#: Names under which configurations keep a factor of the logits, and whether it multiplies (1) or divides (-1).
_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
#: The probe scales hidden states until the largest logit is this, so that a cap of logits shows.
_PROBE_LOGIT = 60.0


def eager(wrapped: nn.Module) -> Any:
    """The model itself where it is wrapped by ``torch.compile`` or by peft."""
    model: Any = getattr(wrapped, "_orig_mod", wrapped)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """The list of decoder layers.

    Args:
        model: A causal language model.
        path: Where the list is, for a model of an unknown family.

    Raises:
        ValueError: For a family that is not known, saying what to pass, or a path that leads to no list.
    """
    model = eager(model)
    for candidate in _LAYERS if path is None else [path]:
        found = _at(model, candidate)
        if isinstance(found, nn.ModuleList) and len(found):
            return found
    lists = ", ".join(repr(name) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)) or "none"
    if path is None:
        raise ValueError(
            f"The decoder layers of {type(model).__name__} are not where a known family has them "
            f"({', '.join(_LAYERS)}). Say where: layers='path.to.layers'. Lists of modules in it: {lists}."
        )
    raise ValueError(f"layers={path!r} leads to no list of layers in {type(model).__name__}. There are: {lists}.")


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm between the last decoder layer and the output layer, where the family has one and is known."""
    model = eager(model)
    for layers, norm in _LAYERS.items():
        if _at(model, layers) is not None:
            return _at(model, norm)
    return None


def layer_at(layers: nn.ModuleList, index: int) -> nn.Module:
    """Layer ``index``; negative counts from the end.

    Raises:
        ValueError: Where there is no such layer.
    """
    if not -len(layers) <= index < len(layers):
        raise ValueError(f"There is no decoder layer {index}: the model has {len(layers)}, counted from 0.")
    return layers[index]


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence the model was made for; None where its configuration does not say."""
    config = _text_config(eager(model))
    return getattr(config, "max_position_embeddings", None)


def hidden_width(model: nn.Module) -> int:
    """Width of what decoder layers give."""
    return _text_config(eager(model)).hidden_size


def output_layer(model: nn.Module) -> OutputLayer:
    """The output layer with what the model does to the logits behind it, checked against the model's own logits.

    Raises:
        ValueError: Where there is none, or it is no plain linear layer.
    """
    model = eager(model)
    config = _text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; a causal language model is expected.")
    find: Any = getattr(model, "get_output_embeddings", None)
    found = None if find is None else find()
    if not isinstance(found, nn.Linear):
        kind = "none" if found is None else f"a {type(found).__module__}.{type(found).__name__}"
        raise ValueError(
            f"The output layer of {type(model).__name__} is {kind}; get_output_embeddings() must give a "
            "torch.nn.Linear. Load the model with AutoModelForCausalLM; merge an adapter that wraps its lm_head."
        )
    if not found.weight.is_floating_point():
        raise ValueError(
            f"The output layer of {type(model).__name__} holds {found.weight.dtype}: keep lm_head unquantized "
            "(llm_int8_skip_modules or modules_to_not_convert of the quantization config)."
        )
    scale = 1.0
    for name, power in _SCALES.items():
        value = getattr(config, name, None)
        if value is not None:
            scale *= float(value) ** power
    output = OutputLayer(found, scale, getattr(config, "final_logit_softcapping", None))
    _check(model, output)
    return output


@torch.no_grad()
def _check(model: Any, output: OutputLayer) -> None:
    """Refuse a model whose logits are not what ``output`` makes of its final hidden states."""
    seen: list[Tensor] = []

    def enlarge(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = args[0] * (_PROBE_LOGIT / output.linear(args[0]).abs().max().clamp_min(1e-6)).to(args[0])
        seen.append(hidden)
        return (hidden,)

    handle = output.module.register_forward_pre_hook(enlarge)
    try:
        with evaluating(model):
            ids = torch.arange(min(4, output.vocabulary), device=input_device(model))[None]
            logits = run(model, input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    if len(seen) != 1 or logits.shape[:-1] != seen[0].shape[:-1]:
        raise ValueError(f"{type(model).__name__} does not call its output layer once a forward pass; it cannot adapt.")
    expected, given = output.logits(seen[0]), logits.to(torch.float32)
    tolerance = 1e-3 if seen[0].dtype in (torch.float32, torch.float64) else 3e-2
    apart = float((expected.to(given) - given).abs().max() / expected.abs().max())
    if not apart <= tolerance:
        raise ValueError(
            f"{type(model).__name__} does something to its logits that is not known here (they are off by {apart:.1%}; "
            f"known are {', '.join([*_SCALES, 'final_logit_softcapping'])} of its configuration), so the gradient of "
            "its log-likelihood would be wrong. It cannot adapt."
        )


def run(model: Any, **inputs: Any) -> Any:
    """One forward pass with all hooks, also where the model was compiled in place: its code may not know them yet."""
    return model._call_impl(**inputs)


def input_device(model: Any) -> torch.device:
    """Where token ids go."""
    return model.get_input_embeddings().weight.device


def arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of the model's forward by name."""
    return inspect.signature(model.forward).parameters


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode (no dropout); every module's own flag is given back."""
    training = [m for m in model.modules() if m.training]
    try:
        for m in training:
            m.training = False
        yield
    finally:
        for m in training:
            m.training = True


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
