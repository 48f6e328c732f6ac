"""Which columns of a Hugging Face data set hold the images or texts, and which the labels."""

from collections.abc import Mapping, Sequence
from typing import Any

_IMAGE_NAMES = ("image", "img", "images", "pixels", "picture", "photo")
_TEXT_NAMES = ("text", "sentence", "content", "review", "utterance", "tweet", "comment", "document", "body")
_PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
_FURTHER_LABEL_NAMES = ("intent", "sentiment", "category", "topic")  # where no column is usual or of class labels


def find_image_column(features: Mapping[str, Any], wanted: str | None = None) -> str:
    """Name of the column of images.

    Args:
        features: The data set's features, column names to types.
        wanted: The user's choice; ``None`` looks for a usual name, then for the only column of the type ``Image``.

    Raises:
        ValueError: Where the choice does not exist, or no or several columns qualify.
    """
    if wanted is not None:
        return _checked("image_column", wanted, features)
    return _only("image_column", _named(features, _IMAGE_NAMES) or _typed(features, "Image"), features)


def find_label_column(features: Mapping[str, Any], wanted: str | None = None) -> str:
    """Name of the column of labels.

    Args:
        features: The data set's features, column names to types.
        wanted: The user's choice; ``None`` looks for a usual name, then for the only column of the type ``ClassLabel``,
            then for a name that is usual for text.

    Raises:
        ValueError: Where the choice does not exist, or no or several columns qualify.
    """
    if wanted is not None:
        return _checked("label_column", wanted, features)
    found = _named(features, _LABEL_NAMES) or _typed(features, "ClassLabel") or _named(features, _FURTHER_LABEL_NAMES)
    return _only("label_column", found, features)


def find_text_columns(
    features: Mapping[str, Any], label_column: str, text: str | None = None, pair: str | None = None
) -> tuple[str, ...]:
    """Names of the one or two columns of text.

    Args:
        features: The data set's features, column names to types.
        label_column: The column of labels, which is none of them.
        text: The user's choice of the first; ``None`` looks for two names that belong together (``premise`` and
            ``hypothesis``), then for a usual name, then for the only column of strings.
        pair: The user's choice of the second; ``None`` for texts that stand alone where ``text`` is chosen.

    Raises:
        ValueError: Where a choice does not exist or is no text, or no or several columns qualify.
    """
    if text is None and pair is not None:
        raise ValueError(f"pair_column={pair!r} is the second of two texts: set text_column, the first, too.")
    if text is not None:
        chosen = [_checked("text_column", text, features)]
        if pair is not None:
            chosen.append(_checked("pair_column", pair, features))
        for column in chosen:
            if not _is_text(features[column]):
                raise ValueError(
                    f"Column {column!r} holds {_type_name(features[column])}, expected text. The columns of the data "
                    f"set: {_listed(features)}."
                )
        return tuple(chosen)
    texts = {name: feature for name, feature in features.items() if name != label_column and _is_text(feature)}
    pairs = [names for names in _PAIR_NAMES if set(names) <= set(texts)]
    if len(pairs) == 1:
        return pairs[0]
    return (_only("text_column", _named(texts, _TEXT_NAMES) or list(texts), features),)


def _checked(argument: str, wanted: str, features: Mapping[str, Any]) -> str:
    if wanted not in features:
        raise ValueError(f"{argument}={wanted!r} is no column of the data set. Its columns: {_listed(features)}.")
    return wanted


def _only(argument: str, found: Sequence[str], features: Mapping[str, Any]) -> str:
    if len(found) != 1:
        problem = f"{' and '.join(found)} could all be meant" if found else "no column has a usual name or type"
        raise ValueError(f"{problem}: set {argument}. The columns of the data set: {_listed(features)}.")
    return found[0]


def _named(features: Mapping[str, Any], usual: Sequence[str]) -> list[str]:
    return [name for name in features if name.lower() in usual]


def _typed(features: Mapping[str, Any], kind: str) -> list[str]:
    return [name for name, feature in features.items() if type(feature).__name__ == kind]


def _is_text(feature: Any) -> bool:
    return _type_name(feature) in ("string", "large_string")


def _listed(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())


def _type_name(feature: Any) -> str:
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind
