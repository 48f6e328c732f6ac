"""Where labelled texts come from: one split of a data set as rows that are read when asked for."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_faast.data.columns import find_label_column, find_text_columns
from lightning_faast.data.huggingface import (
    DatasetSource,
    class_names,
    find_kind,
    read_labels,
    refuse_options,
)
from lightning_faast.data.rows import LabelledRows, digest

_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json")


class TextRows(LabelledRows):
    """Texts, or pairs of texts, of a memory-mapped Hugging Face data set.

    Args:
        dataset: One split, a ``datasets.Dataset``.
        origin: What changes whenever the files behind the split do.
        text_column: Column of the texts; ``None`` to find it.
        pair_column: Column of the second of two texts.
        label_column: Column of the labels; ``None`` to find it.

    Raises:
        ValueError: Where columns are not found, or some rows have no text or label.
    """

    def __init__(
        self,
        dataset: Any,
        origin: str,
        text_column: str | None = None,
        pair_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        label_column = find_label_column(dataset.features, label_column)
        self.columns = find_text_columns(dataset.features, label_column, text_column, pair_column)
        self.dataset = dataset.select_columns(list(self.columns))
        for column in self.columns:
            missing = self.dataset.with_format("arrow")[:].column(column).null_count
            if missing:
                raise ValueError(f"{missing} of {len(dataset)} rows have no text in column {column!r}. Remove them.")
        self.origin = f"{origin} {dataset.split} {' '.join(self.columns)}"
        super().__init__(read_labels(dataset, label_column), class_names(dataset, label_column))

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[str] | list[tuple[str, str]]:
        """Texts, or pairs of texts, of some rows, in their order."""
        read = self.dataset[rows]
        columns = [list(read[column]) for column in self.columns]
        return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))

    def fingerprint(self) -> str:
        """From the files' names, sizes and times, or from the revision on the hub; the split and the columns."""
        return digest(self.origin.encode())


class TextSource:
    """A data set of texts with named splits, found by its path.

    Args:
        path: A local folder in the hub's layout or a file, both of parquet, CSV, TSV or JSON lines, or else a data
            set's name on the Hugging Face hub.
        name: Configuration of a data set on the hub.
        text_column: Column of the texts.
        pair_column: Column of the second of two texts.
        label_column: Column of the labels.

    Raises:
        FileNotFoundError: Where the path is neither there nor a possible name on the hub.
        ValueError: Where a folder holds no such files, or an option does not belong to this kind of source.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        text_column: str | None = None,
        pair_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        kind = find_kind(path, _SUFFIXES)
        if kind is None:
            raise ValueError(
                f"path={path!r} holds no files that end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}."
            )
        if kind == "file":
            refuse_options(path, "a file", name=name)
        self.text_column = text_column
        self.pair_column = pair_column
        self.label_column = label_column
        self._dataset = DatasetSource(path, name, kind, _SUFFIXES, "text")

    def download(self, splits: Sequence[str]) -> None:
        """Fetch what is not on this machine yet; on several processes, call it in one."""
        for split in splits:
            self._dataset.load(split)

    def open(self, split: str) -> TextRows:
        """The rows of one split.

        Args:
            split: A split's name, or a slice such as ``train[:80%]``.

        Raises:
            ValueError: Where there is no such split or column; the message lists those that there are.
            ConnectionError: Where the data set is on the hub and cannot be reached.
        """
        return TextRows(*self._dataset.open(split), self.text_column, self.pair_column, self.label_column)
