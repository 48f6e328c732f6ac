"""The Markdown report."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness import Section, Settings

_COLUMNS = ("what", "ours", "peer", "the peer's", "ratio", "target", "met")


def markdown(sections: Sequence[Section], settings: Settings, command: str, facts: dict[str, str]) -> str:
    """The whole file."""
    rows = [row for section in sections for row in section.rows]
    judged = [row for row in rows if row.target.kind != "none"]
    missed = sum(row.met != "yes" for row in judged)
    lines = [
        "# Benchmarks",
        "",
        f"Written by `{command}`; every figure is from that one run.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        f"- conditions: subjects run in turn (A B A B …) after one uncounted round, {settings.runs} runs of each. "
        "Shown are the median and, in brackets, the range. Ratios are taken pair by pair, then their median: of ours "
        "over the peer's, or of the peer's over ours where the target reads \"times faster\".",
        f"- targets met: {len(judged) - missed} of {len(judged)}",
    ]
    if settings.quick:
        lines += ["", "**Tiny sizes (`--quick`): these figures say nothing about speed.**"]
    for section in sections:
        lines += ["", f"## {section.title}", "", section.conditions, ""]
        lines += [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
        lines += [_line(row.cells()) for row in section.rows]
        lines += ["", *(f"- {note}" for note in section.notes)] if section.notes else []
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
