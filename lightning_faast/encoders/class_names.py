"""What to say for a class: from the names in a data set to text that an encoder has a chance to understand."""

import re
import warnings
from collections.abc import Mapping, Sequence

_WORDNET_ID = re.compile(r"^n\d{8}(?:[\s_,-]+|$)")  # how ImageNet's names begin: "n02085620 Chihuahua"


def name_classes(class_names: Sequence[str], class_texts: Mapping[str, str] | None = None) -> list[str]:
    """Text for each class: ``class_texts`` where it has one, else the name without WordNet id and underscores.

    Args:
        class_names: Names of the classes as the data set has them.
        class_texts: Text to take instead of a name, by that name.

    Returns:
        One text a class, in the same order.

    Raises:
        ValueError: Where names say nothing (all of them numbers, WordNet ids alone, nothing at all), or
            ``class_texts`` names a class that is not there.

    Example:
        >>> name_classes(["n04146614 school bus", "great_white_shark", "automobile"], {"automobile": "car"})
        ['school bus', 'great white shark', 'car']
    """
    given = dict(class_texts or {})
    unknown = [name for name in given if name not in class_names]
    if unknown:
        raise ValueError(
            f"class_texts has {_some(unknown)}, which the data do not have. Their classes: {_some(class_names)}."
        )
    texts = [given[name].strip() if name in given else _readable(name) for name in class_names]
    silent = [name for name, text in zip(class_names, texts, strict=True) if not text]
    numbers = [name for name in class_names if name not in given and name.strip().isdecimal()]
    if len(numbers) == len(class_names):  # among words a number may well be a name: 737 among aircraft
        silent = numbers
    if silent:
        raise ValueError(
            f"the class names {_some(silent)} say nothing that an encoder of text could understand. Give the text of "
            "each by class_texts={name: text} (--model.encoder.class_texts on the command line), or do without "
            "class_embeddings."
        )
    first: dict[str, str] = {}
    for name, text in zip(class_names, texts, strict=True):
        if text in first:
            warnings.warn(
                f"the classes {first[text]!r} and {name!r} have the same text {text!r}, so that their embeddings "
                "cannot tell them apart. Set class_texts for one of them.",
                stacklevel=2,
            )
        first.setdefault(text, name)
    return texts


def _readable(name: str) -> str:
    return " ".join(_WORDNET_ID.sub("", name, count=1).replace("_", " ").split())


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(map(repr, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")
