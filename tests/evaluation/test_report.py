import csv
import io
import shutil
import subprocess
from dataclasses import replace

import pytest
from rich.console import Console

from lightning_faast.evaluation.records import Record
from lightning_faast.evaluation.report import entries_csv, latex, markdown, runs_csv, terminal
from lightning_faast.evaluation.summary import Comparison

pytest.importorskip("statsmodels")

HOSTILE = "a_b|<b>x</b> `c` $\\alpha$ 100%&#~^{}[red]\nnext"


@pytest.fixture
def hostile():
    records = [
        Record("faast", 4, 0, "done", test_rows=100, accuracy=0.5),
        Record(HOSTILE, 4, 0, "done", test_rows=100, accuracy=0.6),
        Record("lora", 4, 0, "failed", f"it said {HOSTILE}"),
    ]
    return Comparison(records, [None] * 3, "faast", {"title": HOSTILE, "command": "run `this`"})


def printed(comparison):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal(comparison))
    return console.export_text()


def test_terminal_fits_100_columns(compared):
    text = printed(compared)
    assert max(map(len, text.splitlines())) <= 100
    line = next(line for line in text.splitlines() if line.startswith("zero_shot"))
    assert " ".join(line.split()) == "zero_shot 59.0 ±3.5 +4.0 [+1.8, +6.2] 1.262 0.063 660 ms 0 15 kB 8.7"
    assert "zero_shot (64 shots), refused: zero_shot reads no examples" in text


def test_terminal_leaves_names_as_they_are(hostile):
    assert "[red]" in printed(hostile)


def test_markdown(compared):
    text = markdown(compared)
    assert text.startswith("# CIFAR-10 with DINOv2 ViT-S/14\n")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {15}
    assert "| zero\\_shot | 59.0 \\[55.5, 62.5\\] | +4.0 \\[+1.8, +6.2\\] |" in text
    assert f"- command: `{compared.about['command']}`" in text


def test_markdown_escapes(hostile):
    text = markdown(hostile)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {15}
    assert "<b>" not in text.replace("\\<b\\>", "")
    assert "`` run `this` ``" in text


def test_latex_escapes(hostile):
    text = latex(hostile)
    assert r"a\_b|\textless{}b\textgreater{}" in text
    assert r"\$\textbackslash{}alpha\$ 100\%\&\#\textasciitilde{}\textasciicircum{}\{\}{[}red] next" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()
    assert all(line.replace(r"\&", "").count("&") == 8 for line in body if line.endswith(r"\\") and "multi" not in line)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(hostile, compared, tmp_path):
    body = latex(hostile) + latex(compared)
    source = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs}\begin{document}"
    (tmp_path / "a.tex").write_text(source + body + r"\end{document}", encoding="utf-8")
    subprocess.run(["pdflatex", "-halt-on-error", "a.tex"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


def test_csv_holds_every_figure_raw(compared):
    lines = list(csv.DictReader(io.StringIO(entries_csv(compared))))
    assert len(lines) == len(compared.entries)
    for line, entry in zip(lines, compared.entries, strict=True):
        assert (line["method"], line["status"]) == (entry.method, entry.status)
        assert line["shots"] == ("all" if entry.shots is None else str(entry.shots))
        if entry.accuracy:
            assert float(line["accuracy_high"]) == entry.accuracy.high
            assert float(line["seconds"]) == entry.seconds
            assert float(line["excess_calibration_error"]) == entry.excess_calibration_error
        else:
            assert line["accuracy"] == ""
            assert line["reason"] == entry.reasons[0]


def test_csv_of_runs(compared):
    lines = list(csv.DictReader(io.StringIO(runs_csv(compared))))
    assert len(lines) == len(compared.records)
    assert [line["accuracy"] for line in lines if line["status"] != "done"] == [""] * 4
    assert float(lines[0]["seconds"]) == compared.records[0].seconds


def test_csv_quotes(hostile):
    assert [line["method"] for line in csv.DictReader(io.StringIO(entries_csv(hostile)))][1] == HOSTILE


def test_everything_is_written(reported, compared):
    names = {str(path.relative_to(reported)) for path in reported.rglob("*") if path.is_file()}
    figures = ("accuracy_time", "accuracy_shots", "accuracy_memory", "reliability", "regularization_path")
    assert names == {
        *("comparison.md", "comparison.tex", "comparison.csv", "runs.csv", "comparison.html"),
        *(f"figures/{name}{theme}.{kind}" for name in figures for theme in ("", "_dark") for kind in ("png", "svg")),
    }


def test_infinite_loss_is_shown_and_not_hidden():
    records = [Record("faast", None, 0, "done", test_rows=9, accuracy=0.5, loss=float("inf"))]
    comparison = Comparison(records, [None], "faast")
    assert "∞" in printed(comparison)
    assert ",inf," in entries_csv(comparison)
    assert "∞" in markdown(replace(comparison))
