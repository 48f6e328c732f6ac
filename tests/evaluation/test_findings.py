from dataclasses import replace

import pytest

from lightning_faast.evaluation.findings import findings, reasons, verdict
from lightning_faast.evaluation.records import Record
from lightning_faast.evaluation.summary import Comparison, Estimate

pytest.importorskip("statsmodels")


def of(accuracies, **costs):
    """A comparison at all shots of ``{method: accuracy}``, without rows."""
    records = [Record(m, None, 0, "done", test_rows=100, accuracy=a, **costs.get(m, {})) for m, a in accuracies.items()]
    return Comparison(records, [None] * len(records), "faast")


def test_says_where_the_reference_is_behind(compared):
    found = findings(compared)
    assert found[0] == "faast has the highest accuracy at 2 of 4 numbers of shots, 16 and all."
    assert "zero_shot at 4 by +4.0 [+1.8, +6.2] points" in found[1]
    assert "logistic_regression at 64" in found[1]
    assert "which is level" in found[1]
    counts = [verdict(e.difference) for e in compared.entries if e.method != "faast"]
    assert f"ahead in {counts.count('ahead')}, level in {counts.count('level')}" in found[2]
    assert "behind in 1: zero_shot at 4" in found[2]


def test_a_lower_loss_of_another_method_is_a_defeat(compared):
    lower = [e for e in compared.entries if e.loss_difference and e.loss_difference.high < 0]
    assert len(lower) == 1
    assert any(sentence.endswith("and higher in 1.") for sentence in findings(compared))


def test_last_place_is_not_glossed_over():
    found = findings(of({"faast": 0.5, "knn": 0.6}))
    assert found[0] == "faast does not have the highest accuracy with all shots."
    assert found[1] == "More accurate: knn at all (not compared row by row)."


def test_cheaper_methods_are_named():
    costs = {m: {"bytes_to_update": b} for m, b in (("faast", 1000), ("knn", 50_000), ("lda", 1010), ("mean", 10))}
    (sentence,) = [s for s in findings(of(dict.fromkeys(costs, 0.5), **costs)) if "learning on" in s]
    assert sentence == (
        "With all shots it needs for learning on 1.0 kB; knn 50\N{MULTIPLICATION SIGN} as much; "
        "as much within 5 %: lda; less: mean (10 B)."
    )


def test_a_reference_without_a_result():
    records = [Record("faast", 4, 0, "failed", "no memory"), Record("knn", 4, 0, "done", test_rows=9, accuracy=0.5)]
    comparison = Comparison(records, [None, None], "faast")
    assert findings(comparison)[0] == "faast, the reference, has no run that ended."
    assert "faast (4 shots), failed: no memory" in reasons(comparison)
    absent = Comparison(records[1:], [None], "faast")
    assert findings(absent) == ["faast, the reference, has no run that ended."]


def test_reasons_are_given_once(compared):
    found = reasons(compared)
    assert found == [
        "zero_shot (64 shots), refused: zero_shot reads no examples: shots change nothing.",
        "full_finetuning (all shots), failed: RuntimeError: out of memory (tried to allocate 2.1 GB)",
    ]


def test_verdict_at_the_edge():
    assert verdict(replace(Estimate(0, 0, 0))) == "level"
    assert verdict(None) == "unknown"
