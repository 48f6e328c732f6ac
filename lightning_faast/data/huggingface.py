"""Data sets that the library datasets reads: on the Hugging Face hub, in a local folder in its layout, in one file."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_faast.data.extras import require

#: The split that a single file is.
WHOLE = "train"
HOLD_OUT = (
    "To test on rows that are held out of the training split, a fifth of each class: --data.test_split=null "
    "--data.holdout=0.2."
)
Kind = Literal["file", "layout", "hub"]

# Text such as "null" or "NA" is text, which pandas would take for a missing value.
_CSV = {"keep_default_na": False}
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}


def find_kind(path: str, suffixes: Sequence[str]) -> Kind | None:
    """What a path leads to; ``None`` for a folder without any file of these suffixes.

    Args:
        path: What the user gave.
        suffixes: Of the files that can hold such data; a subset of parquet, CSV, TSV and JSON files'.

    Raises:
        ValueError: For a file with another suffix.
        FileNotFoundError: Where the path is neither there nor a possible name on the hub.
    """
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix not in suffixes:
            raise ValueError(
                f"path={path!r} is a file of an unknown kind: expected one that ends in {' or '.join(suffixes)}."
            )
        return "file"
    if local.is_dir():
        return "layout" if any(next(local.rglob(f"*{suffix}"), None) is not None for suffix in suffixes) else None
    if path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise FileNotFoundError(f"path={path!r} is not there, and no name on the Hugging Face hub looks like it.")
    return "hub"


class DatasetSource:
    """Splits of one data set that datasets reads.

    Args:
        path: A data set's name on the hub, a local folder in the hub's layout, or a file (its split is ``train``).
        name: Configuration of a data set on the hub.
        kind: What :func:`find_kind` says of the path.
        suffixes: As given there, most telling first.
        extra: The extra of this package that installs datasets.
    """

    def __init__(self, path: str, name: str | None, kind: Kind, suffixes: Sequence[str], extra: str) -> None:
        self.path = path
        self.name = name
        self.kind = kind
        self.suffixes = suffixes
        self.extra = extra

    def open(self, split: str) -> tuple[Any, str]:
        """A split as a memory-mapped ``datasets.Dataset``, and a text that changes whenever its files do.

        Raises:
            ValueError: Where there is no such split; the message lists those that there are.
            ConnectionError: Where the data set is on the hub and cannot be reached.
        """
        # before loading: files that are replaced meanwhile get another description
        origin = "" if self.kind == "hub" else self._describe_local_files()
        dataset = self.load(split)
        if self.kind == "hub":
            # cached under data set, configuration and commit
            caches = [Path(file["filename"]) for file in dataset.cache_files]
            origin = "\n".join("/".join(cache.parts[-5:]) for cache in caches)
        return dataset, origin

    def load(self, split: str) -> Any:
        """A split as a ``datasets.Dataset``, fetched where it is not on this machine yet; raises as :meth:`open`."""
        datasets = require("datasets", self.extra)
        what = self._arguments()
        try:
            return datasets.load_dataset(**what, split=split)
        except ValueError:
            there = list(datasets.load_dataset(**what))
            parts = {part.split("[")[0].strip() for part in re.split(r"\+", split)}
            if parts <= {*there, "all"}:
                raise  # a malformed slice, which datasets explains
            raise no_split(self.path, split, there) from None
        except OSError as error:  # ConnectionError, and DatasetNotFoundError for a name that is not on the hub
            if self.kind != "hub":
                raise
            raise ConnectionError(
                f"The data set {self.path!r} is not in the local cache and cannot be downloaded ({error}). On a "
                "machine that reaches no hub, give a local folder that holds a copy instead (--data.path=DIR)."
            ) from error

    def _arguments(self) -> dict[str, Any]:
        if self.kind == "hub":
            return {"path": self.path, "name": self.name}
        local = Path(self.path).expanduser()
        if self.kind == "file":
            reader, options = _READERS[local.suffix]
            return {"path": reader, "data_files": str(local), **options}
        suffix = next(suffix for suffix in self.suffixes if next(local.rglob(f"*{suffix}"), None) is not None)
        reader, options = _READERS[suffix]
        # the folder's layout says what the separator is
        return {"path": str(local), "name": self.name, **(_CSV if reader == "csv" else options)}

    def _describe_local_files(self) -> str:
        local = Path(self.path).expanduser()
        if local.is_file():
            return describe_files(local.parent, [local])
        # the README may say which files make a split
        files = sorted(path for suffix in self.suffixes for path in local.rglob(f"*{suffix}"))
        return f"{self.name} {describe_files(local, [*files, *local.glob('README.md')])}"


def read_labels(dataset: Any, column: str) -> np.ndarray:
    """Labels of all rows, int64 or strings, ``(rows,)``.

    Raises:
        ValueError: Where some rows have none, or the column holds something else.
    """
    # through arrow: neither the other columns nor a Python object for every row
    values = dataset.select_columns([column]).with_format("arrow")[:].column(0)
    is_text = str(values.type).endswith("string")
    labels = np.asarray(values.to_pylist()) if is_text else values.to_numpy()
    missing = values.null_count or (int((labels == "").sum()) if is_text else 0)
    if missing:
        raise ValueError(f"{missing} of {len(values)} rows have no label in column {column!r}.")
    if labels.dtype.kind not in "iubU":
        raise ValueError(
            f"Column {column!r} holds {values.type}, expected integers or strings. Set label_column to one of: "
            f"{', '.join(dataset.column_names)}."
        )
    return labels.astype(np.int64) if labels.dtype.kind in "iub" else labels


def class_names(dataset: Any, column: str) -> list[str] | None:
    """Names of the classes that a column declares, in the order of its integers; ``None`` where it declares none."""
    names = getattr(dataset.features[column], "names", None)
    return None if names is None else list(names)


def describe_files(root: Path, paths: Iterable[str | Path]) -> str:
    """Names within ``root``, bytes and times of last change in nanoseconds: reading none of them."""
    lines = []
    for path in paths:
        status = os.stat(path)
        lines.append(f"{os.path.relpath(path, root)} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(lines)


def no_split(path: str, split: str, there: Sequence[str]) -> ValueError:
    """The error for a split that a data set does not have."""
    hint = "" if split == WHOLE else f" {HOLD_OUT}"
    return ValueError(f"path={path!r} has no split {split!r}. Its splits: {', '.join(there)}.{hint}")


def refuse_options(path: str, kind: str, **options: str | None) -> None:
    """Refuse options that this kind of source has no use for.

    Raises:
        ValueError: Naming the first that is set.
    """
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option}={value!r} means nothing for path={path!r} ({kind}).")
