"""What every benchmark shares: interleaved runs, medians with their spread, ratios pair by pair, rows and sections."""

from __future__ import annotations

import gc
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        runs: Interleaved runs of each subject.
        quick: Tiny sizes, which show that the code works and nothing else.
    """

    runs: int = 7
    quick: bool = False


@dataclass(frozen=True)
class Samples:
    """One value a run."""

    values: tuple[float, ...]
    unit: Literal["s", "B", "images/s", "ratio"]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        scale, unit, digits = _scale(self.unit, self.median)
        low, middle, high = (f"{v / scale:.{digits}f}" for v in (min(self.values), self.median, max(self.values)))
        return f"{middle} ({low} to {high}){unit and ' ' + unit}"


def _scale(unit: str, median: float) -> tuple[float, str, int]:
    if unit == "s":
        for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if abs(median) >= scale or name == "µs":
                return scale, name, 2
    if unit == "B":
        return 1e6, "MB", 2
    if unit == "images/s":
        return 1.0, unit, 0
    return 1.0, "", 3 if abs(median) < 2 else 2


@dataclass(frozen=True)
class Target:
    """What a ratio has to be.

    Attributes:
        kind: ``"at most"``, of ours over the peer's; ``"at least"``, of the peer's over ours, "times faster"; or
            ``"none"``, of ours over the peer's and reported only.
        limit: The bound on the median.
        note: Words behind it.
    """

    kind: Literal["at most", "at least", "none"] = "none"
    limit: float = float("nan")
    note: str = ""

    def ratio(self, ours: float, theirs: float) -> float:
        return theirs / ours if self.kind == "at least" else ours / theirs

    def met(self, ratio: float) -> str:
        if self.kind == "none":
            return "n/a"
        return "yes" if (ratio <= self.limit if self.kind == "at most" else ratio >= self.limit) else "**no**"

    def __str__(self) -> str:
        words = {"at most": f"≤ {self.limit:g}", "at least": f"≥ {self.limit:g} times faster", "none": "none"}[
            self.kind
        ]
        return f"{words} {self.note}".strip()


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ours: Samples
    peer: str
    theirs: Samples
    ratios: Samples
    target: Target

    @classmethod
    def compare(cls, what: str, ours: Samples, peer: str, theirs: Samples, target: Target) -> Row:
        """Ratios are taken pair by pair, so that a slow minute of the machine slows both sides of each."""
        pairs = zip(ours.values, theirs.values, strict=True)
        ratios = Samples(tuple(target.ratio(a, b) for a, b in pairs), "ratio")
        return cls(what, ours, peer, theirs, ratios, target)

    @property
    def met(self) -> str:
        return self.target.met(self.ratios.median)

    def cells(self) -> list[str]:
        return [self.what, str(self.ours), self.peer, str(self.theirs), str(self.ratios), str(self.target), self.met]


@dataclass
class Section:
    """The outcome of one benchmark."""

    title: str
    conditions: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def seconds(subject: Callable[[], Any]) -> float:
    """Wall time of one call, without a garbage collection in its middle."""
    gc.disable()
    try:
        start = time.perf_counter()
        subject()
        return time.perf_counter() - start
    finally:
        gc.enable()


def interleave(subjects: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Time subjects in turn, A B C A B C …, after one round that does not count.

    Args:
        subjects: By name.
        runs: Counted rounds.

    Returns:
        The seconds of each subject, one a round.
    """
    for subject in subjects.values():
        seconds(subject)
    return in_turn({name: partial(seconds, subject) for name, subject in subjects.items()}, runs)


def in_turn(measurements: Mapping[str, Callable[[], Measured]], runs: int) -> dict[str, list[Measured]]:
    """Take measurements in turn, A B C A B C …: what each returns, one a round."""
    measured: dict[str, list[Measured]] = {name: [] for name in measurements}
    for _ in range(runs):
        gc.collect()
        for name, measurement in measurements.items():
            measured[name].append(measurement())
    return measured


def samples(values: Sequence[float], unit: Literal["s", "B", "images/s", "ratio"] = "s") -> Samples:
    return Samples(tuple(values), unit)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks on devices, workers and the overridden settings."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
