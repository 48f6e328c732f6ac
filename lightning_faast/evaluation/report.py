"""A comparison as tables: for the terminal, Markdown, LaTeX, CSV; and everything in one folder."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lightning_faast.associative.files import write_text
from lightning_faast.evaluation import formats
from lightning_faast.evaluation.findings import findings, notes, reasons
from lightning_faast.evaluation.page import page
from lightning_faast.evaluation.plots import write_figures
from lightning_faast.evaluation.summary import AVERAGED, Comparison, Entry, Estimate


def write_report(comparison: Comparison, directory: Path) -> list[Path]:
    """Write a comparison in every form.

    Args:
        comparison: The runs.
        directory: Made where missing; files of the same names are replaced, each whole or not at all.

    Returns:
        The paths: ``comparison.md``, ``comparison.tex``, ``comparison.csv`` (one line a method and number of shots),
        ``runs.csv`` (one line a run), ``comparison.html`` and ``figures/*.png`` and ``*.svg``.

    Raises:
        ImportError: Where a package of the extra ``compare`` is not installed.
        OSError: Where a file cannot be written.
    """
    figures = write_figures(comparison, directory / "figures")
    drawings = {path.stem: path.read_bytes() for path in figures if path.suffix == ".svg"}
    texts = {
        "comparison.md": markdown(comparison),
        "comparison.tex": latex(comparison),
        "comparison.csv": entries_csv(comparison),
        "runs.csv": runs_csv(comparison),
        "comparison.html": page(comparison, drawings),
    }
    return [write_text(directory / name, text) for name, text in texts.items()] + figures


# ---------------------------------------------------------------------- terminal


def terminal(comparison: Comparison) -> Group:
    """A table of 100 columns for ``rich``, by shots, and below it why runs have no result.

    Example:
        >>> from lightning_faast.evaluation.records import Record
        >>> from rich.console import Console
        >>> comparison = Comparison([Record("faast", 4, 0, "done", test_rows=9, accuracy=0.5)], [None], "faast", {})
        >>> Console(width=100).print(terminal(comparison))  # doctest: +ELLIPSIS
        Method...
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Method", overflow="fold")
    text = comparison.unit == "token"
    heads = ("Perplexity", "Loss", "Δ loss") if text else ("Accuracy", "Δ points", "Loss")
    for name in (*heads, "ECE", "Adapt", "Encoded", "Update", "Tokens/s" if text else "µs"):
        table.add_column(name, justify="right", no_wrap=True)
    for shots in comparison.shots:
        table.add_row(Text(formats.shots_title(shots, comparison.unit), style="bold"))
        for entry in comparison.ranked(shots):
            reference = entry.method == comparison.reference
            quality = [
                formats.accuracy_interval(entry.accuracy, low_high=False),
                "reference" if reference else formats.points(entry.difference),
                formats.decimal(entry.loss),
            ]
            if text:
                quality = [
                    formats.perplexity(entry.perplexity),
                    formats.decimal(entry.loss),
                    "reference" if reference else formats.loss_difference(entry.loss_difference),
                ]
            cells = [
                formats.state(entry) or quality[0],
                *quality[1:],
                formats.decimal(entry.calibration_error),
                formats.duration(entry.seconds),
                formats.count(entry.examples_encoded),
                formats.size(entry.bytes_to_update),
                formats.count(entry.tokens_per_second) if text else formats.micro(entry.microseconds_256),
            ]
            style = "cyan" if reference else "" if entry.status == "done" else "dim"
            table.add_row(*(Text(cell, style=style) for cell in (entry.method, *cells)))
        table.add_section()
    what = "loss" if text else "accuracy"
    encoded = "tokens through the model" if text else "examples through the encoder"
    said = [
        f"Δ: {what} less the reference's, same test {'tokens' if text else 'rows'}, 95 % paired interval. ECE: "
        f"calibration error. Adapt: encode, fit and solve. Encoded: {encoded}. Update: bytes to go on learning. "
        f"{'Tokens/s: of the test text.' if text else 'µs: a prediction, batch 256.'}",
        *reasons(comparison),
    ]
    return Group(table, *(Text(note, style="dim") for note in said))


# ---------------------------------------------------------------------- Markdown and LaTeX

_HEADS = (
    "Method",
    "Accuracy, %",
    "Difference, points",
    "Loss",
    "Loss difference",
    "ECE",
    "ECE excess",
    "Adaptation",
    "Encoded",
    "To predict",
    "To update",
    "Batch 1, µs",
    "Batch 256, µs",
    "Parameters",
)
#: The same of running text; as many, the first three and the quality in the same places.
_TOKEN_HEADS = (
    "Method",
    "Perplexity",
    "Loss difference",
    "Loss",
    "Accuracy, %",
    "ECE",
    "Bits per byte",
    "Adaptation",
    "Tokens encoded",
    "To predict",
    "To update",
    "First token",
    "Tokens/s",
    "Parameters",
)


def _heads(comparison: Comparison) -> tuple[str, ...]:
    return _TOKEN_HEADS if comparison.unit == "token" else _HEADS


def _cells(comparison: Comparison, entry: Entry) -> list[str]:
    """One text for each of :func:`_heads`."""
    reference = entry.method == comparison.reference
    if comparison.unit == "token":
        return [
            entry.method,
            formats.state(entry) or formats.perplexity(entry.perplexity),
            "reference" if reference else formats.loss_difference(entry.loss_difference),
            formats.decimal(entry.loss),
            formats.accuracy_interval(entry.accuracy),
            formats.decimal(entry.calibration_error),
            formats.decimal(entry.bits_per_byte),
            formats.duration(entry.seconds),
            formats.count(entry.examples_encoded),
            formats.size(entry.bytes_to_predict),
            formats.size(entry.bytes_to_update),
            formats.duration(entry.first_token_seconds),
            formats.count(entry.tokens_per_second),
            formats.count(entry.parameters),
        ]
    return [
        entry.method,
        formats.state(entry) or formats.accuracy_interval(entry.accuracy),
        "reference" if reference else formats.points(entry.difference),
        formats.decimal(entry.loss),
        "reference" if reference else formats.loss_difference(entry.loss_difference),
        formats.decimal(entry.calibration_error),
        formats.decimal(entry.excess_calibration_error),
        formats.duration(entry.seconds),
        formats.count(entry.examples_encoded),
        formats.size(entry.bytes_to_predict),
        formats.size(entry.bytes_to_update),
        formats.micro(entry.microseconds_1),
        formats.micro(entry.microseconds_256),
        formats.count(entry.parameters),
    ]


def markdown(comparison: Comparison) -> str:
    """GitHub's Markdown: findings, a table for each number of shots, reasons, notes, conditions."""
    lines = [f"# {_markdown(comparison.title)}", ""]
    lines += [f"- {_markdown(finding)}" for finding in findings(comparison)]
    for shots in comparison.shots:
        title = formats.shots_title(shots, comparison.unit).capitalize()
        lines += ["", f"## {title}", "", _row(_heads(comparison)), _row(["---"] + ["---:"] * 13)]
        lines += [_row(map(_markdown, _cells(comparison, entry))) for entry in comparison.ranked(shots)]
    without = reasons(comparison)
    if without:
        lines += ["", "## Without a result", "", *(f"- {_markdown(reason)}" for reason in without)]
    lines += ["", "## How to read this", "", *(f"- {note}" for note in notes(comparison)), "", "## Conditions", ""]
    lines += [f"- {_markdown(name)}: {_code(text)}" for name, text in comparison.about.items() if name != "title"]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(text: str) -> str:
    """Text that Markdown leaves as it is, on one line."""
    for character in "\\`*_[]<>|#~&$":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def _code(text: str) -> str:
    """A code span, fenced by more backticks than it holds."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def latex(comparison: Comparison) -> str:
    """One ``table`` with the rules of the package ``booktabs``; the reference in bold."""
    shown = (0, 1, 2, 3, 5, 7, 8, 10, 12)
    lines = [
        "% Needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering\\footnotesize",
        f"\\caption{{{_latex(comparison.title)}. Brackets: 95\\,\\% intervals.}}",
        f"\\begin{{tabular}}{{l{'r' * (len(shown) - 1)}}}",
        "\\toprule",
        " & ".join(_latex(_heads(comparison)[i]) for i in shown) + r" \\",
    ]
    for shots in comparison.shots:
        lines += [
            "\\midrule",
            f"\\multicolumn{{{len(shown)}}}{{l}}{{{formats.shots_title(shots, comparison.unit)}}} \\\\",
        ]
        for entry in comparison.ranked(shots):
            cells = [_latex(cell) for i, cell in enumerate(_cells(comparison, entry)) if i in shown]
            if entry.method == comparison.reference:
                cells[0] = f"\\textbf{{{cells[0]}}}"
            lines.append(" & ".join(cells) + r" \\")
    lines += ["\\bottomrule", "\\end{tabular}", *(f"% {reason}" for reason in map(_one_line, reasons(comparison)))]
    return "\n".join([*lines, "\\end{table}"]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\N{MINUS SIGN}": "$-$",
    "µ": r"\textmu{}",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "±": r"$\pm$",
    "∞": r"$\infty$",
    "\N{EN DASH}": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "[": "{[}",  # after a line break, a bracket would be taken for its option
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(_LATEX.get(character, character) for character in _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------------- CSV

_ESTIMATES = ("accuracy", "difference", "loss_difference")
_PLAIN = ("calibration_error", "calibrated_error", "excess_calibration_error", "mcnemar_p", *AVERAGED)


def entry_figures(entry: Entry) -> dict[str, Any]:
    """Every figure of an entry, flat and in base units, under the names of the CSV file's columns.

    Intervals are ``NAME``, ``NAME_low`` and ``NAME_high``; what is not known is None; ``shots`` is ``"all"`` for all.
    """
    flat: dict[str, Any] = {
        "method": entry.method,
        "shots": "all" if entry.shots is None else entry.shots,
        "status": entry.status,
        "seeds": len(entry.seeds),
        "test_rows": entry.test_rows,
    }
    for name in _ESTIMATES:
        estimate: Estimate | None = getattr(entry, name)
        for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high")):
            flat[name + suffix] = getattr(estimate, part) if estimate else None
    for name in ("accuracy_by_seed", "differences_by_seed"):
        flat[name] = " ".join(map(repr, getattr(entry, name))) or None
    flat |= {name: getattr(entry, name) for name in _PLAIN}
    return flat | {"reason": " ".join(entry.reasons) or None, "unpaired": entry.unpaired}


def entries_csv(comparison: Comparison) -> str:
    """One line a method and number of shots, figures raw: shares, seconds, bytes, microseconds."""
    return _csv([entry_figures(entry) for entry in comparison.entries])


def runs_csv(comparison: Comparison) -> str:
    """One line a run: the record without its details."""
    lines = []
    for record in comparison.records:
        line = asdict(record) | {"seconds": record.seconds, "perplexity": record.perplexity}
        line["shots"] = "all" if record.shots is None else record.shots
        del line["details"]
        lines.append(line)
    return _csv(lines)


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
