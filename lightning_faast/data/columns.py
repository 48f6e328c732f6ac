"""Which column of a Hugging Face data set holds the images, and which the labels."""

from collections.abc import Mapping
from typing import Any

from lightning_faast.data.extras import require

_IMAGE_NAMES = ("image", "img", "images", "pixels", "picture", "photo")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")


def find_image_column(features: Mapping[str, Any], wanted: str | None = None) -> str:
    """Name of the column of images.

    Args:
        features: The data set's features, column names to types.
        wanted: The user's choice; ``None`` looks for a usual name, then for the only column of the type ``Image``.

    Raises:
        ValueError: Where the choice does not exist, or no or several columns qualify.
    """
    image_type = require("datasets", "vision").Image
    return _find("image_column", wanted, features, _IMAGE_NAMES, image_type)


def find_label_column(features: Mapping[str, Any], wanted: str | None = None) -> str:
    """Name of the column of labels.

    Args:
        features: The data set's features, column names to types.
        wanted: The user's choice; ``None`` looks for a usual name, then for the only column of the type ``ClassLabel``.

    Raises:
        ValueError: Where the choice does not exist, or no or several columns qualify.
    """
    label_type = require("datasets", "vision").ClassLabel
    return _find("label_column", wanted, features, _LABEL_NAMES, label_type)


def _find(argument: str, wanted: str | None, features: Mapping[str, Any], usual: tuple[str, ...], kind: type) -> str:
    columns = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"{argument}={wanted!r} is no column of the data set. Its columns: {columns}.")
        return wanted
    named = [name for name in features if name.lower() in usual]
    found = named or [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        problem = f"{' and '.join(found)} could all be meant" if found else "no column has a usual name or type"
        raise ValueError(f"{problem}: set {argument}. The columns of the data set: {columns}.")
    return found[0]


def _type_name(feature: Any) -> str:
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind
