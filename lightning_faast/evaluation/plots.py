"""Figures of a comparison, drawn with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_faast.associative.files import atomic_path
from lightning_faast.data.extras import require
from lightning_faast.evaluation.formats import duration, shots_name, shots_title, size
from lightning_faast.evaluation.palette import THEMES, Theme, style
from lightning_faast.evaluation.summary import Comparison, Entry

_MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "down": "v", "cross": "X"}
_SIZE = (6.6, 4.4)  # inches
_LABEL = 8.5  # points of a direct label
#: Bins of a reliability diagram with fewer rows are left out: their accuracy is chance.
SPARSE = 10
#: With more methods than these, names beside scattered marks would cover them: a legend it is.
CROWDED = 9
#: What is plotted of how well a method predicts, and what its axis is called, by the comparison's unit.
QUALITY = {"shot": "Accuracy", "token": "Perplexity"}
QUALITY_LABELS = {"shot": "Accuracy, %", "token": "Perplexity, log"}
#: What an axis of shots is called, by the comparison's unit.
SHOTS_LABELS = {"shot": "Labelled examples a class, log", "token": "Tokens learned, log"}
#: Where an axis of seconds has its ticks.
TIME_TICKS = (1e-3, 1e-2, 1e-1, 1, 10, 60, 600, 3600, 36000, 360000)


def figures(comparison: Comparison, theme: str = "light") -> dict[str, Any]:
    """Draw what can be drawn of a comparison.

    Args:
        comparison: The runs.
        theme: ``"light"`` or ``"dark"``.

    Returns:
        ``matplotlib.figure.Figure`` by name: ``accuracy_time``, ``accuracy_shots``, ``accuracy_memory``,
        ``reliability``, ``regularization_path``; without those for which the records have no figures. No global state
        of matplotlib is read or changed.

    Raises:
        ImportError: Where matplotlib is not installed.
    """
    drawn = {}
    with _settings(THEMES[theme]):
        for name, draw in _FIGURES.items():
            figure = require("matplotlib.figure", "compare").Figure(figsize=_SIZE, layout="constrained")
            if draw(_Canvas(comparison, THEMES[theme], figure)):
                drawn[name] = figure
    return drawn


def write_figures(comparison: Comparison, directory: Path) -> list[Path]:
    """Write every figure as PNG (200 dpi) and SVG, light as ``NAME`` and dark as ``NAME_dark``; atomically.

    Text in the SVG files stays text, which can be searched and edited.

    Returns:
        The paths.
    """
    paths = []
    for theme, ending in (("light", ""), ("dark", "_dark")):
        for name, figure in figures(comparison, theme).items():
            for kind in ("png", "svg"):
                path = directory / f"{name}{ending}.{kind}"
                with atomic_path(path) as temporary:
                    save_figure(figure, temporary, kind, THEMES[theme])
                paths.append(path)
    return paths


def save_figure(figure: Any, target: Any, kind: str, theme: Theme) -> None:
    """Write one figure to a path or an open file as ``"png"`` or ``"svg"``; the same bytes every time."""
    with _settings(theme):
        figure.savefig(target, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)


@contextmanager
def _settings(theme: Theme) -> Iterator[None]:
    """Matplotlib as these figures need it, and afterwards as it was."""
    settings = {
        "font.family": "sans-serif",
        "font.sans-serif": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
        "font.size": 10,
        "svg.fonttype": "none",
        "svg.hashsalt": "comparison",
        "text.color": theme.ink,
        "text.parse_math": False,  # names of methods are no formulas
        "figure.facecolor": theme.ground,
        "savefig.facecolor": theme.ground,
        "axes.facecolor": theme.ground,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlepad": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.rule,
        "grid.linewidth": 0.7,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "ytick.left": False,
        "figure.constrained_layout.h_pad": 0.12,
        "figure.constrained_layout.w_pad": 0.12,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
    }
    with require("matplotlib", "compare").rc_context(settings):
        yield


class _Canvas:
    """A figure in the making: what all of them need."""

    def __init__(self, comparison: Comparison, theme: Theme, figure: Any) -> None:
        self.comparison, self.theme, self.figure = comparison, theme, figure
        self._labels: list[tuple[float, float, str, str]] = []

    @property
    def methods(self) -> list[str]:
        """The reference last, so that it is drawn above the others; these in reverse, as legends turn them round."""
        return [*reversed(self.comparison.others), self.comparison.reference]

    def look(self, method: str) -> dict[str, Any]:
        """Color, marker, size and height of a method's line."""
        if method == self.comparison.reference:
            return {"color": self.theme.accent, "marker": "o", "lw": 2.4, "ms": 7, "zorder": 5}
        color, mark = style(self.comparison.others.index(method))
        return {"color": self.theme.series[color], "marker": _MARKERS[mark], "lw": 1.1, "ms": 5, "zorder": 3}

    def line(self, axes: Any, method: str, x: Sequence[float], y: Sequence[float], **others: Any) -> None:
        """Draw a method's points, joined, with a rim that keeps marks apart where they meet."""
        axes.plot(x, y, mec=self.theme.ground, mew=0.8, **{**self.look(method), **others})

    def label(self, text: str, color: str, x: float, y: float) -> None:
        """Write to the right of a point, once :meth:`place_labels` knows all of them."""
        self._labels.append((x, y, text, color))

    def name(self, method: str, x: float, y: float) -> None:
        """Write a method's name to the right of a point."""
        self.label(method, self.look(method)["color"], x, y)

    def legend(self, axes: Any, place: Any, loc: str) -> None:
        """A legend of the axes' methods in ``place``, axes or figure; the reference first."""
        handles, labels = axes.get_legend_handles_labels()
        place.legend(handles[::-1], labels[::-1], loc=loc, fontsize=_LABEL, borderpad=0, labelcolor=self.theme.ink)

    def place_labels(self, axes: Any) -> None:
        """Write the labels, each at its point's height or as near to it as leaves them apart."""
        self.figure.draw_without_rendering()  # the layout, and with it the scale of the axes, is settled here
        dots = self.figure.dpi / 72  # pixels of a point
        box = axes.bbox
        ends = sorted((*axes.transData.transform((x, y)), x, y, text, color) for x, y, text, color in self._labels)
        # Labels that reach below each other share a column, in which they are kept apart.
        columns: list[list[Any]] = []
        reach = -math.inf
        for end in ends:
            if end[0] > reach:
                columns.append([])
            columns[-1].append(end)
            reach = max(reach, end[0] + (11 + 0.6 * _LABEL * len(end[4])) * dots)
        leader = {"arrowstyle": "-", "lw": 0.6, "alpha": 0.7, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
        for column in columns:
            column.sort(key=lambda end: end[1])
            heights = apart([end[1] for end in column], 1.25 * _LABEL * dots, box.y0 + 4 * dots, box.y1)
            for height, (_, own, x, y, text, color) in zip(heights, column, strict=True):
                axes.annotate(
                    text,
                    (x, y),
                    xytext=(11, (height - own) / dots),
                    textcoords="offset points",
                    va="center",
                    color=color,
                    fontsize=_LABEL,
                    fontweight="bold" if text == self.comparison.reference else "normal",
                    bbox={"facecolor": self.theme.ground, "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
                    arrowprops=leader | {"color": color} if abs(height - own) > 0.6 * _LABEL * dots else None,
                    annotation_clip=False,
                    zorder=6,
                )


def apart(heights: Sequence[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Move ascending heights as little as leaves ``gap`` between neighbors, and all between ``low`` and ``high``.

    Example:
        >>> apart([0.0, 1.0, 10.0], 4.0)
        [-1.5, 2.5, 10.0]
        >>> apart([0.0, 1.0, 10.0], 4.0, low=0.0)
        [0.0, 4.0, 10.0]
    """
    groups: list[tuple[float, int]] = []  # center and size of each run of labels that touch
    for height in heights:
        center, count = height, 1
        while True:
            half = (count - 1) * gap / 2
            center = max(low + half, min(high - half, center))
            if not groups or center - groups[-1][0] >= (count + groups[-1][1]) * gap / 2:
                break
            before, size_before = groups.pop()
            center = (center * count + before * size_before) / (count + size_before)
            count += size_before
        groups.append((center, count))
    return [center + (i - (count - 1) / 2) * gap for center, count in groups for i in range(count)]


# ---------------------------------------------------------------------- one function a figure; False: nothing to draw


def _against_cost(
    canvas: _Canvas, cost: str, title: str, label: str, unit: Callable[[float], str], ticks: Sequence[float] | None
) -> bool:
    """Quality against a cost, one line a method from few shots to many; a cost of 0 has no place on a log axis."""
    axes = canvas.figure.add_subplot()
    crowded = len(canvas.methods) > CROWDED
    for method in canvas.methods:
        known = [
            (getattr(e, cost), quality[0])
            for e in _done(canvas.comparison, method)
            if (quality := plotted(canvas.comparison, e)) is not None and (getattr(e, cost) or 0) > 0
        ]
        if not known:
            continue
        x, y = [x for x, _ in known], [y for _, y in known]
        canvas.line(axes, method, x, y, label=method)
        if not crowded:
            canvas.name(method, x[-1], y[-1])
    if not axes.lines:
        return False
    axes.set_xscale("log")
    axes.set(title=f"{QUALITY[canvas.comparison.unit]} against {title}", xlabel=label)
    _quality_axis(canvas, axes)
    axes.margins(x=0.05)
    low, high = axes.get_xlim()
    if ticks is not None:
        axes.set_xticks([tick for tick in ticks if low < tick < high])
    if crowded:
        canvas.legend(axes, canvas.figure, loc="outside right upper")
    else:
        axes.set_xlim(low, high * (high / low) ** 0.28)  # room for the names at the right
    axes.xaxis.set_major_formatter(lambda value, _: unit(value).replace(".0 ", " "))
    axes.minorticks_off()
    axes.grid(axis="x", visible=False)
    canvas.place_labels(axes)
    return True


def _accuracy_time(canvas: _Canvas) -> bool:
    return _against_cost(canvas, "seconds", "adaptation time", "Adaptation time, log", duration, TIME_TICKS)


def _accuracy_memory(canvas: _Canvas) -> bool:
    label = "Bytes to go on learning, beside the encoder, log"
    return _against_cost(canvas, "bytes_to_update", "memory", label, size, None)


def _accuracy_shots(canvas: _Canvas) -> bool:
    """Quality with its 95 % interval at each number of shots; "all" takes the next place at the right."""
    axes = canvas.figure.add_subplot()
    places = shot_places(canvas.comparison.shots)
    for method in canvas.methods:
        known = [
            (places[e.shots], quality)
            for e in _done(canvas.comparison, method)
            if (quality := plotted(canvas.comparison, e)) is not None
        ]
        if not known:
            continue
        x = [place for place, _ in known]
        low, high = [quality[1] for _, quality in known], [quality[2] for _, quality in known]
        if method == canvas.comparison.reference:
            axes.fill_between(x, low, high, color=canvas.theme.accent, alpha=0.16, lw=0, zorder=2)
        else:
            axes.vlines(x, low, high, color=canvas.look(method)["color"], lw=0.9, alpha=0.45, zorder=2)
        canvas.line(axes, method, x, [quality[0] for _, quality in known])
        canvas.name(method, x[-1], known[-1][1][0])
    if not axes.lines:
        return False
    axes.set_xticks(list(places.values()), [shots_name(shots) for shots in places])
    unit = canvas.comparison.unit
    axes.set(title=f"{QUALITY[unit]} against {unit}s", xlabel=SHOTS_LABELS[unit])
    _quality_axis(canvas, axes)
    left, right = min(places.values()), max(places.values())
    axes.set_xlim(left - 0.3, right + max(1.0, 0.36 * (right - left)))
    axes.grid(axis="x", visible=False)
    canvas.place_labels(axes)
    return True


def plotted(comparison: Comparison, entry: Entry) -> tuple[float, float, float] | None:
    """How high an entry lies on the axis of quality, with its interval: accuracy in percent, or perplexity.

    The interval of a perplexity by itself is not known.
    """
    if comparison.unit == "token":
        height = entry.perplexity
        return None if height is None else (height, height, height)
    accuracy = entry.accuracy
    return None if accuracy is None else (100 * accuracy.value, 100 * accuracy.low, 100 * accuracy.high)


def _quality_axis(canvas: _Canvas, axes: Any) -> None:
    unit = canvas.comparison.unit
    axes.set_ylabel(QUALITY_LABELS[unit])
    if unit == "token":
        axes.set_yscale("log")
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter(lambda value, _: f"{value:g}")


def shot_places(shots: Sequence[int | None]) -> dict[int | None, float]:
    """Where each number of shots lies on an axis: its logarithm to base 2; "all" one step beyond the last.

    Example:
        >>> shot_places([1, 4, 16, None])
        {1: 0.0, 4: 2.0, 16: 4.0, None: 6.0}
    """
    places: dict[int | None, float] = {number: math.log2(number) for number in shots if number is not None}
    if None in shots:
        known = sorted(places.values())
        steps = [b - a for a, b in pairwise(known)]
        places[None] = known[-1] + (steps[-1] if steps else 1.0) if known else 0.0
    return places


def reliability_shots(comparison: Comparison) -> int | None:
    """The largest number of shots at which the reference has a reliability; the largest of all where it has none."""
    own = [e.shots for e in comparison.entries if e.bins and e.method == comparison.reference]
    return own[-1] if own else comparison.shots[-1]


def _reliability(canvas: _Canvas) -> bool:
    """Accuracy against confidence in 15 bins, and below it how many test rows each bin has."""
    shots = reliability_shots(canvas.comparison)
    entries = {m: canvas.comparison.entry(m, shots) for m in canvas.methods}
    drawn = {m: entry for m, entry in entries.items() if entry is not None and entry.bins}
    if not drawn:
        return False
    canvas.figure.set_size_inches(6.6, 5.6)
    axes, counts = canvas.figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.axline((0, 0), slope=1, color=canvas.theme.muted, lw=0.9, ls=(0, (4, 3)))
    axes.annotate(
        "calibrated", (4, 4), xytext=(9, -3), textcoords="offset points", color=canvas.theme.muted, fontsize=8
    )
    for method, entry in drawn.items():
        bins = [b for b in entry.bins if b.count >= SPARSE]
        x = [100 * b.confidence for b in bins]
        canvas.line(axes, method, x, [100 * b.accuracy for b in bins], label=method)
        rows = [b.count for b in bins]
        if method == canvas.comparison.reference:
            counts.bar(x, rows, width=4.5, color=canvas.theme.accent, alpha=0.3, lw=0, zorder=2)
        else:
            canvas.line(counts, method, x, rows, ms=0, lw=0.9)
    axes.set(ylabel="Accuracy, %", xlim=(0, 102), ylim=(0, 103))
    axes.set_title(f"Reliability, {shots_title(shots, canvas.comparison.unit)}")
    crowded = len(canvas.methods) > CROWDED
    canvas.legend(axes, canvas.figure if crowded else axes, loc="outside right upper" if crowded else "upper left")
    counts.set(xlabel="Confidence, %", ylabel="Test rows")
    counts.yaxis.set_major_locator(require("matplotlib.ticker", "compare").MaxNLocator(2, integer=True))
    return True


def _regularization_path(canvas: _Canvas) -> bool:
    """The reference's score for each strength of regularization, one line a number of shots; the choice is marked."""
    own = _done(canvas.comparison, canvas.comparison.reference)
    known = [(entry.shots, entry.path) for entry in own if entry.path is not None]
    if not known:
        return False
    axes = canvas.figure.add_subplot()
    for place, (shots, path) in enumerate(known):
        shade = 0.35 + 0.65 * (place + 1) / len(known)
        axes.plot(path.grid, path.scores, color=canvas.theme.accent, alpha=shade, lw=1.6)
        axes.plot([path.chosen], [path.chosen_score], "o", ms=7, color=canvas.theme.accent, mec=canvas.theme.ground)
        canvas.label(shots_title(shots, canvas.comparison.unit), canvas.theme.muted, path.grid[-1], path.scores[-1])
    axes.set_xscale("log")
    axes.set(title="How the regularization was chosen", ylabel="Score")
    axes.set_xlabel(f"{known[0][1].kind.capitalize()}, log")
    if all(score > 0 for _, path in known for score in path.scores):
        axes.set_yscale("log")
        axes.set_ylabel("Score, log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="x", which="minor", labelbottom=False, bottom=False)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.1)
    axes.grid(axis="x", visible=False)
    canvas.place_labels(axes)
    return True


_FIGURES: dict[str, Callable[[_Canvas], bool]] = {
    "accuracy_time": _accuracy_time,
    "accuracy_shots": _accuracy_shots,
    "accuracy_memory": _accuracy_memory,
    "reliability": _reliability,
    "regularization_path": _regularization_path,
}


def _done(comparison: Comparison, method: str) -> list[Entry]:
    return [entry for entry in comparison.entries if entry.method == method and entry.status == "done"]
