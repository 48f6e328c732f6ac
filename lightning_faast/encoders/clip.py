"""CLIP models as encoders of images that can also embed the names of classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_faast.encoders.class_names import name_classes
from lightning_faast.encoders.clip_open_clip import PREFIX, OpenClipTowers
from lightning_faast.encoders.clip_towers import Towers
from lightning_faast.encoders.clip_transformers import TransformersTowers

_TEXTS_A_BATCH = 256


class ClipEncoder(nn.Module):
    """A CLIP model: images in, image embeddings out, and class names as text embeddings in the same space.

    Frozen, which is the default, the encoder needs no gradients and stays in eval mode whatever ``train()`` is called
    on the module around it. The text tower is frozen always: what it gives are values, not something to train.

    Args:
        model_name: ``open_clip:ARCHITECTURE/TAG`` for a model of open_clip and the name of its pretrained weights
            (``open_clip:RN50/openai``), ``open_clip:local-dir:FOLDER`` for a folder with ``open_clip_config.json`` and
            weights; anything else is a CLIP model of transformers, by its name on the hub
            (``openai/clip-vit-base-patch32``) or a local folder of its files.
        pretrained: Load pretrained weights; ``False`` for random ones.
        checkpoint_path: Weights of an open_clip model from a local ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file
            instead of the download. The tag still says what belongs to them: activation and normalization.
        prompts: Templates with one ``{}`` for the name of a class. Several are an ensemble.
        class_texts: Text to put into the prompts instead of a class's name, by that name; elsewhere the name without
            underscores, and without the WordNet id that ImageNet's names begin with.
        normalize: Divide each image embedding by its Euclidean norm. A vector of zeros stays one.
        frozen: Keep the weights, and the eval mode, of the image tower as they are.

    Attributes:
        num_features: Width e of the embeddings.
        data_config: How images are prepared, in timm's words: ``input_size``, ``mean``, ``std``, ``interpolation``,
            ``crop_pct`` and ``crop_mode``.

    Raises:
        ValueError: Where model or weights are unknown, options exclude each other, a prompt has no ``{}``, or the file
            does not fit the model.
        FileNotFoundError: Where ``checkpoint_path`` leads to no file, or a folder lacks some.
        ConnectionError: Where files are to be downloaded and cannot be.
        ImportError: Where open_clip or transformers is not installed.

    Example:
        >>> encoder = ClipEncoder("open_clip:ViT-S-32-alt", pretrained=False)
        >>> encoder(torch.rand(2, *encoder.data_config["input_size"])).shape
        torch.Size([2, 256])
        >>> encoder.embed_classes(["cat", "dog", "school_bus"]).shape
        torch.Size([3, 256])

    References:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool = True,
        checkpoint_path: str | None = None,
        prompts: Sequence[str] = ("a photo of a {}.",),
        class_texts: Mapping[str, str] | None = None,
        normalize: bool = True,
        frozen: bool = True,
    ) -> None:
        super().__init__()
        self.prompts = _checked_prompts(prompts)
        self.class_texts = dict(class_texts or {})
        self.normalize = normalize
        self.frozen = frozen
        self.towers = _load_towers(model_name, pretrained, checkpoint_path)
        self.num_features = self.towers.num_features
        self.data_config: dict[str, Any] = self.towers.data_config
        self.towers.requires_grad_(False)
        if frozen:
            self.eval()
        else:
            for parameter in self.towers.input_parameters():
                parameter.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: Prepared as ``data_config`` says, floating point, ``(batch, 3, height, width)``.

        Returns:
            Embeddings ``(batch, num_features)``, float32 or wider where ``normalize`` is set.
        """
        # only ever switches gradients off: a surrounding no_grad stays in force for an encoder that is not frozen
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            embeddings = self.towers.encode_images(images)
            return _unit_norm(embeddings) if self.normalize else embeddings

    @torch.no_grad()
    def embed_classes(self, class_names: Sequence[str]) -> Tensor:
        """Embed each class's name, as the mean over the prompts of unit-norm embeddings, scaled to unit norm.

        Args:
            class_names: c names.

        Returns:
            Embeddings ``(c, num_features)`` of unit norm, float32 or wider, the same at every call.

        Raises:
            ValueError: Where names say nothing, such as numbers alone, and ``class_texts`` does not replace them.
        """
        names = name_classes(class_names, self.class_texts)
        texts = [prompt.replace("{}", name) for prompt in self.prompts for name in names]
        was_training = self.training
        self.eval()  # nothing is dropped out of a value
        try:
            batches = [texts[start : start + _TEXTS_A_BATCH] for start in range(0, len(texts), _TEXTS_A_BATCH)]
            embeddings = torch.cat([_unit_norm(self.towers.encode_texts(batch)) for batch in batches])
        finally:
            self.train(was_training)
        return _unit_norm(embeddings.unflatten(0, (len(self.prompts), len(names))).mean(0))

    def train(self, mode: bool = True) -> "ClipEncoder":
        """Set the training mode; a frozen encoder stays in eval mode."""
        return super().train(mode and not self.frozen)


def _load_towers(model_name: str, pretrained: bool, checkpoint_path: str | None) -> Towers:
    if checkpoint_path is not None and not pretrained:
        raise ValueError(
            f"pretrained=False asks for random weights, checkpoint_path={checkpoint_path!r} for those of a file. "
            "Leave one of them out."
        )
    if model_name.startswith(PREFIX):
        return OpenClipTowers(model_name.removeprefix(PREFIX), pretrained, checkpoint_path)
    if checkpoint_path is not None:
        raise ValueError(
            f"checkpoint_path={checkpoint_path!r} is for models of open_clip. For those of transformers, give the "
            f"folder that holds the model's files as model_name, instead of {model_name!r}."
        )
    return TransformersTowers(model_name, pretrained)


def _unit_norm(embeddings: Tensor) -> Tensor:
    # half precision overflows in the sum of squares
    return functional.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)


def _checked_prompts(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str):
        raise ValueError(f"prompts={prompts!r} must be a list of templates: [{prompts!r}].")
    wrong = [prompt for prompt in prompts if prompt.count("{}") != 1]
    if wrong or not prompts:
        raise ValueError(
            f"prompts must be templates with one {{}} for the name of the class; given {wrong or list(prompts)}, "
            "expected such as ['a photo of a {}.']."
        )
    return list(prompts)
