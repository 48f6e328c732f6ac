"""A comparison in W&B, logged by its client offline and read back from the files it wrote."""

import json
import math
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_faast.evaluation.records import Record
from lightning_faast.evaluation.report import entry_figures
from lightning_faast.evaluation.summary import Comparison
from lightning_faast.evaluation.tracking import METRICS, group_name, log_comparison
from tests.evaluation.synthetic import CLASSES, METHODS, comparison
from tests.wandb_files import Run, read_run

wandb = pytest.importorskip("wandb")
Logged = namedtuple("Logged", ["files", *Run._fields])


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture
def report(tmp_path):
    """A folder with what log_comparison takes from it."""
    from PIL import Image

    (tmp_path / "figures").mkdir()
    for name in ("accuracy", "memory"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / "figures" / f"{name}.png")
    (tmp_path / "comparison.html").write_text("<!doctype html><title>Übersicht</title>", encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Every run of a comparison by its name: folder, what was said of the run, config, summary and history."""
    from lightning_faast.evaluation.report import write_report

    directory = tmp_path_factory.mktemp("comparison")
    written = comparison(200)
    write_report(written, directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        log_comparison(written, "digits", directory, entity="team")
    return written, runs(directory), directory


def runs(directory):
    """The runs in a folder by their names, each with the folder of its files."""
    files = list(directory.glob("wandb/offline-run-*/run-*.wandb"))
    found = {run.about.display_name: Logged(file.parent / "files", *run) for file in files for run in [read_run(file)]}
    assert len(found) == len(files)
    return found


def test_a_run_for_each_method_in_one_group(logged):
    written, found, _ = logged
    assert set(found) == {*METHODS, "comparison"}
    for name, run in found.items():
        about, config = run.about, run.config
        assert (about.project, about.entity, about.run_group) == ("digits", "team", group_name(written))
        assert about.job_type == ("report" if name == "comparison" else "compare")
        assert config["recipe"] == "recipes/vit_cifar.yaml"
        assert config["encoder"].startswith("vit_small_patch14_dinov2")
        assert config["reference"] == "faast"
        if name != "comparison":
            assert (config["method"], config["shots"], config["seeds"]) == (name, [4, 16, 64, "all"], [0, 1, 2])


def test_history_holds_the_same_figures_as_the_tables(logged):
    written, found, _ = logged
    for method in METHODS:
        history = found[method].history
        entries = [entry for entry in written.entries if entry.method == method and entry.status == "done"]
        assert [row["train_rows"] for row in history] == [CLASSES * (entry.shots or 500) for entry in entries]
        assert [row["examples_per_class"] for row in history] == [entry.shots or 500 for entry in entries]
        for row, entry in zip(history, entries, strict=True):
            figures = entry_figures(entry)
            known = {name: figures[column] for name, column in METRICS.items() if figures[column] is not None}
            assert {"test/accuracy", "adaptation/seconds"} <= set(known)
            assert {name: row[name] for name in METRICS if name in row} == {
                name: pytest.approx(figure, abs=0) for name, figure in known.items()
            }


def test_metrics_are_drawn_against_train_rows(logged):
    _, found, _ = logged
    metrics = found["knn"].metrics
    assert {metric.name for metric in metrics} == {"train_rows", "examples_per_class", *METRICS}
    assert {metric.step_metric for metric in metrics if metric.name != "train_rows"} == {"train_rows"}


def test_summary_holds_the_last_figures_and_why_some_are_missing(logged):
    written, found, _ = logged
    summary = found["faast"].summary
    assert summary["test/accuracy"] == written.entry("faast", None).accuracy.value
    assert summary["train_rows"] == 5000
    assert summary["status"] == "done"
    assert not any(name.startswith("reasons") for name in summary)
    assert found["zero_shot"].summary["reasons"] == {"64": "zero_shot reads no examples: shots change nothing."}
    assert found["full_finetuning"].summary["reasons"] == {
        "all": "RuntimeError: out of memory (tried to allocate 2.1 GB)"
    }


def test_table_page_and_figures(logged):
    written, found, directory = logged
    run = found["comparison"]
    table = json.loads((run.files / run.summary["table/path"]).read_text())
    lines = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    assert len(lines) == len(written.entries)
    for line, entry in zip(lines, written.entries, strict=True):
        expected = entry_figures(entry)
        assert line.pop("train_rows") == CLASSES * (entry.shots or 500)
        assert line.pop("shots") == str(entry.shots or "all")
        del expected["shots"]
        assert line == expected
    assert (run.files / run.summary["page/path"]).read_bytes() == (directory / "comparison.html").read_bytes()
    drawn = {path.stem: path.read_bytes() for path in (directory / "figures").glob("*.png")}
    assert len(drawn) > 2
    for name, content in drawn.items():
        assert (run.files / run.summary[f"figures/{name}/path"]).read_bytes() == content


def test_method_without_any_result_in_the_working_directory(report, monkeypatch):
    records = [
        Record("faast", 4, 0, "done", num_classes=2, train_rows=8, test_rows=9, accuracy=0.5, loss=math.inf),
        Record("lora", 4, 0, "refused", reason="The encoder has no attention."),
        Record("lora", None, 0, "failed", reason="Out of memory."),
    ]
    monkeypatch.chdir(report)
    log_comparison(Comparison(records, [None] * 3, "faast", {}), "digits", Path(), group="mine")
    found = runs(report)
    lora = found["lora"]
    assert lora.about.run_group == "mine"
    assert lora.config["shots"] == [4, "all"]
    assert lora.history == []
    assert lora.summary["status"] == "failed"
    assert lora.summary["reasons"] == {"4": "The encoder has no attention.", "all": "Out of memory."}
    (row,) = found["faast"].history
    assert row["test/loss"] == math.inf
    assert "test/calibration_error" not in row
    run = found["comparison"]
    table = json.loads((run.files / run.summary["table/path"]).read_text())
    assert [line[table["columns"].index("train_rows")] for line in table["data"]] == [8, 8, 0]


def test_group_is_that_of_the_records():
    records = [Record("faast", 4, 0, "done", test_rows=10, accuracy=0.5)]
    first = Comparison(records, [None], "faast", {"recipe": "recipes/images.yaml", "date": "2025-01-31"})
    assert group_name(first) == group_name(replace(first, records=tuple(records)))
    assert group_name(first) != group_name(replace(first, records=[replace(records[0], accuracy=0.6)]))


def test_report_must_be_there_before_anything_is_logged(tmp_path):
    record = Record("faast", 4, 0, "done", test_rows=10, accuracy=0.5)
    with pytest.raises(FileNotFoundError, match="write_report"):
        log_comparison(Comparison([record], [None], "faast", {}), "digits", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_run_is_left_open_by_an_error_and_none_of_the_caller_is_closed(report, tmp_path):
    (report / "figures" / "damaged.png").write_bytes(b"no image")
    record = Record("faast", 4, 0, "done", num_classes=2, train_rows=8, test_rows=10, accuracy=0.5)
    (tmp_path / "mine").mkdir()
    with wandb.init(project="mine", dir=tmp_path / "mine") as mine:
        with pytest.raises(Exception, match="cannot identify image file"):
            log_comparison(Comparison([record], [None], "faast", {}), "digits", report)
        assert wandb.run is mine
        mine.log({"still": 1})
    codes = {name: run.exit_code for name, run in runs(report).items()}
    assert codes == {"faast": 0, "comparison": 1}


def test_wandb_not_installed(monkeypatch, report):
    monkeypatch.setitem(sys.modules, "wandb", None)
    record = Record("faast", 4, 0, "done", test_rows=10, accuracy=0.5)
    with pytest.raises(ImportError, match=r"lightning-faast\[wandb\]"):
        log_comparison(Comparison([record], [None], "faast", {}), "digits", Path(report))
