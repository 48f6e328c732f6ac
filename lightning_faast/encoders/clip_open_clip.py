"""CLIP models of open_clip."""

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_faast.data.extras import require
from lightning_faast.encoders.clip_towers import Towers
from lightning_faast.encoders.weights import describe_mismatch, find_weights, read_state_dict

PREFIX = "open_clip:"  # before the names of these models
_SCHEMES = ("local-dir:", "hf-hub:")  # open_clip's own: a folder or repository with configuration, weights, tokenizer


class OpenClipTowers(Towers):
    """A CLIP model of open_clip.

    Args:
        name: ``ARCHITECTURE/TAG``, ``ARCHITECTURE``, ``local-dir:FOLDER`` or ``hf-hub:REPOSITORY``.
        pretrained: ``False`` for random weights.
        checkpoint_path: File of weights instead of the tag's download.
    """

    model: Any

    def __init__(self, name: str, pretrained: bool, checkpoint_path: str | None) -> None:
        super().__init__()
        open_clip: Any = require("open_clip", "clip")
        if name.startswith(_SCHEMES):
            if checkpoint_path is not None:
                raise ValueError(f"model_name='{PREFIX}{name}' brings its weights: leave checkpoint_path out.")
            source = name
            self.model = _reach(
                name,
                lambda: open_clip.create_model(
                    name,
                    require_pretrained=pretrained,
                    load_weights=pretrained,
                    force_custom_text=True,
                    pretrained_text=False,
                ),
            )
        else:
            source, _, tag = name.partition("/")
            self.model = _create(open_clip, source, tag, pretrained, checkpoint_path)
        if not isinstance(self.model, open_clip.CustomTextCLIP):
            raise ValueError(
                f"model_name='{PREFIX}{name}' is a {type(self.model).__name__}, not a CLIP model of an image and a "
                "text tower. open_clip.list_models() lists them."
            )
        self.tokenize: Callable[[list[str]], Tensor] = _reach(name, lambda: open_clip.get_tokenizer(source))
        self.num_features = int(open_clip.get_model_config(source)["embed_dim"])
        self.data_config = _from_open_clip(name, self.model.visual.preprocess_cfg)

    def encode_images(self, images: Tensor) -> Tensor:
        """Embeddings [B, e] of images [B, 3, height, width]."""
        embeddings: Tensor = self.model.encode_image(images)
        return embeddings

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Embeddings [n, e] of n texts."""
        tokens = self.tokenize(texts).to(next(self.model.text.parameters()).device)
        embeddings: Tensor = self.model.encode_text(tokens)
        return embeddings

    def input_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that images pass through."""
        return self.model.visual.parameters()


def _create(open_clip: Any, architecture: str, tag: str, pretrained: bool, checkpoint_path: str | None) -> nn.Module:
    tags = _known_tags(open_clip, architecture)
    if tag and tag not in tags:
        raise ValueError(
            f"open_clip has no weights {tag!r} of {architecture!r}, only: {', '.join(tags) or 'none'}. Give "
            f"model_name='{PREFIX}{architecture}/TAG'."
        )
    gelu = bool(open_clip.get_model_config(architecture).get("quick_gelu"))
    if pretrained and not tag:
        _check_untagged(architecture, tags, gelu, checkpoint_path)
    trained = tags.get(tag, {})
    options = {
        "force_quick_gelu": gelu or bool(trained.get("quick_gelu")),
        "force_custom_text": True,  # the text tower as a module of its own, whatever the architecture
        "force_preprocess_cfg": trained,
        "pretrained_text": False,  # no weights from elsewhere for a text tower of transformers
    }

    def create(**more: str) -> nn.Module:
        model: nn.Module = _reach(architecture, lambda: open_clip.create_model(architecture, **options, **more))
        return model

    if not pretrained:
        return create()
    if checkpoint_path is None:
        remedy = "set checkpoint_path to a local file of its weights (--model.encoder.checkpoint_path=FILE), or "
        path = _reach(f"{architecture}/{tag}", lambda: Path(open_clip.download_pretrained(trained)), remedy)
    else:
        path = find_weights(checkpoint_path)
    try:
        model: nn.Module = open_clip.create_model(architecture, pretrained=str(path), **options)
    except Exception as error:  # open_clip's conversions raise anything for files they were not written for
        found = _without_prefix(read_state_dict(path))  # has errors of its own for what is no state dict
        expected = _without_prefix(create().state_dict())
        raise ValueError(
            f"{path} does not fit {architecture!r}: {describe_mismatch(found, expected)}. "
            "Give a file of this very model, or the model_name that belongs to the file."
        ) from error
    return model


def _check_untagged(
    architecture: str, tags: dict[str, dict[str, Any]], gelu: bool, checkpoint_path: str | None
) -> None:
    """Refuse a model name without a tag where one is needed: to download weights, or to know their activation."""
    if checkpoint_path is None:
        raise ValueError(
            f"model_name='{PREFIX}{architecture}' says no weights: add one of its tags "
            f"('{PREFIX}{architecture}/TAG': {', '.join(tags) or 'none'}), or set checkpoint_path."
        )
    if any(bool(config.get("quick_gelu")) != gelu for config in tags.values()):
        raise ValueError(
            f"weights of {architecture!r} come with two activations, and a file does not say which: add the tag that "
            f"{checkpoint_path} comes from ('{PREFIX}{architecture}/TAG': {', '.join(tags)}), or use "
            f"'{PREFIX}local-dir:FOLDER', with its open_clip_config.json."
        )


def _reach(name: str, load: Callable[[], Any], remedy: str = "") -> Any:
    """Call ``load``; where it finds no hub, say what to do: ``remedy`` or a local folder."""
    if name.startswith("local-dir:"):
        return load()
    try:
        return load()
    except (OSError, RuntimeError) as error:  # RuntimeError: open_clip's own, of a hub out of reach
        raise ConnectionError(
            f"'{PREFIX}{name}' needs files that cannot be downloaded. On a machine that reaches no hub, {remedy}set "
            f"model_name to '{PREFIX}local-dir:FOLDER' (--model.encoder.model_name=...), a folder with "
            "open_clip_config.json, weights and, where it is not CLIP's own, the tokenizer."
        ) from error


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as in files that have the text tower at the top, and in those that have it as a module of its own."""
    return {name.removeprefix("text."): tensor for name, tensor in state_dict.items()}


def _known_tags(open_clip: Any, architecture: str) -> dict[str, dict[str, Any]]:
    """Tags of an architecture's pretrained weights, with what open_clip knows of them."""
    models = open_clip.list_models()
    if architecture not in models:
        close = get_close_matches(architecture, models, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"{architecture!r} is no model of open_clip.{hint} open_clip.list_models() lists them; write "
            f"'{PREFIX}ARCHITECTURE/TAG'."
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    return {tag: open_clip.get_pretrained_cfg(architecture, tag) for tag in tags}


def _from_open_clip(name: str, config: dict[str, Any]) -> dict[str, Any]:
    crop_modes = {"shortest": "center", "squash": "squash"}
    if config["resize_mode"] not in crop_modes:  # "longest" pads with another color than timm does
        raise ValueError(
            f"'{PREFIX}{name}' prepares images with resize_mode {config['resize_mode']!r}, expected one of "
            f"{', '.join(map(repr, crop_modes))}. Choose another model."
        )
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return {
        "input_size": (3, height, width),
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": crop_modes[config["resize_mode"]],
    }
