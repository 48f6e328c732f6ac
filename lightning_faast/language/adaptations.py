"""Layers of fast weights by the names of their options, connected to a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_faast.language.architecture import decoder_layers, hidden_width, layer_at
from lightning_faast.language.chunked import ChunkedFastWeights
from lightning_faast.language.embedding import EmbeddingFastWeights
from lightning_faast.language.knn_lm import KNNLM
from lightning_faast.language.learner import HiddenLearner
from lightning_faast.language.middle import MiddleFastWeights
from lightning_faast.language.output import OutputLayer
from lightning_faast.language.residual import ResidualFastWeights
from lightning_faast.language.taps import LogitsTap, MiddleTap, OutputTap, Tap

#: Modes of the output layer.
OUTPUT_MODES = {
    "residual": ResidualFastWeights,
    "embedding": EmbeddingFastWeights,
    "chunked": ChunkedFastWeights,
    "knn_lm": KNNLM,
}
#: Arguments of layers that come from the model.
_BY_MODEL = ("output", "embeddings", "width", "key_widths", "base")
#: The mode of a layer where none is named.
_DEFAULT_MODE = {"output": "residual", "middle": "chunked"}


def named(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with ``layer`` and ``mode`` in them."""
    layer = options.get("layer", "output")
    mode = options.get("mode")
    return {**options, "layer": layer, "mode": _DEFAULT_MODE.get(layer) if mode is None else mode}


def build(
    model: Any, output: OutputLayer, layers_path: str | None, options: Mapping[str, Any]
) -> tuple[HiddenLearner, Tap]:
    """A layer of fast weights and what connects it to the model.

    Args:
        model: The model, neither compiled nor wrapped.
        output: Its output layer.
        layers_path: Where its decoder layers are, for an unknown family.
        options: :func:`named` ones: ``layer`` and ``mode``, and those of the layer.

    Raises:
        ValueError: For an unknown layer, mode or option.
    """
    options = dict(options)
    layer, mode = options.pop("layer"), options.pop("mode")
    if layer == "output":
        return _output(model, output, layers_path, mode, options)
    if layer == "middle":
        if mode != "chunked":
            raise ValueError(f"The middle layer has no mode but 'chunked', got {mode!r}.")
        return _middle(model, output, layers_path, options)
    raise ValueError(f"layer must be 'output' or 'middle', got {layer!r}.")


def _output(
    model: Any, output: OutputLayer, layers_path: str | None, mode: str, options: dict[str, Any]
) -> tuple[HiddenLearner, Tap]:
    if mode not in OUTPUT_MODES:
        raise ValueError(f"mode must be one of {', '.join(OUTPUT_MODES)} for the output layer, got {mode!r}.")
    kind = OUTPUT_MODES[mode]
    if mode == "knn_lm":
        return _neighbors(model, output, layers_path, options)
    if mode != "residual":
        _check_options(kind, options)
        learner = kind(output, model.get_input_embeddings(), **options)
        return learner, _tap(learner, output)
    key_layers = []
    if options.get("key_layers"):
        layers = decoder_layers(model, layers_path)
        chosen = {layer_at(layers, index) for index in options["key_layers"]}
        key_layers = [layer for layer in layers if layer in chosen]  # in the order in which they run
    options.pop("key_layers", None)
    _check_options(kind, options)
    learner = kind(output, key_widths=[hidden_width(model)] * len(key_layers), **options)
    return learner, _tap(learner, output, key_layers, model)


def _tap(
    learner: HiddenLearner, output: OutputLayer, key_layers: Sequence[nn.Module] = (), model: Any = None
) -> OutputTap:
    kind = LogitsTap if learner.changes_logits else OutputTap
    return kind(learner, output.module, key_layers, model)


def _neighbors(
    model: Any, output: OutputLayer, layers_path: str | None, options: dict[str, Any]
) -> tuple[HiddenLearner, Tap]:
    over = options.pop("over", None)
    _check_options(KNNLM, options)
    if over is None:
        learner = KNNLM(output, **options)
        return learner, _tap(learner, output)
    beneath = {"mode": over} if isinstance(over, str) else dict(over)
    mode = beneath.pop("mode", _DEFAULT_MODE["output"])
    if mode == "knn_lm":
        raise ValueError("over must be another mode of the output layer, or its options, got 'knn_lm'.")
    base, tap = _output(model, output, layers_path, mode, beneath)
    assert isinstance(tap, OutputTap)
    learner = KNNLM(output, base, **options)
    return learner, _tap(learner, output, tap.key_layers, model)


def _middle(
    model: Any, output: OutputLayer, layers_path: str | None, options: dict[str, Any]
) -> tuple[HiddenLearner, Tap]:
    layers = decoder_layers(model, layers_path)
    at = options.pop("at", len(layers) // 2)
    source = options.pop("slow_weights", None)
    _check_options(MiddleFastWeights, options)
    learner = MiddleFastWeights(output, hidden_width(model), **options)
    if source is not None:
        learner.load_slow_weights(source, at)
    return learner, MiddleTap(learner, layer_at(layers, at), output.module)


def _check_options(kind: type, options: Mapping[str, Any]) -> None:
    known = [name for name in inspect.signature(kind).parameters if name not in _BY_MODEL]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"{kind.__name__} has no option {', '.join(map(repr, unknown))}; it has {', '.join(known)}.")
