"""timm's preparation of images: whole in the workers, or for images of one small size in batches on the device."""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_faast.data.extras import require

_CONFIG_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROP_MODES = ("center", "squash", "border")


def complete_data_config(
    data_config: Mapping[str, Any], interpolation: str | None = None, crop_pct: float | None = None
) -> dict[str, Any]:
    """Check a timm data configuration and put the user's own choices in it.

    Args:
        data_config: What ``timm.data.resolve_model_data_config(model)`` gives.
        interpolation: Replaces the configuration's.
        crop_pct: Replaces the configuration's.

    Raises:
        ValueError: Where keys are missing or unknown, or a value cannot be.
    """
    config = dict(data_config)
    if interpolation is not None:
        config["interpolation"] = interpolation
    if crop_pct is not None:
        config["crop_pct"] = crop_pct
    missing = [key for key in _CONFIG_KEYS if key not in config]
    unknown = [key for key in config if key not in _CONFIG_KEYS]
    if missing or unknown:
        raise ValueError(
            f"data_config must hold {', '.join(_CONFIG_KEYS)}; missing: {', '.join(missing) or 'none'}, unknown: "
            f"{', '.join(unknown) or 'none'}. timm.data.resolve_model_data_config(model) gives one."
        )
    for key in ("input_size", "mean", "std"):
        config[key] = tuple(config[key])  # lists where they come from YAML
        if len(config[key]) != 3:
            raise ValueError(f"data_config[{key!r}]={config[key]} must have three entries.")
    if config["input_size"][0] != 3:
        raise ValueError(f"data_config['input_size']={config['input_size']} must begin with 3: images come as RGB.")
    if config["interpolation"] not in _INTERPOLATIONS:
        raise ValueError(f"interpolation={config['interpolation']!r} must be one of {', '.join(_INTERPOLATIONS)}.")
    if config["crop_mode"] not in _CROP_MODES:
        raise ValueError(f"crop_mode={config['crop_mode']!r} must be one of {', '.join(_CROP_MODES)}.")
    if not config["crop_pct"] > 0:
        raise ValueError(f"crop_pct={config['crop_pct']} must be positive.")
    return config


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any 8-bit mode as RGB, the way timm's readers do it: alpha is dropped, grey is repeated.

    Raises:
        ValueError: For modes of more than 8 bits, which PIL would clip.
    """
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(
            f"An image has the mode {image.mode!r}, of more than 8 bits a pixel, which PIL would clip at 255. Convert "
            "the images to 8 bits, with the range that suits them."
        )
    return image.convert("RGB")


class WorkerTransform:
    """timm's own transform, from any PIL image to a normalized tensor.

    Args:
        data_config: A complete timm data configuration.
        augment: Arguments of ``timm.data.create_transform`` for training; ``None`` for evaluation.
    """

    def __init__(self, data_config: Mapping[str, Any], augment: Mapping[str, Any] | None = None) -> None:
        create_transform = require("timm.data", "vision").create_transform
        if augment is None:
            self.transform: Callable[[Image.Image], Tensor] = create_transform(**data_config, is_training=False)
        else:
            self.transform = create_transform(**{**data_config, **augment}, is_training=True)

    def __call__(self, image: Image.Image) -> Tensor:
        """Prepare one image: float32 ``(3, height, width)``."""
        return self.transform(to_rgb(image))


class DecodeTransform:
    """What is left to the workers where the device resizes: decode and check the size.

    Args:
        size: Width and height which every image must have.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Tensor:
        """Decode one image: uint8 ``(3, height, width)``."""
        if image.size != self.size:
            raise ValueError(
                f"An image is {image.size[0]}x{image.size[1]} pixels, while those looked at in setup were all "
                f"{self.size[0]}x{self.size[1]}, so that batches are resized on the device. Set device_transform=False "
                "(--data.device_transform=false) to resize each image in the workers."
            )
        return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).contiguous()


class DeviceTransform:
    """timm's evaluation transform for a batch of images of one size, on the batch's device.

    Resizing is the same arithmetic as PIL's: two passes with fixed-point coefficients, each rounded to 8 bits. The
    coefficients are integers / 2**22, so float64 holds every sum exactly and the result is PIL's to the bit (on MPS,
    which has no float64, to within one step of 255).

    Args:
        data_config: A complete timm data configuration.

    Raises:
        ValueError: For a configuration which it does not cover; see :meth:`unsupported`.

    Example:
        >>> from lightning_faast.encoders import VisionEncoder
        >>> config = VisionEncoder("test_vit", pretrained=False).data_config
        >>> transform = DeviceTransform(complete_data_config(config, None, None))
        >>> transform(torch.zeros(8, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([8, 3, 160, 160])
    """

    def __init__(self, data_config: Mapping[str, Any]) -> None:
        reason = self.unsupported(data_config)
        if reason:
            raise ValueError(f"Batches cannot be resized on the device with {reason}. Set device_transform=False.")
        self.config = dict(data_config)
        self._matrices: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    @staticmethod
    def unsupported(data_config: Mapping[str, Any]) -> str | None:
        """What in the configuration only timm's own transform can do; ``None`` where nothing."""
        height, width = data_config["input_size"][1:]
        if data_config["interpolation"] not in _FILTERS:
            return f"interpolation={data_config['interpolation']!r}"
        if data_config["crop_mode"] == "border" or (data_config["crop_mode"] == "center" and height != width):
            return f"crop_mode={data_config['crop_mode']!r} at {height}x{width}"
        if data_config["crop_pct"] > 1:
            return f"crop_pct={data_config['crop_pct']}"
        return None

    def __call__(self, images: Tensor) -> Tensor:
        """Resize, crop at the center and normalize.

        Args:
            images: uint8 ``(batch, 3, height, width)``.

        Returns:
            float32, ``(batch, *input_size)``.
        """
        rows, columns = self._get_matrices(images.shape[-2], images.shape[-1], images.device)
        mean, std = (torch.tensor(self.config[key], device=images.device)[:, None, None] for key in ("mean", "std"))
        parts = []
        for part in images.split(64):  # bounds the memory of the float64 intermediates
            part = _round_to_8_bits(part.to(columns.dtype) @ columns.T)
            part = _round_to_8_bits(rows @ part)
            parts.append(part.float().div_(255).sub_(mean).div_(std))
        return torch.cat(parts)

    def _get_matrices(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (height, width, device)
        if key not in self._matrices:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            target_height, target_width = self.config["input_size"][1:]
            resized_height, resized_width = self._resized(height, width)
            name = self.config["interpolation"]
            matrices = []
            for size, resized, target in (
                (height, resized_height, target_height),
                (width, resized_width, target_width),
            ):
                start = round((resized - target) / 2)
                matrix = _resize_matrix(size, resized, name)[start : start + target]
                matrices.append(torch.from_numpy(matrix).to(device=device, dtype=dtype))
            self._matrices[key] = (matrices[0], matrices[1])
        return self._matrices[key]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Size before the center crop, as in timm's and torchvision's transforms."""
        scaled = [math.floor(side / self.config["crop_pct"]) for side in self.config["input_size"][1:]]
        if self.config["crop_mode"] == "squash":
            return scaled[0], scaled[1]
        short = scaled[0]
        if height <= width:
            return short, int(short * width / height)
        return int(short * height / width), short


def _round_to_8_bits(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def _box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.clip(1 - np.abs(x), 0, None)


def _hamming(x: np.ndarray) -> np.ndarray:
    first, second = float(np.float32(0.54)), float(np.float32(0.46))  # PIL has them in single precision
    return np.where(np.abs(x) < 1, np.sinc(x) * (first + second * np.cos(np.pi * x)), 0.0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = -0.5 * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


# PIL's filters, each with its support; nearest is no filter
_FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "box": (_box, 0.5),
    "bilinear": (_bilinear, 1.0),
    "hamming": (_hamming, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}


@lru_cache(maxsize=16)
def _resize_matrix(size: int, resized: int, interpolation: str) -> np.ndarray:
    """PIL's resize along one side as a matrix ``(resized, size)``, float64."""
    if size == resized:
        return np.eye(size)  # PIL leaves the pass out
    kernel, support = _FILTERS[interpolation]
    scale = size / resized
    stretch = max(scale, 1.0)  # antialiasing when shrinking
    matrix = np.zeros((resized, size))
    for row in range(resized):
        center = (row + 0.5) * scale
        low = max(int(center - support * stretch + 0.5), 0)
        high = min(int(center + support * stretch + 0.5), size)
        weights = kernel((np.arange(low, high) - center + 0.5) * (1 / stretch))
        matrix[row, low:high] = weights / sum(weights.tolist())  # one after the other, to the last bit as PIL
    # 22 fractional bits, rounded half away from zero
    return np.trunc(matrix * 2**22 + np.copysign(0.5, matrix)) / 2**22
