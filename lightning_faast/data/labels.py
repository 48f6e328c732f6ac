"""Labels of every kind as class indices, and the few-shot choice of rows, from the labels alone."""

from collections.abc import Mapping

import numpy as np

from lightning_faast.data.sources import ImageRows


def encode_labels(splits: Mapping[str, ImageRows]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Number the classes alike in all splits.

    Classes that the source declares keep their numbers. Otherwise the first split defines them: its distinct labels,
    sorted.

    Args:
        splits: Rows by the names of their splits, the training split first.

    Returns:
        The class names, and for each split the class indices, int64 ``(rows,)``.

    Raises:
        ValueError: Where a split has no rows, labels of another kind, or labels outside the classes.
    """
    for split, rows in splits.items():
        if not len(rows):
            raise ValueError(f"The split {split!r} has no rows.")
    first_name, first = next(iter(splits.items()))
    if first.class_names is not None:
        return first.class_names, {split: _check_declared(split, rows, first) for split, rows in splits.items()}
    values = np.unique(first.labels)
    encoded = {}
    for split, rows in splits.items():
        unknown = np.setdiff1d(rows.labels, values)
        if rows.labels.dtype.kind != values.dtype.kind or len(unknown):
            raise ValueError(
                f"The split {split!r} has {len(unknown)} labels that do not occur in {first_name!r}: "
                f"{_some(unknown)}. Every class must have a row there."
            )
        encoded[split] = np.searchsorted(values, rows.labels).astype(np.int64)
    return [str(value) for value in values], encoded


def _check_declared(split: str, rows: ImageRows, first: ImageRows) -> np.ndarray:
    if rows.class_names != first.class_names:
        raise ValueError(f"The split {split!r} declares other classes than the first split.")
    outside = (rows.labels < 0) | (rows.labels >= len(rows.class_names or ()))
    if outside.any():
        raise ValueError(
            f"{int(outside.sum())} rows of the split {split!r} have labels outside the {len(rows.class_names or ())} "
            f"classes ({_some(np.unique(rows.labels[outside]))}); -1 means unlabeled. Choose a labeled split."
        )
    return rows.labels.astype(np.int64)


def choose_per_class(labels: np.ndarray, num_classes: int, limit: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose at most ``limit`` rows of each class, at random.

    The choice depends on the labels, ``limit`` and ``seed`` alone, and a smaller limit's rows are among a larger one's.

    Args:
        labels: Class indices, ``(rows,)``.
        num_classes: Number of classes.
        limit: Rows a class, at least 1.
        seed: Another seed gives another choice.

    Returns:
        Indices of the chosen rows, int64, ascending; and how many there are of each class, int64 ``(num_classes,)``.
    """
    chosen = []
    for index in range(num_classes):
        rows = np.flatnonzero(labels == index)
        # one generator a class: a class's rows do not depend on those of the others
        chosen.append(np.random.default_rng([seed, index]).permutation(rows)[:limit])
    return np.sort(np.concatenate(chosen)), np.array([len(rows) for rows in chosen])


def _some(values: np.ndarray, limit: int = 5) -> str:
    more = ", …" if len(values) > limit else ""
    return ", ".join(str(value) for value in values[:limit]) + more
