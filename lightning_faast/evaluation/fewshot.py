"""Few shots as the field measures them: the mean over many episodes, with its 95 % interval."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_faast.associative.files import save_tensors, write_text
from lightning_faast.associative.learner import Learner
from lightning_faast.data.fewshot import EpisodeSampler

#: Called as ``make_head(in_features, ways)``; a class such as :class:`~lightning_faast.FastWeights` is one.
MakeHead = Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class Interval:
    r"""A mean over episodes and half the width of its 95 % interval, :math:`1.96\,s/\sqrt{n}`.

    Attributes:
        mean: Mean over n episodes.
        half_width: s is the standard deviation over the episodes (n - 1 in the denominator).

    Example:
        >>> import torch
        >>> from lightning_faast.evaluation.fewshot import Interval
        >>> print(Interval.of(torch.tensor([0.6, 0.8, 0.7, 0.7])))
        70.00 ± 8.00
    """

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        """Of one value an episode, [episodes], at least two.

        Raises:
            ValueError: For fewer.
        """
        if values.ndim != 1 or len(values) < 2:
            raise ValueError(f"An interval needs the values [episodes] of two episodes, given {list(values.shape)}.")
        values = values.double()
        return cls(float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values)))

    def __str__(self) -> str:
        """In percent."""
        return f"{100 * self.mean:.2f} ± {100 * self.half_width:.2f}"


@dataclass(frozen=True)
class EpisodeResult:
    """What one method reached.

    Attributes:
        accuracies: Share of query rows answered right in each episode, float64 [episodes].
        seconds: Wall time of all episodes: fits and predictions.
        episodes: The sampler's fingerprint, which says which episodes they were.
    """

    accuracies: Tensor
    seconds: float
    episodes: str

    @property
    def accuracy(self) -> Interval:
        """Mean accuracy with its interval."""
        return Interval.of(self.accuracies)

    def minus(self, other: EpisodeResult) -> Interval:
        """Mean difference to another method on the very same episodes, with its paired interval.

        Raises:
            ValueError: Where the episodes are others.
        """
        if self.episodes != other.episodes:
            raise ValueError("A paired difference needs both results on the same episodes: give both the same sampler.")
        return Interval.of(self.accuracies - other.accuracies)


def evaluate_episodes(make_head: MakeHead, keys: Tensor, sampler: EpisodeSampler) -> EpisodeResult:
    """Fit a head on the support of each episode and measure it on the query.

    One head learns all episodes, one after the other, from nothing each. While it does, torch uses one thread: more
    would only wait for each other at these sizes.

    Args:
        make_head: Called as ``make_head(d, ways)``; gives a :class:`~lightning_faast.associative.Learner`.
        keys: [N, d], any floating dtype and device; may be memory-mapped, only rows of episodes are read.
        sampler: Episodes of the same N rows.

    Raises:
        ValueError: Where keys and the sampler's labels have different numbers of rows.
        TypeError: Where the head cannot be fitted from keys.

    Example:
        >>> import torch
        >>> from lightning_faast import FastWeights
        >>> from lightning_faast.data.fewshot import EpisodeSampler
        >>> from lightning_faast.evaluation.fewshot import evaluate_episodes
        >>> labels = torch.arange(6).repeat(20)
        >>> keys = torch.nn.functional.one_hot(labels, 16) + 0.01 * torch.randn(120, 16)
        >>> sampler = EpisodeSampler(labels, ways=5, shots=1, queries=5, episodes=4)
        >>> print(evaluate_episodes(FastWeights, keys, sampler).accuracy)
        100.00 ± 0.00
    """
    if keys.ndim != 2 or len(keys) != len(sampler.labels):
        raise ValueError(
            f"keys must be [N, d] with the N={len(sampler.labels)} rows of the sampler's labels, given "
            f"{list(keys.shape)}."
        )
    head = make_head(keys.shape[1], sampler.ways)
    if not isinstance(head, Learner):
        raise TypeError(
            f"make_head made a {type(head).__name__}, which cannot be fitted from keys; expected a Learner such as "
            "FastWeights."
        )
    head = head.to(keys.device).eval()
    right = torch.zeros(len(sampler), dtype=torch.float64)
    start = time.perf_counter()
    with _one_thread(), torch.no_grad():
        for number, episode in enumerate(sampler):
            head.fit(keys[episode.support], episode.support_labels.to(keys.device))
            right[number] = head.score(keys[episode.query], episode.query_labels)
    return EpisodeResult(right, time.perf_counter() - start, sampler.fingerprint())


def compare_episodes(
    methods: Mapping[str, MakeHead], keys: Tensor, sampler: EpisodeSampler
) -> dict[str, EpisodeResult]:
    """:func:`evaluate_episodes` of several methods, all on the very same episodes.

    Args:
        methods: ``make_head`` by the method's name.
        keys: [N, d].
        sampler: Episodes of the same N rows.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from lightning_faast import FastWeights
        >>> from lightning_faast.data.fewshot import EpisodeSampler
        >>> from lightning_faast.evaluation.fewshot import compare_episodes
        >>> labels = torch.arange(6).repeat(20)
        >>> keys = torch.nn.functional.one_hot(labels, 16) + 0.1 * torch.randn(120, 16)
        >>> sampler = EpisodeSampler(labels, ways=5, shots=1, queries=5, episodes=20)
        >>> heads = {"discriminant": FastWeights, "regression": partial(FastWeights, readout="regression")}
        >>> results = compare_episodes(heads, keys, sampler)
        >>> results["discriminant"].minus(results["regression"]).half_width < 0.1
        True
    """
    return {name: evaluate_episodes(make_head, keys, sampler) for name, make_head in methods.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------- a report of several methods and shots


@dataclass(frozen=True)
class FewShotRow:
    """One method at one number of shots.

    Attributes:
        method: Its name.
        shots: Support rows a class.
        accuracy: Mean over the episodes; None where the method failed.
        half_width: Half the 95 % interval of that.
        difference: Mean difference to the reference method on the same episodes; None for the reference itself.
        difference_half_width: Half the paired 95 % interval of that.
        episodes_per_second: Fits and predictions.
        reason: Why the method failed.
    """

    method: str
    shots: int
    accuracy: float | None = None
    half_width: float | None = None
    difference: float | None = None
    difference_half_width: float | None = None
    episodes_per_second: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class FewShotReport:
    """Several methods at several numbers of shots.

    Attributes:
        ways: Classes an episode.
        queries: Query rows a class.
        episodes: How many.
        seed: Of the episodes.
        reference: The method that differences are taken to.
        rows: Shots after shots, in the order of the methods.
        accuracies: Of each row that has some, by ``"METHOD/SHOTS"``: float64 [episodes].
    """

    ways: int
    queries: int
    episodes: int
    seed: int
    reference: str
    rows: list[FewShotRow]
    accuracies: dict[str, Tensor]

    def json(self) -> str:
        """Everything but the accuracies of the single episodes."""
        content = {name: value for name, value in vars(self).items() if name not in ("rows", "accuracies")}
        return json.dumps({**content, "rows": [asdict(row) for row in self.rows]}, indent=1)

    def markdown(self) -> str:
        """A table, with a sentence above it that says what was measured."""
        lines = [
            f"{self.ways}-way, {self.queries} queries a class, {self.episodes} episodes (seed {self.seed}): mean "
            "accuracy in % with its 95 % interval, and the paired difference on the same episodes.",
            "",
            f"| method | shots | accuracy | difference to {self.reference} | episodes/s |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for row in self.rows:
            if row.reason is not None:
                # a sentence may have line breaks and bars, a cell must not
                figures = [" ".join(row.reason.split()).replace("|", "\\|"), "", ""]
            else:
                accuracy = _percent(row.accuracy, row.half_width)
                difference = _percent(row.difference, row.difference_half_width)
                figures = [accuracy, difference, f"{row.episodes_per_second:.0f}"]
            lines.append("| " + " | ".join([row.method, str(row.shots), *figures]) + " |")
        return "\n".join(lines) + "\n"

    def save(self, directory: Path) -> None:
        """Write ``fewshot.json``, ``fewshot.md`` and, one accuracy an episode, ``fewshot.safetensors``."""
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "fewshot.json", self.json())
        write_text(directory / "fewshot.md", self.markdown())
        save_tensors(self.accuracies, directory / "fewshot.safetensors", {})


def run(
    methods: Mapping[str, MakeHead],
    keys: Tensor,
    labels: Tensor,
    *,
    ways: int | None = 5,
    shots: Sequence[int] = (1, 5),
    queries: int = 15,
    episodes: int = 600,
    seed: int = 0,
    reference: str | None = None,
    advance: Callable[[str, int], None] = lambda method, shots: None,
) -> FewShotReport:
    """Measure several methods at several numbers of shots.

    A method that fails is a row that says why; the others go on.

    Args:
        methods: ``make_head`` by the method's name.
        keys: [N, d].
        labels: [N], class indices.
        ways: Classes an episode; None for all.
        shots: Numbers of support rows a class.
        queries: Query rows a class.
        episodes: Episodes of each number of shots.
        seed: Of the episodes.
        reference: The method that differences are taken to; the first where not given.
        advance: Told each method and number of shots that is done.

    Raises:
        ValueError: Where there is no method, the reference is none of them, or the rows do not suffice for an episode.
    """
    if not methods or not shots:
        raise ValueError("Name at least one method and one number of shots.")
    reference = next(iter(methods)) if reference is None else reference
    if reference not in methods:
        raise ValueError(f"reference={reference!r} must be one of the methods: {', '.join(methods)}.")
    # all of them before the first runs: rows that do not suffice are said at once
    samplers = [EpisodeSampler(labels, ways, count, queries, episodes, seed) for count in shots]
    rows: list[FewShotRow] = []
    accuracies: dict[str, Tensor] = {}
    for sampler in samplers:
        results: dict[str, EpisodeResult] = {}
        failures: dict[str, str] = {}
        for name, make_head in methods.items():
            try:
                results[name] = evaluate_episodes(make_head, keys, sampler)
            except (ValueError, TypeError, RuntimeError) as error:
                failures[name] = str(error)
            advance(name, sampler.shots)
        for name in methods:
            if name in failures:
                rows.append(FewShotRow(name, sampler.shots, reason=failures[name]))
                continue
            accuracies[f"{name}/{sampler.shots}"] = results[name].accuracies
            rows.append(_row(name, sampler, results[name], None if name == reference else results.get(reference)))
    return FewShotReport(samplers[0].ways, queries, episodes, seed, reference, rows, accuracies)


def _row(name: str, sampler: EpisodeSampler, result: EpisodeResult, reference: EpisodeResult | None) -> FewShotRow:
    difference = None if reference is None else result.minus(reference)
    return FewShotRow(
        name,
        sampler.shots,
        result.accuracy.mean,
        result.accuracy.half_width,
        None if difference is None else difference.mean,
        None if difference is None else difference.half_width,
        len(sampler) / result.seconds,
    )


def _percent(mean: float | None, half_width: float | None) -> str:
    return "" if mean is None or half_width is None else str(Interval(mean, half_width))
