"""Models and tokenizers of transformers, and what a sentence encoder's own files say of how it is used."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import nn

from lightning_faast.data.extras import require
from lightning_faast.encoders.text_pooling import Pooling

_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class SentenceDefaults:
    """How a model is meant to be used, where its files say so (those of sentence-transformers).

    Attributes:
        pooling: How tokens become one vector; a text where it is none of ours, with what it is.
        normalize: Whether the vector is scaled to unit norm.
        max_length: Tokens of a text.
    """

    pooling: str = "mean"
    normalize: bool = True
    max_length: int | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model of transformers that gives hidden states, with its tokenizer.

    Attributes:
        model: The encoder, or the decoder without its language-model head.
        tokenizer: Its tokenizer.
        defaults: How it is meant to be used.
    """

    model: Any
    tokenizer: Any
    defaults: SentenceDefaults


def load(name: str, pretrained: bool, gguf_file: str | None, dtype: str, trust_remote_code: bool) -> LoadedModel:
    """Load a model by its name on the hub or its folder.

    Args:
        name: Repository on the hub, or a local folder with the model's files.
        pretrained: ``False`` for random weights in the shape of its configuration.
        gguf_file: A GGUF file in it, which is de-quantized.
        dtype: Of the weights: ``float32``, ``float16`` or ``bfloat16``.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        ValueError: Where options exclude each other, weights are missing, or the model brings code of its own.
        FileNotFoundError: Where a folder lacks files.
        ConnectionError: Where files are to be downloaded and cannot be.
        ImportError: Where transformers is not installed, or gguf for a GGUF file.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(_DTYPES)}.")
    transformers = require("transformers", "text")
    source: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        if not pretrained:
            raise ValueError(f"pretrained=False asks for random weights, gguf_file={gguf_file!r} for those of a file.")
        require("gguf", "gguf")
        source["gguf_file"] = gguf_file
    folder = Path(name).expanduser()
    if folder.is_dir() and gguf_file is None and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"the folder model_name={name!r} has no config.json: it must hold a model of transformers, or a GGUF file "
            "that gguf_file names (--model.encoder.gguf_file=FILE)."
        )
    try:
        if pretrained:
            model = _pretrained(transformers, name, source)
        else:
            config = transformers.AutoConfig.from_pretrained(name, **source)
            model = transformers.AutoModel.from_config(config, trust_remote_code=trust_remote_code)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **source)
        defaults = _sentence_defaults(name)
    except OSError as error:
        if folder.is_dir():
            raise FileNotFoundError(
                f"the folder model_name={name!r} lacks files of a model of transformers (model.safetensors, "
                f"tokenizer.json), or the file gguf_file={gguf_file!r}: {error}"
            ) from error
        raise ConnectionError(
            f"The model {name!r} cannot be downloaded. On a machine that reaches no hub, set model_name to a local "
            "folder with its files (--model.encoder.model_name=DIR)."
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"model_name={name!r} brings Python code of its own, which is not run. If you trust it, set "
            "trust_remote_code=True (--model.encoder.trust_remote_code=true)."
        ) from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None  # reads hidden states, and does not change them
    model.config.use_cache = False  # nothing is generated
    return LoadedModel(model.to(getattr(torch, dtype)), tokenizer, defaults)


def _pretrained(transformers: Any, name: str, source: dict[str, Any]) -> Any:
    model, info = transformers.AutoModel.from_pretrained(name, output_loading_info=True, **source)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:  # transformers would leave them random and only log it
        raise ValueError(
            f"the weights of model_name={name!r} lack {len(missing)} tensors of a {type(model).__name__}: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}."
        )
    return model


def _sentence_defaults(name: str) -> SentenceDefaults:
    modules = _read_json(name, "modules.json")
    if modules is None:
        return SentenceDefaults()
    kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    found = SentenceDefaults("mean", "Normalize" in kinds)
    if "Pooling" in kinds:
        found = replace(found, pooling=_name_pooling(_read_json(name, f"{kinds['Pooling']}/config.json") or {}))
    further = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if further:
        found = replace(found, pooling=f"followed by {', '.join(further)}")
    limit = (_read_json(name, "sentence_bert_config.json") or {}).get("max_seq_length")
    return replace(found, max_length=limit)


def _name_pooling(config: dict[str, Any]) -> str:
    """Our name of the pooling, or what its configuration says where it is none of ours."""
    ours = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last", "max_tokens": "max"}
    prefix = "pooling_mode_"
    chosen = [key.removeprefix(prefix) for key, value in config.items() if key.startswith(prefix) and value is True]
    if isinstance(config.get("pooling_mode"), str):
        chosen.append(config["pooling_mode"])
    named = ours.get(chosen[0], chosen[0]) if len(chosen) == 1 else " and ".join(chosen)
    return named


def choose_pooling(wanted: Pooling | None, default: str, name: str) -> Pooling:
    """The pooling that was asked for, or else the model's own.

    Raises:
        ValueError: Where neither is one of ours.
    """
    chosen = default if wanted is None else wanted
    if chosen not in get_args(Pooling):
        whose = "pooling" if wanted is not None else f"the pooling of model_name={name!r}"
        raise ValueError(
            f"{whose} is {chosen!r}; expected one of {', '.join(get_args(Pooling))}. Set pooling "
            "(--model.encoder.pooling=mean) to take the hidden states alone."
        )
    return cast(Pooling, chosen)


def _read_json(name: str, file: str) -> Any:
    """A JSON file of a model; ``None`` where it has none."""
    from transformers.utils import cached_file

    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(name, file, **options)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def positions(model: Any, tokenizer: Any) -> int | None:
    """Tokens that a model can take at once; ``None`` where there is no limit."""
    limits = [getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]  # else "very large"
    return min(known, default=None)


def layer_stack(model: nn.Module, layers: int) -> nn.ModuleList | None:
    """The list of a model's layers."""
    return next((part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == layers), None)


def describe_computation(model: Any, tokenizer: Any) -> str:
    """32 hexadecimal digits of what decides the features beside the weights: configuration and tokenizer."""
    config = {
        name: value
        for name, value in model.config.to_diff_dict().items()
        if name not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
    }
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = fast.to_str() if fast is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    text = json.dumps([type(model).__name__, config, type(tokenizer).__name__, words], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
