"""CLIP models of transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_faast.data.extras import require
from lightning_faast.encoders.clip_towers import Towers


class TransformersTowers(Towers):
    """A ``CLIPModel`` of transformers.

    Args:
        name: Repository on the hub, or a local folder with the model's files.
        pretrained: ``False`` for random weights in the shape of its configuration.
    """

    model: Any

    def __init__(self, name: str, pretrained: bool) -> None:
        super().__init__()
        transformers = require("transformers", "clip")
        try:
            kind = transformers.CLIPConfig.get_config_dict(name)[0].get("model_type")
            if kind != "clip":
                raise ValueError(
                    f"model_name={name!r} is a model of the type {kind!r}, expected 'clip'. Models of open_clip are "
                    f"written 'open_clip:ARCHITECTURE/TAG'."
                )
            self.model = _pretrained_clip(transformers, name) if pretrained else _random_clip(transformers, name)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            processor = transformers.CLIPImageProcessor.from_pretrained(name)
        except OSError as error:
            if Path(name).expanduser().is_dir():
                raise FileNotFoundError(
                    f"the folder model_name={name!r} lacks files of a CLIP model (config.json, model.safetensors, "
                    f"preprocessor_config.json, tokenizer.json or vocab.json and merges.txt): {error}"
                ) from error
            raise ConnectionError(
                f"The CLIP model {name!r} cannot be downloaded. On a machine that reaches no hub, set model_name to a "
                "local folder with its files (--model.encoder.model_name=FOLDER)."
            ) from error
        self.num_features = int(self.model.config.projection_dim)
        self.data_config = _from_transformers(name, processor)

    def encode_images(self, images: Tensor) -> Tensor:
        """Embeddings [B, e] of images [B, 3, height, width]."""
        embeddings: Tensor = self.model.visual_projection(self.model.vision_model(pixel_values=images).pooler_output)
        return embeddings

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Embeddings [n, e] of n texts."""
        context = self.model.config.text_config.max_position_embeddings
        # all to one length, so that an embedding does not depend on the texts beside it
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=context, return_tensors="pt")
        tokens = tokens.to(self.model.text_projection.weight.device)
        pooled = self.model.text_model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        embeddings: Tensor = self.model.text_projection(pooled)
        return embeddings

    def input_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that images pass through."""
        yield from self.model.vision_model.parameters()
        yield from self.model.visual_projection.parameters()


def _pretrained_clip(transformers: Any, name: str) -> nn.Module:
    model, info = transformers.CLIPModel.from_pretrained(name, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would leave them random and only log it
        raise ValueError(
            f"the weights of model_name={name!r} lack {len(missing)} tensors of a CLIP model: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}. Give a model with both towers."
        )
    return model.float()


def _random_clip(transformers: Any, name: str) -> nn.Module:
    return transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(name))


def _from_transformers(name: str, processor: Any) -> dict[str, Any]:
    edge, crop = dict(processor.size).get("shortest_edge"), dict(processor.crop_size or {})
    if not (edge and crop and processor.do_resize and processor.do_center_crop and processor.do_normalize):
        raise ValueError(
            f"model_name={name!r} prepares images otherwise than CLIP does (shortest edge, center crop, "
            "normalization); its preprocessor_config.json must say these."
        )
    return {
        "input_size": (3, crop["height"], crop["width"]),
        "mean": tuple(processor.image_mean),
        "std": tuple(processor.image_std),
        "interpolation": {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}[
            int(processor.resample)
        ],
        "crop_pct": crop["height"] / edge,
        "crop_mode": "center",
    }
