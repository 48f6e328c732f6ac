"""The benchmarks run and report; how fast anything is, no test asserts."""

import math
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.harness import Row, Samples, Section, Settings, Target, in_turn, interleave
from benchmarks.report import markdown

ROWS = {
    "fit": 3,
    "solve": 16,
    "regularization_path": 2,
    "memory": 3,
    "prediction": 2,
    "memories": 16,
    "language": 4,
    "loader": 3,
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Section], str]:
    report = tmp_path_factory.mktemp("report") / "docs" / "benchmarks.md"
    return main(["--quick", "--out", str(report)]), report.read_text(encoding="utf-8")


def test_every_benchmark_has_its_rows(quick: tuple[list[Section], str]) -> None:
    sections, _ = quick
    assert {name: len(section.rows) for name, section in zip(BENCHMARKS, sections, strict=True)} == ROWS
    assert all(section.title and section.conditions for section in sections)


def test_figures_are_sane(quick: tuple[list[Section], str]) -> None:
    for section in quick[0]:
        for row in section.rows:
            figures = (*row.theirs.values, *row.ours.values, *row.ratios.values)
            assert all(math.isfinite(figure) for figure in figures), row
            if section.title != "Memory":  # a growth may well be zero
                assert all(figure > 0 for figure in figures), row
            assert len(row.ours.values) == len(row.theirs.values) == len(row.ratios.values)


def test_targets_are_stated(quick: tuple[list[Section], str]) -> None:
    sections, _ = quick
    stated = {
        name: {str(row.target) for row in section.rows} for name, section in zip(BENCHMARKS, sections, strict=True)
    }
    assert "≤ 1.03" in stated["fit"]
    assert stated["solve"] == {"≥ 6 times faster"}
    assert stated["regularization_path"] == {"≤ 1.2"}
    assert stated["memory"] == {"≤ 0.05 of storing the keys"}
    assert stated["prediction"] == {"≤ 1.05"}
    assert stated["memories"] == {"none"}  # tiny sizes have none


def test_report_holds_every_row_and_where_it_was_measured(quick: tuple[list[Section], str]) -> None:
    sections, text = quick
    for section in sections:
        assert f"## {section.title}" in text
        for row in section.rows:
            assert "| " + " | ".join(row.cells()) + " |" in text
    for fact in ("- CPU: ", "- cores: ", "- torch threads: ", "torch 2", "- date: ", "python -m benchmarks --quick"):
        assert fact in text
    assert "nothing about speed" in text
    assert "relative error of W against a float64" in text
    assert "to update" in text
    assert "to predict" in text


def test_subjects_run_in_turn_after_a_round_that_does_not_count() -> None:
    calls: list[str] = []
    measured = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=3)
    assert "".join(calls) == "ab" * 4
    assert {name: len(times) for name, times in measured.items()} == {"a": 3, "b": 3}
    assert in_turn({"one": lambda: 1, "two": lambda: 2}, runs=2) == {"one": [1, 1], "two": [2, 2]}


def test_ratios_are_taken_pair_by_pair() -> None:
    ours, theirs = Samples((1.0, 20.0, 3.0), "s"), Samples((1.0, 10.0, 4.0), "s")
    row = Row.compare("what", ours, "peer", theirs, Target("at most", 1.0))
    assert row.ratios.values == (1.0, 2.0, 0.75)
    assert row.met == "yes"
    faster = Row.compare("what", ours, "peer", theirs, Target("at least", 1.1))
    assert faster.ratios.values == (1.0, 0.5, 4 / 3)
    assert faster.met == "**no**"
    assert Row.compare("what", ours, "peer", theirs, Target()).met == "n/a"


@pytest.mark.parametrize(
    ("values", "unit", "written"),
    [
        ((1.0, 3.0, 2.0), "s", "2.00 (1.00 to 3.00) s"),
        ((0.001, 0.003, 0.002), "s", "2.00 (1.00 to 3.00) ms"),
        ((2e-6,), "s", "2.00 (2.00 to 2.00) µs"),
        ((2e6,), "B", "2.00 (2.00 to 2.00) MB"),
        ((1234.5,), "images/s", "1234 (1234 to 1234) images/s"),
        ((1.01, 1.02, 1.03), "ratio", "1.020 (1.010 to 1.030)"),
    ],
)
def test_samples_are_written_with_their_range(values: tuple[float, ...], unit: str, written: str) -> None:
    assert str(Samples(values, unit)) == written  # type: ignore[arg-type]


def test_report_counts_targets_met() -> None:
    one = Samples((1.0,), "s")
    rows = [Row.compare("row", one, "peer", one, target) for target in (Target("at most", 1.5), Target("at least", 2))]
    section = Section("Title", "Conditions.", [*rows, Row.compare("row", one, "peer", one, Target())])
    assert "targets met: 1 of 2" in markdown([section], Settings(), "command", {})


def test_a_part_does_not_replace_the_whole_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--quick", "--only", "prediction", "--runs", "1"])
    assert "## Prediction" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in BENCHMARKS)
    assert "examples:" in text
