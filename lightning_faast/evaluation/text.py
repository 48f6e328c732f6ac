"""A language model and its text, as a comparison needs to know them: the weights stay on disk."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace
from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule

from lightning_faast.evaluation.keys import digest_of
from lightning_faast.evaluation.measure import device_name
from lightning_faast.evaluation.methods import make
from lightning_faast.language.module import LanguageModule
from lightning_faast.language.pretrained import describe, load_tokenizer


@dataclass(frozen=True)
class TextBench:
    """A language model and its text.

    Attributes:
        model_name: Of the model.
        identity: Hash of what determines it, its precision and the tokens of both stages.
        device_name: Of the GPU, or ``cpu``.
        summary: What a reader of a report needs to know of it.
    """

    model_name: str
    identity: str
    device_name: str
    summary: dict[str, str]

    @classmethod
    def from_config(cls, config: Namespace) -> TextBench:
        """Of a resolved configuration; the text is tokenized where it has not been.

        Raises:
            ValueError: For another model, and a data module that cannot name its tokens.
        """
        if not issubclass(pkgutil.resolve_name(config.model.class_path), LanguageModule):
            raise ValueError(
                f"A comparison runs FaastModule or LanguageModule, and model.class_path is {config.model.class_path}."
            )
        model = config.model.init_args
        data: Any = make(LightningDataModule, config.data)
        missing = [name for name in ("fingerprint", "num_tokens", "use_tokenizer") if not hasattr(data, name)]
        if missing:
            raise ValueError(
                f"A comparison of language models must know its text, and {type(data).__name__} has no "
                f"{', '.join(missing)}. Use lightning_faast.data.LanguageDataModule."
            )
        data.use_tokenizer(load_tokenizer(model.model_name, model.gguf_file, model.trust_remote_code))
        data.prepare_data()
        data.setup("fit")
        about = {
            "model": describe(model.model_name, model.gguf_file),
            "dtype": model.dtype,
            "precision": str(config.trainer.precision or 32),
            **{stage: data.fingerprint(stage) for stage in ("train", "test")},
        }
        fabric = Fabric(accelerator=config.trainer.accelerator or "auto", devices=1)
        summary = {
            "model": model.model_name,
            "scored": f"{data.num_tokens('test'):,} tokens, {data.num_bytes('test'):,} bytes of text",
        }
        return cls(model.model_name, digest_of(about), device_name(fabric.device), summary)
