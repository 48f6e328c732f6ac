"""One HTML page that holds a whole comparison and needs nothing else: no network, no server, no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_faast.data.extras import require
from lightning_faast.evaluation import formats
from lightning_faast.evaluation.findings import findings, notes, reasons, verdict
from lightning_faast.evaluation.palette import MARKS, THEMES, style
from lightning_faast.evaluation.plots import (
    CROWDED,
    QUALITY,
    QUALITY_LABELS,
    SHOTS_LABELS,
    SPARSE,
    TIME_TICKS,
    plotted,
    reliability_shots,
    shot_places,
)
from lightning_faast.evaluation.summary import Comparison, Entry, Estimate

_TEMPLATES = Path(__file__).with_name("templates")

#: Charts of the page: name (as of the figures), title, what to see in it.
_CHARTS = (
    (
        "accuracy_time",
        "Accuracy against adaptation time",
        "Up and to the left is better. A line joins a method's numbers of shots, few to many.",
    ),
    (
        "accuracy_shots",
        "Accuracy against shots",
        "With 95 % intervals; they are shaded for the reference and for whatever is picked.",
    ),
    (
        "accuracy_memory",
        "Accuracy against memory",
        "Bytes that learning on needs, beside the encoder. Up and to the left is better.",
    ),
    (
        "reliability",
        "Reliability",
        f"On the diagonal, confidence is what it says. Bins of fewer than {SPARSE} test rows are left out.",
    ),
    (
        "regularization_path",
        "How the regularization was chosen",
        "The reference's score for each strength, lower is better; the choice is marked.",
    ),
)

#: Columns of the table after the method: head, what stands below it, which order comes first when sorted.
_COLUMNS = (
    ("Accuracy", "%", "descending"),
    ("Difference", "points", "descending"),
    ("Loss", "and difference", "ascending"),
    ("Calibration", "error, excess", "ascending"),
    ("Adaptation", "encode · fit · solve", "ascending"),
    ("Encoded", "examples", "ascending"),
    ("Peak", "memory", "ascending"),
    ("To predict", "memory", "ascending"),
    ("To update", "memory", "ascending"),
    ("µs a row", "batch 256, 1", "ascending"),
    ("Parameters", "determined", "ascending"),
)
#: The same of running text.
_TOKEN_COLUMNS = (
    ("Perplexity", "bits per byte", "ascending"),
    ("Difference", "of the loss", "ascending"),
    ("Loss", "nats a token", "ascending"),
    ("Accuracy", "%", "descending"),
    ("Calibration", "error, excess", "ascending"),
    ("Adaptation", "encode · fit · solve", "ascending"),
    ("Encoded", "tokens", "ascending"),
    ("Peak", "memory", "ascending"),
    ("To predict", "memory", "ascending"),
    ("To update", "memory", "ascending"),
    ("Tokens/s", "first token", "descending"),
    ("Parameters", "determined", "ascending"),
)


def page(comparison: Comparison, drawings: Mapping[str, bytes]) -> str:
    """The page as HTML.

    Every text that comes from records is escaped, and a content security policy allows no script but the page's own
    and no request at all.

    Args:
        comparison: The runs.
        drawings: SVG files of :func:`~lightning_faast.evaluation.plots.write_figures` by name, light and ``_dark``:
            shown where scripts do not run.

    Raises:
        ImportError: Where Jinja is not installed.
    """
    jinja2 = require("jinja2", "compare")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found = findings(comparison)
    return environment.get_template("page.html").render(
        comparison=comparison,
        lead=found[0],
        findings=found[1:],
        reasons=reasons(comparison),
        notes=notes(comparison),
        shots=[formats.shots_name(shots) for shots in comparison.shots],
        titles=[formats.shots_title(shots, comparison.unit) for shots in comparison.shots],
        columns=_TOKEN_COLUMNS if comparison.unit == "token" else _COLUMNS,
        groups=[[_line(comparison, entry) for entry in comparison.ranked(shots)] for shots in comparison.shots],
        matrix=[(m, [_cell(comparison, comparison.entry(m, s)) for s in comparison.shots]) for m in comparison.others],
        charts=[(*chart, _images(drawings, chart[0])) for chart in _charts(comparison) if chart[0] in drawings],
        methods=_methods(comparison),
        themes=THEMES,
        data=_data(comparison),
        css=(_TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=digest,
    )


def _charts(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Name, title and text of each chart; where perplexity is drawn, less is better."""
    if comparison.unit == "shot":
        return list(_CHARTS)
    titles = {"accuracy_time": "adaptation time", "accuracy_shots": "tokens learned", "accuracy_memory": "memory"}
    texts = {name: text.replace("Up and", "Down and") for name, _, text in _CHARTS}
    texts["accuracy_shots"] = "Less is better."
    return [
        (name, f"{QUALITY['token']} against {titles[name]}" if name in titles else title, texts[name])
        for name, title, _ in _CHARTS
    ]


def _images(drawings: Mapping[str, bytes], name: str) -> tuple[str, str]:
    """Light and dark drawing as data URLs."""
    light, dark = drawings[name], drawings[f"{name}_dark"]
    return _url(light), _url(dark)


def _url(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _methods(comparison: Comparison) -> list[dict[str, Any]]:
    """Name and looks of each method, the reference first."""
    looks = [style(place) for place in range(len(comparison.others))]
    others = [{"name": m, "color": c, "mark": k} for m, (c, k) in zip(comparison.others, looks, strict=True)]
    return [{"name": comparison.reference, "color": None, "mark": "circle"}, *others]


def _compared(comparison: Comparison, entry: Entry) -> Estimate | None:
    """The difference to the reference that is shown first: of accuracy, or of running text of the loss."""
    return entry.loss_difference if comparison.unit == "token" else entry.difference


def _verdict(comparison: Comparison, difference: Estimate | None) -> str:
    if difference is None or comparison.unit != "token":
        return verdict(difference)
    return verdict(Estimate(-difference.value, -difference.high, -difference.low))  # less loss is better


def _difference(comparison: Comparison, difference: Estimate | None) -> tuple[str, str]:
    """Value and interval."""
    written = formats.loss_difference if comparison.unit == "token" else formats.points
    value, _, interval = written(difference).partition(" ")
    return value, interval


def _cell(comparison: Comparison, entry: Entry | None) -> tuple[str, str, str]:
    """Of the small table of differences: verdict, value, interval."""
    if entry is None:
        return "unknown", formats.UNKNOWN, ""
    difference = _compared(comparison, entry)
    if difference is None:
        return "unknown", formats.state(entry) or "not paired", ""
    return _verdict(comparison, difference), *_difference(comparison, difference)


def _line(comparison: Comparison, entry: Entry) -> dict[str, Any]:
    """A row of the table: for each column the number to sort by, the text, and a second, smaller text."""
    reference = entry.method == comparison.reference
    difference = _compared(comparison, entry)
    compared: Any = (difference.value if difference else None, *_difference(comparison, difference))
    parts = (entry.seconds_encode, entry.seconds_fit, entry.seconds_solve)
    split = " · ".join(map(formats.duration, parts)) if entry.seconds is not None else ""
    first, *quality = _quality(comparison, entry)
    return {
        "method": entry.method,
        "place": comparison.methods.index(entry.method),
        "reference": reference,
        "status": entry.status,
        "seeds": len(entry.seeds),
        "reason": " ".join(entry.reasons),
        "whisker": _whisker(comparison, entry.shots, difference),
        "verdict": _verdict(comparison, difference),
        "cells": [
            first,
            (0.0, "reference", "") if reference else compared,
            *quality,
            (
                entry.calibration_error,
                formats.decimal(entry.calibration_error),
                _excess(entry.excess_calibration_error),
            ),
            (entry.seconds, formats.duration(entry.seconds), split),
            (entry.examples_encoded, formats.count(entry.examples_encoded), ""),
            (entry.peak_memory, formats.size(entry.peak_memory), ""),
            (entry.bytes_to_predict, formats.size(entry.bytes_to_predict), ""),
            (entry.bytes_to_update, formats.size(entry.bytes_to_update), ""),
            _speed(comparison, entry),
            (entry.parameters, formats.count(entry.parameters), ""),
        ],
    }


def _quality(comparison: Comparison, entry: Entry) -> list[tuple[float | None, str, str]]:
    """How well a method predicts; the difference to the reference stands behind the first."""
    value, _, interval = formats.accuracy_interval(entry.accuracy).partition(" ")
    accuracy = (entry.accuracy.value if entry.accuracy else None, value, interval)
    loss = formats.decimal(entry.loss)
    if comparison.unit == "token":
        bits = "" if entry.bits_per_byte is None else formats.decimal(entry.bits_per_byte)
        return [(entry.perplexity, formats.perplexity(entry.perplexity), bits), (entry.loss, loss, ""), accuracy]
    less = formats.loss_difference(entry.loss_difference).partition(" ")[0] if entry.loss_difference else ""
    return [accuracy, (entry.loss, loss, less)]


def _speed(comparison: Comparison, entry: Entry) -> tuple[float | None, str, str]:
    if comparison.unit == "token":
        first = "" if entry.first_token_seconds is None else formats.duration(entry.first_token_seconds)
        return entry.tokens_per_second, formats.count(entry.tokens_per_second), first
    return entry.microseconds_256, formats.micro(entry.microseconds_256), formats.micro(entry.microseconds_1)


def _excess(number: float | None) -> str:
    return "" if number is None else formats.signed(number, 3)


def _whisker(comparison: Comparison, shots: int | None, difference: Estimate | None) -> dict[str, float] | None:
    """Where zero, the difference and its interval lie, 0 to 100 over all differences with as many shots."""
    every = [_compared(comparison, e) for e in comparison.entries if e.shots == shots]
    known = [d for d in every if d is not None]
    if difference is None:
        return None
    low, high = min(0.0, *(d.low for d in known)), max(0.0, *(d.high for d in known))
    span = (high - low) or 1.0
    places = {"zero": 0.0, "value": difference.value, "low": difference.low, "high": difference.high}
    return {name: round(4 + 92 * (number - low) / span, 2) for name, number in places.items()}


def _data(comparison: Comparison) -> dict[str, Any]:
    """What the charts are drawn from, as JSON."""
    shots, methods = comparison.shots, [comparison.reference, *comparison.others]
    places = shot_places(shots)
    return {
        "methods": _methods(comparison),
        "marks": ["circle", *MARKS],
        "shots": [formats.shots_name(number) for number in shots],
        "titles": [formats.shots_title(number, comparison.unit) for number in shots],
        "shotsLabel": SHOTS_LABELS[comparison.unit],
        "unit": comparison.unit,
        "quality": QUALITY[comparison.unit],
        "qualityLabel": QUALITY_LABELS[comparison.unit],
        "places": [places[number] for number in shots],
        "reliabilityShots": shots.index(reliability_shots(comparison)),
        "sparse": SPARSE,
        "crowded": len(methods) > CROWDED,
        "timeTicks": [[tick, formats.duration(tick).replace(".0 ", " ")] for tick in TIME_TICKS],
        "sizeTicks": [[10.0**power, formats.size(10**power).replace(".0 ", " ")] for power in range(13)],
        "entries": [
            {
                "method": methods.index(entry.method),
                "shots": shots.index(entry.shots),
                "quality": quality,
                "seconds": entry.seconds,
                "bytes": entry.bytes_to_update,
                "texts": {
                    "quality": _quality_text(comparison, entry),
                    "difference": _difference_text(comparison, entry),
                    "seconds": formats.duration(entry.seconds),
                    "bytes": formats.size(entry.bytes_to_update),
                },
                "bins": [[100 * b.confidence, 100 * b.accuracy, b.count] for b in entry.bins],
                "path": _path(entry),
            }
            for entry in comparison.entries
            if (quality := plotted(comparison, entry)) is not None
        ],
    }


def _quality_text(comparison: Comparison, entry: Entry) -> str:
    if comparison.unit == "token":
        return f"{formats.perplexity(entry.perplexity)}, accuracy {formats.accuracy_interval(entry.accuracy)} %"
    return f"{formats.accuracy_interval(entry.accuracy)} %"


def _difference_text(comparison: Comparison, entry: Entry) -> str:
    if _compared(comparison, entry) is None:
        return ""
    if comparison.unit == "token":
        return f"{formats.loss_difference(entry.loss_difference)} nats"
    return f"{formats.points(entry.difference)} points"


def _path(entry: Entry) -> dict[str, Any] | None:
    path = entry.path
    if path is None:
        return None
    return {
        "kind": path.kind,
        "grid": path.grid,
        "scores": path.scores,
        "chosen": path.chosen,
        "chosenScore": path.chosen_score,
    }
