"""Comparisons of language models: every method by its own command, tokens for rows, perplexity in the report."""

import math
import os

import numpy as np
import pytest
import torch
from rich.console import Console

from lightning_faast.evaluation.compare import Comparer
from lightning_faast.evaluation.findings import findings
from lightning_faast.evaluation.keys import KeyStore
from lightning_faast.evaluation.methods import is_language, shipped_methods
from lightning_faast.evaluation.page import page
from lightning_faast.evaluation.records import Record, Rows, load_record, load_rows, save_record
from lightning_faast.evaluation.report import entries_csv, latex, markdown, runs_csv, terminal
from lightning_faast.evaluation.summary import Comparison
from lightning_faast.lightning_cli import FaastCLI
from tests.language.projects import save_model, text

RECIPE = "recipes/text_file.yaml"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    root = tmp_path_factory.mktemp("language")
    (root / "text.txt").write_text(text(120), encoding="utf-8")
    return [
        f"--data.path={root / 'text.txt'}",
        f"--model.model_name={save_model(root / 'model')}",
        "--data.window=48",
        "--trainer.accelerator=cpu",
        "--trainer.enable_model_summary=false",
    ]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FAAST_CACHE", str(tmp_path / "cache"))


def comparer(tmp_path, options, methods, shots):
    quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    return Comparer(RECIPE, methods, shots, 1, tmp_path / "out", options, store=KeyStore(tmp_path), console=quiet)


def test_methods_of_a_recipe_are_those_of_its_model():
    assert is_language(RECIPE)
    assert not is_language("recipes/quickstart.yaml")
    text_methods = shipped_methods(RECIPE)
    assert {"language/faast", "language/lora", "language/zero_shot"} <= set(text_methods)
    assert not set(text_methods) & set(shipped_methods("recipes/quickstart.yaml"))
    assert set(text_methods) | set(shipped_methods("recipes/quickstart.yaml")) == set(shipped_methods())


def test_run_is_recorded_in_tokens(tmp_path, options):
    compared = comparer(tmp_path, options, ["language/faast"], [500])
    (run,) = compared.runs
    assert "--data.limit_tokens=500" in run.args
    (record,) = compared.run()
    assert record.status == "done", record.reason
    rows = load_rows(run.path)
    cli = FaastCLI(["fit", *run.args, "--trainer.logger=false", "--trainer.enable_progress_bar=false"])
    measured = cli.trainer.callback_metrics
    assert record.loss == pytest.approx(float(measured["test/loss"]), rel=1e-5)
    assert record.perplexity == pytest.approx(float(measured["test/perplexity"]), rel=1e-4)
    assert record.bits_per_byte == pytest.approx(float(measured["test/bits_per_byte"]), rel=1e-5)
    assert record.accuracy == pytest.approx(float(measured["test/accuracy"]))
    assert (record.unit, record.shots, record.train_rows) == ("token", 500, 500)
    assert record.examples_encoded == 11 * 48  # eleven windows, the last filled up
    assert record.test_rows == len(rows.label) == len(rows.block)
    assert rows.block.unique_consecutive().tolist() == list(range(int(rows.block[-1]) + 1))
    assert record.tokens_per_second > 0
    assert record.first_token_seconds > 0
    assert record.bytes_to_predict == cli.model.head.bytes_to_predict
    assert record.details["perplexity_after"] < record.details["perplexity_before"]
    assert compared.missing() == []
    comparison = compared.comparison("language/faast", "compare")
    assert comparison.unit == "token"
    assert "tokens" in comparison.about["scored"]


def test_other_text_or_model_is_another_run(tmp_path, options):
    def paths(*more):
        return [run.path for run in comparer(tmp_path, [*options, *more], ["language/zero_shot"], [None]).runs]

    assert paths() == paths("--data.eval_batch_size=3")
    assert paths() != paths("--data.test_tokens=100")
    assert paths() != paths("--data.stride=24")
    assert paths() != paths(f"--model.model_name={save_model(tmp_path / 'other', seed=1)}")


# ---------------------------------------------------------------------- reports

WINDOWS, TOKENS = 40, 25


def rows_of(shift, seed=0):
    """Losses of which those of one window are alike, and all shifted."""
    generator = np.random.default_rng(seed)
    windows = generator.normal(0, 1, WINDOWS).repeat(TOKENS)
    loss = 3 + windows + shift * (1 + generator.normal(0, 2, WINDOWS)).repeat(TOKENS)
    label = torch.arange(WINDOWS * TOKENS) % 7
    predicted = torch.where(torch.arange(len(label)) % 3 == 0, label, label + 1)
    block = torch.arange(WINDOWS).repeat_interleave(TOKENS)
    return Rows(label, predicted, torch.full((len(label),), 0.4), -torch.from_numpy(loss).float(), block)


def record_of(method, shots, rows, **options):
    loss = float(-rows.log_likelihood.double().mean())
    accuracy = float((rows.label == rows.predicted).double().mean())
    known = {"test_rows": len(rows.label), "num_classes": 9, "calibration_error": 0.1, "bits_per_byte": loss / 3}
    speed = {"tokens_per_second": 300.0, "first_token_seconds": 0.1, "examples_encoded": shots}
    cost = {"seconds_encode": 1.0, "seconds_fit": 0.5, "seconds_solve": 0.5, "bytes_to_update": 10, "train_rows": shots}
    return Record(
        method, shots, 0, "done", accuracy=accuracy, loss=loss, unit="token", **{**known, **speed, **cost, **options}
    )


@pytest.fixture
def comparison():
    runs = [("language/faast", 0.0), ("language/lora", -0.5), ("language/zero_shot", 0.6)]
    rows = [rows_of(shift) for _, shift in runs]
    records = [record_of(name, 2000, r) for (name, _), r in zip(runs, rows, strict=True)]
    return Comparison(records, rows, "language/faast", {"title": "Text"})


def test_rows_keep_their_blocks(tmp_path):
    rows = rows_of(0.0)
    save_record(record_of("language/faast", 10, rows), rows, tmp_path / "run.json")
    assert torch.equal(load_rows(tmp_path / "run.json").block, rows.block)
    record = load_record(tmp_path / "run.json")
    assert record.perplexity == pytest.approx(math.exp(record.loss))


def test_intervals_resample_windows(comparison):
    entry = comparison.entry("language/lora", 2000)
    windows = (-comparison.rows[1].log_likelihood + comparison.rows[0].log_likelihood).view(WINDOWS, -1).mean(1)
    spread = 1.96 * float(windows.std()) / WINDOWS**0.5
    width = (entry.loss_difference.high - entry.loss_difference.low) / 2
    assert width == pytest.approx(spread, rel=0.15)  # by token it would be a fifth of that
    assert entry.loss_difference.value == pytest.approx(float(windows.mean()), rel=1e-4)
    assert entry.mcnemar_p is None


def test_blocks_of_other_sizes_weigh_by_their_rows():
    block = torch.tensor([0, 0, 0, 1])
    label = torch.zeros(4, dtype=torch.long)
    confidence = torch.full((4,), 0.5)
    mine = Rows(label, label, confidence, torch.tensor([-1.0, -1.0, -1.0, -5.0]), block)
    theirs = Rows(label, label, confidence, torch.zeros(4), block)
    records = [record_of(name, 5, rows) for name, rows in (("a", theirs), ("b", mine))]
    entry = Comparison(records, [theirs, mine], "a").entry("b", 5)
    assert entry.loss_difference.value == 2
    assert (entry.loss_difference.low, entry.loss_difference.high) == (1, 5)


def test_reports_speak_of_tokens_and_perplexity(comparison):
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(terminal(comparison))
    perplexity = f"{math.exp(comparison.records[0].loss):.2f}"
    shown = {
        "terminal": console.export_text(),
        "markdown": markdown(comparison),
        "latex": latex(comparison),
        "page": page(comparison, {}),
    }
    for name, report in shown.items():
        assert perplexity in report, name
        assert "2,000 tokens" in report.lower(), name
        if name != "page":
            assert "shot" not in report.replace("zero_shot", "").replace("zero\\_shot", ""), name
    assert "perplexity,bits_per_byte,tokens_per_second" in entries_csv(comparison)
    assert "perplexity" in runs_csv(comparison).partition("\n")[0]
    assert [entry.method for entry in comparison.ranked(2000)] == [
        "language/faast", "language/lora", "language/zero_shot",
    ]  # fmt: skip
    said = findings(comparison)
    assert said[0] == "language/faast does not have the lowest perplexity with 2,000 tokens."
    assert said[1].startswith("Lower: language/lora at 2,000 (")
