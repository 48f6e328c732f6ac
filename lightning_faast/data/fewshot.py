"""n-way k-shot episodes: small tasks drawn from labelled rows, fixed by a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Episode:
    """One task: learn from the support rows, answer the query rows.

    Attributes:
        classes: Class index that each label 0, …, ways - 1 of the episode stands for, int64 [ways].
        support: Rows to learn from, int64 [ways * shots], class after class.
        support_labels: Their labels in the episode, int64 [ways * shots].
        query: Rows to answer, none of them in the support, int64 [ways * queries], class after class.
        query_labels: Their labels in the episode, int64 [ways * queries].
    """

    classes: Tensor
    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor


class EpisodeSampler(Sequence[Episode]):
    """Episodes of ``ways`` classes with ``shots`` support and ``queries`` query rows each.

    Classes, their order and their rows are drawn uniformly without replacement. Episode i depends on the labels, the
    sizes, ``seed`` and i alone: any process can make any of them, in any order.

    Args:
        labels: Class index of every row, integers [N].
        ways: Classes an episode; None for all that occur.
        shots: Support rows a class.
        queries: Query rows a class.
        episodes: How many; at least 2, since an interval needs them.
        seed: Another seed gives other episodes.

    Raises:
        TypeError: Where the labels are no integers.
        ValueError: For negative labels, sizes that cannot be, fewer classes than ``ways``, or a class with fewer rows
            than ``shots`` and ``queries`` together.

    Example:
        >>> import torch
        >>> from lightning_faast.data.fewshot import EpisodeSampler
        >>> labels = torch.arange(10).repeat(30)
        >>> sampler = EpisodeSampler(labels, ways=5, shots=1, queries=15)
        >>> len(sampler)
        600
        >>> episode = sampler[0]
        >>> episode.support.shape, episode.query.shape
        (torch.Size([5]), torch.Size([75]))
        >>> torch.equal(labels[episode.query], episode.classes[episode.query_labels])
        True
    """

    def __init__(
        self,
        labels: Tensor | np.ndarray,
        ways: int | None,
        shots: int,
        queries: int,
        episodes: int = 600,
        seed: int = 0,
    ) -> None:
        values = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise TypeError(f"labels must be integers [N], given {values.dtype} {list(values.shape)}.")
        for option, value, least in (
            ("ways", ways, 2),
            ("shots", shots, 1),
            ("queries", queries, 1),
            ("episodes", episodes, 2),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{option}={value} must be at least {least}.")
        if len(values) and values.min() < 0:
            raise ValueError(f"labels hold {values.min()}: class indices begin with 0. Leave unlabeled rows out.")
        self.labels = values.astype(np.int64)
        classes, counts = np.unique(self.labels, return_counts=True)
        self.ways = len(classes) if ways is None else ways
        self.shots = shots
        self.queries = queries
        self.episodes = episodes
        self.seed = seed
        if len(classes) < max(self.ways, 2):
            raise ValueError(
                f"ways={ways}, and the rows have {len(classes)} classes. Choose fewer ways, or other rows."
            )
        short = np.flatnonzero(counts < shots + queries)
        if len(short):
            least = short[counts[short].argmin()]
            raise ValueError(
                f"shots={shots} and queries={queries} need {shots + queries} rows of every class, and {len(short)} of "
                f"{len(classes)} classes have fewer: class {classes[least]} has {counts[least]}. Choose fewer shots or "
                "queries, or leave these classes out."
            )
        self._classes = classes
        self._rows = np.split(np.argsort(self.labels, kind="stable"), np.cumsum(counts)[:-1])

    def __len__(self) -> int:
        return self.episodes

    @overload
    def __getitem__(self, index: int) -> Episode: ...
    @overload
    def __getitem__(self, index: slice) -> list[Episode]: ...
    def __getitem__(self, index: int | slice) -> Episode | list[Episode]:
        """Episode of a number, or those of a slice."""
        numbers = range(self.episodes)[index]  # as a list takes negative numbers, and refuses those outside
        return self._make(numbers) if isinstance(numbers, int) else [self._make(number) for number in numbers]

    def __iter__(self) -> Iterator[Episode]:
        return map(self._make, range(self.episodes))

    def fingerprint(self) -> str:
        """32 hexadecimal digits of what determines the episodes."""
        sizes = json.dumps([self.ways, self.shots, self.queries, self.episodes, self.seed])
        return hashlib.sha256(sizes.encode() + self.labels.tobytes()).hexdigest()[:32]

    def _make(self, number: int) -> Episode:
        generator = np.random.default_rng([self.seed, number])
        chosen = generator.choice(len(self._classes), self.ways, replace=False)
        size = self.shots + self.queries
        rows = np.stack([self._rows[i][generator.choice(len(self._rows[i]), size, replace=False)] for i in chosen])
        labels = torch.arange(self.ways)
        return Episode(
            classes=torch.from_numpy(self._classes[chosen]),
            support=torch.from_numpy(rows[:, : self.shots].reshape(-1)),
            support_labels=labels.repeat_interleave(self.shots),
            query=torch.from_numpy(rows[:, self.shots :].reshape(-1)),
            query_labels=labels.repeat_interleave(self.queries),
        )
