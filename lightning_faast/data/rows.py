"""Labelled rows of one split, whatever they are of."""

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class LabelledRows(ABC):
    """Labelled rows of one split. Reading the labels reads nothing else.

    Attributes:
        labels: The labels as the source has them, integers or strings, ``(rows,)``.
        class_names: Names of the classes 0, 1, …, where the source declares them.
    """

    def __init__(self, labels: np.ndarray, class_names: list[str] | None = None) -> None:
        self.labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change whenever the rows or their order do; labels are not part of it."""


def digest(*parts: Any) -> str:
    """32 hexadecimal digits of bytes, or buffers of them, one after the other."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()[:32]
