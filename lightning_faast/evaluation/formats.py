"""Figures as people read them."""

from __future__ import annotations

import math

from lightning_faast.evaluation.summary import Entry, Estimate

#: Stands for a figure that is not known.
UNKNOWN = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


def shots_name(shots: int | None) -> str:
    """``"all"`` for None.

    Example:
        >>> shots_name(16), shots_name(None)
        ('16', 'all')
    """
    return "all" if shots is None else f"{shots:,}"


def shots_title(shots: int | None, unit: str = "shot") -> str:
    """With its noun.

    Example:
        >>> shots_title(1), shots_title(16), shots_title(None), shots_title(2000, "token")
        ('1 shot', '16 shots', 'all shots', '2,000 tokens')
    """
    return f"{shots_name(shots)} {unit}{'' if shots == 1 else 's'}"


def perplexity(number: float | None) -> str:
    """Two decimals.

    Example:
        >>> perplexity(28.194), perplexity(None)
        ('28.19', '–')
    """
    return UNKNOWN if number is None else f"{number:,.2f}"


def percent(share: float | None) -> str:
    """A share in percent, without the sign.

    Example:
        >>> percent(0.8817)
        '88.2'
    """
    return UNKNOWN if share is None else f"{100 * share:.1f}"


def signed(number: float, digits: int) -> str:
    """With a sign, but for what rounds to zero.

    Example:
        >>> signed(1.24, 1), signed(-0.02, 1)
        ('+1.2', '0.0')
    """
    text = f"{abs(number):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if number > 0 else _MINUS) + text


def accuracy_interval(estimate: Estimate | None, low_high: bool = True) -> str:
    """In percent, with its interval or with half the width of it.

    Example:
        >>> accuracy_interval(Estimate(0.882, 0.876, 0.888))
        '88.2 [87.6, 88.8]'
        >>> accuracy_interval(Estimate(0.882, 0.876, 0.888), low_high=False)
        '88.2 ±0.6'
    """
    if estimate is None:
        return UNKNOWN
    if low_high:
        return f"{percent(estimate.value)} [{percent(estimate.low)}, {percent(estimate.high)}]"
    return f"{percent(estimate.value)} ±{50 * (estimate.high - estimate.low):.1f}"


def points(estimate: Estimate | None) -> str:
    """A difference of shares in percentage points, with its interval.

    Example:
        >>> points(Estimate(-0.012, -0.020, -0.004))
        '−1.2 [−2.0, −0.4]'
    """
    return UNKNOWN if estimate is None else _difference(estimate, 100, 1)


def loss_difference(estimate: Estimate | None) -> str:
    """A difference of losses with its interval.

    Example:
        >>> loss_difference(Estimate(0.031, 0.012, 0.050))
        '+0.031 [+0.012, +0.050]'
    """
    return UNKNOWN if estimate is None else _difference(estimate, 1, 3)


def _difference(estimate: Estimate, scale: float, digits: int) -> str:
    value, low, high = (signed(scale * v, digits) for v in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def decimal(number: float | None) -> str:
    """Three decimals: losses and calibration errors.

    Example:
        >>> decimal(0.41234), decimal(float("inf"))
        ('0.412', '∞')
    """
    if number is None:
        return UNKNOWN
    return f"{number:.3f}".replace("-", _MINUS) if math.isfinite(number) else "∞"


def count(number: float | None) -> str:
    """A whole number.

    Example:
        >>> count(50000.0)
        '50,000'
    """
    return UNKNOWN if number is None else f"{number:,.0f}"


def duration(seconds: float | None) -> str:
    """Two or three figures and a unit.

    Example:
        >>> duration(0.0123), duration(4.56), duration(93), duration(9000)
        ('12 ms', '4.6 s', '1.6 min', '2.5 h')
    """
    if seconds is None:
        return UNKNOWN
    for scale, unit, limit in ((1e-3, "ms", 0.9995), (1, "s", 59.5), (60, "min", 59.5 * 60)):
        if seconds < limit:
            return f"{_figures(seconds / scale)} {unit}"
    return f"{_figures(seconds / 3600)} h"


def size(number: float | None) -> str:
    """Bytes in decimal units.

    Example:
        >>> size(76_800_000), size(1536), size(0)
        ('77 MB', '1.5 kB', '0 B')
    """
    if number is None:
        return UNKNOWN
    for scale, unit in ((1, "B"), (1e3, "kB"), (1e6, "MB")):
        if number < 999.5 * scale:
            return f"{_figures(number / scale)} {unit}"
    return f"{_figures(number / 1e9)} GB"


def micro(microseconds: float | None) -> str:
    """Microseconds, without the unit.

    Example:
        >>> micro(0.234), micro(1234.5)
        ('0.23', '1,234')
    """
    return UNKNOWN if microseconds is None else _figures(microseconds)


def times(ratio: float) -> str:
    """How many times as much.

    Example:
        >>> times(1.04), times(12.34), times(1234)
        ('1.04×', '12×', '1,230×')
    """
    digits = max(0, 2 - math.floor(math.log10(ratio))) if ratio < 2 else 1 if ratio < 9.95 else 0
    rounded = float(f"{ratio:.3g}") if ratio >= 100 else ratio
    return f"{rounded:,.{digits}f}\N{MULTIPLICATION SIGN}"


def state(entry: Entry) -> str:
    """What stands in place of the figures of an entry without any: ``"failed"`` or ``"refused"``."""
    return "" if entry.status == "done" else entry.status


def _figures(number: float) -> str:
    """Two figures below 10, whole above."""
    if number == 0 or number >= 9.95:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 0.995 else f"{number:.2g}"
