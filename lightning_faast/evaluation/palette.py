"""Colors and marks of the methods, for figures and pages alike.

The reference has the accent and a filled circle. Every other method has one of seven colors and one of five marks, so
that 35 methods differ, and those that share a color differ in the mark, for readers who do not tell the colors apart.
Every color has a contrast of at least 3 to 1 with its ground, and every ink one of 4.5.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """Colors of one ground, as ``#rrggbb``."""

    ground: str
    raised: str
    ink: str
    muted: str
    rule: str
    accent: str
    tint: str
    warning: str
    warning_tint: str
    series: tuple[str, ...]


THEMES = {
    "light": Theme(
        ground="#ffffff",
        raised="#f6f7f8",
        ink="#16191d",
        muted="#59616b",
        rule="#dfe2e6",
        accent="#0b57d0",
        tint="#e3edfc",
        warning="#a13d00",
        warning_tint="#fdeee2",
        series=("#c2500a", "#12795c", "#93348f", "#7d6a00", "#c22d63", "#0a7a94", "#5d6671"),
    ),
    "dark": Theme(
        ground="#111417",
        raised="#1a1f24",
        ink="#e9ecef",
        muted="#a2abb5",
        rule="#2e353c",
        accent="#86b7ff",
        tint="#16294a",
        warning="#ffb07c",
        warning_tint="#3b2415",
        series=("#ff9a5c", "#54cba0", "#dd9ae3", "#d4c04c", "#ff8db3", "#5fcbe0", "#a9b3bd"),
    ),
}

#: Marks of the methods other than the reference, by names that figures and pages map to shapes.
MARKS = ("square", "triangle", "diamond", "down", "cross")


def style(place: int) -> tuple[int, str]:
    """Index into ``Theme.series`` and mark of the method at a place among those other than the reference."""
    colors = len(THEMES["light"].series)
    return place % colors, MARKS[(place + place // colors) % len(MARKS)]
