"""Causal language models and their tokenizers from the Hugging Face hub, a folder or a GGUF file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_faast.data.extras import require

#: In which numbers the weights are held; ``"auto"`` is as they were saved.
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def load_model(
    name: str, gguf_file: str | None = None, dtype: Dtype = "float32", trust_remote_code: bool = False
) -> Any:
    """A causal language model in eval mode.

    Args:
        name: A model's name on the hub, or a folder.
        gguf_file: Name of a GGUF file in it, which is de-quantized.
        dtype: Of the weights.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        FileNotFoundError: Where a folder is not there.
        ConnectionError: Where the model is on the hub and cannot be downloaded.
        ValueError: Where weights are missing, or the model brings code that may not run.
    """
    kind = require("transformers", "text").AutoModelForCausalLM
    options = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "output_loading_info": True}
    model, info = _load(kind, name, gguf_file, trust_remote_code=trust_remote_code, **options)
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would leave them random and only log it
        raise ValueError(
            f"The weights of model_name={name!r} lack {len(missing)} tensors of a {type(model).__name__}: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}. Is it a causal language model?"
        )
    return model.eval()


def load_tokenizer(name: str, gguf_file: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model; arguments and errors as of :func:`load_model`."""
    kind = require("transformers", "text").AutoTokenizer
    return _load(kind, name, gguf_file, trust_remote_code=trust_remote_code)


def _load(kind: Any, name: str, gguf_file: str | None, **options: Any) -> Any:
    _check_place(name)
    if gguf_file is not None:
        require("gguf", "gguf")
        options["gguf_file"] = gguf_file
    try:
        return kind.from_pretrained(name, **options)
    except OSError as error:
        if os.path.isdir(name):
            raise
        raise ConnectionError(
            f"The model {name!r} is not in the local cache and cannot be downloaded ({error}). On a machine that "
            "reaches no hub, give a folder that holds a copy instead (--model.model_name=DIR)."
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"model_name={name!r} brings Python code of its own, which is not run. If you trust it, set "
            "trust_remote_code=True (--model.trust_remote_code=true)."
        ) from error


def describe(name: str, gguf_file: str | None = None) -> str:
    """A text that changes whenever the weights of a model do, without reading them.

    Files of a folder count by name, size and time of last change; models on the hub by their revision.

    Args:
        name: As of :func:`load_model`.
        gguf_file: Likewise.
    """
    _check_place(name)
    folder = Path(name)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.is_file())
        listed = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return json.dumps([listed, gguf_file])
    config = _load(require("transformers", "text").AutoConfig, name, gguf_file)
    return json.dumps([name, getattr(config, "_commit_hash", None), gguf_file])


def _check_place(name: str) -> None:
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise FileNotFoundError(f"model_name={name!r} is no folder. Give a model's name on the hub, or a folder.")
