"""Labels of every kind as class indices, and the few-shot choice of rows, from the labels alone."""

from collections.abc import Mapping, Sequence

import numpy as np

from lightning_faast.data.rows import LabelledRows


def encode_labels(
    splits: Mapping[str, LabelledRows], keep_unused: bool = True
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Number the classes alike in all splits.

    Classes that the source declares keep their order. Otherwise the first split defines them: its distinct labels,
    sorted.

    Args:
        splits: Rows by the names of their splits, the training split first.
        keep_unused: Whether declared classes that no row has are classes.

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
        declared = {split: _check_declared(split, rows, first) for split, rows in splits.items()}
        if keep_unused:
            return first.class_names, declared
        used = np.unique(np.concatenate(list(declared.values())))
        names = [first.class_names[index] for index in used]
        return names, {split: np.searchsorted(used, labels) for split, labels in declared.items()}
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


def _check_declared(split: str, rows: LabelledRows, first: LabelledRows) -> np.ndarray:
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


def hold_out(labels: np.ndarray, class_names: Sequence[str], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Part rows in two, each class alike, at random.

    Of a class with n rows, ``share * n`` are held out, rounded, but at least one and not all. The choice depends on the
    labels, ``share`` and ``seed`` alone, and a smaller share's rows are among a larger one's.

    Args:
        labels: Class indices, ``(rows,)``.
        class_names: Names of the classes, for the error.
        share: Between 0 and 1.
        seed: Another seed gives another choice.

    Returns:
        Indices of the rows that stay and of those held out, both int64, ascending; together they are all rows.

    Raises:
        ValueError: Where a class has one row only.
    """
    held = np.zeros(len(labels), dtype=bool)
    single = []
    for index, name in enumerate(class_names):
        rows = np.flatnonzero(labels == index)
        if len(rows) == 1:
            single.append(name)
        elif len(rows):
            count = min(max(round(share * len(rows)), 1), len(rows) - 1)
            held[np.random.default_rng([seed, index]).permutation(rows)[:count]] = True
    if single:
        raise ValueError(
            f"A share of each class cannot be held out, since {len(single)} classes have one row only: "
            f"{_some(np.array(single))}. Add rows to these classes, or remove them."
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def _some(values: np.ndarray, limit: int = 5) -> str:
    more = ", …" if len(values) > limit else ""
    return ", ".join(str(value) for value in values[:limit]) + more
