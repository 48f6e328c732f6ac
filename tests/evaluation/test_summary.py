import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_faast.evaluation.records import Record, Rows, save_record
from lightning_faast.evaluation.summary import (
    Comparison,
    accuracy_estimate,
    calibrated_error,
    calibration_error,
    reliability,
)

pytest.importorskip("scipy")
pytest.importorskip("statsmodels")


def rows_of(correct, log_likelihood=None, label=None):
    """Rows that are right where ``correct`` says so."""
    correct = torch.as_tensor(correct, dtype=torch.bool)
    label = torch.zeros(len(correct), dtype=torch.long) if label is None else label
    log_likelihood = torch.full((len(correct),), -0.5) if log_likelihood is None else log_likelihood
    return Rows(label, torch.where(correct, label, label + 1), torch.full((len(correct),), 0.7), log_likelihood)


def record_of(method, rows, seed=0, shots=4, **figures):
    accuracy = float((rows.predicted == rows.label).double().mean())
    return Record(method, shots, seed, "done", test_rows=len(rows.label), accuracy=accuracy, **figures)


def compare(runs, reference="faast"):
    """A comparison of ``{(method, seed): rows}``."""
    records = [record_of(method, rows, seed) for (method, seed), rows in runs.items()]
    return Comparison(records, list(runs.values()), reference)


def random_rows(seed, n=500, share=0.8):
    generator = torch.Generator().manual_seed(seed)
    correct = torch.rand(n, generator=generator) < share
    return rows_of(correct, -torch.rand(n, generator=generator))


# ------------------------------------------------------------------ accuracy


def test_one_seed_is_wilson():
    p, n, z = 0.9, 200, 1.959964
    center, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    estimate = accuracy_estimate([p], n)
    assert estimate.low == pytest.approx((center - half) / (1 + z * z / n), abs=1e-6)
    assert estimate.high == pytest.approx((center + half) / (1 + z * z / n), abs=1e-6)


def test_several_seeds_that_agree_add_nothing_to_wilson():
    one, three = accuracy_estimate([0.8], 500), accuracy_estimate([0.8, 0.8, 0.8], 500)
    assert (three.low, three.high) == pytest.approx((one.low, one.high))


def test_many_rows_leave_students_interval_of_the_seeds():
    seeds = [0.70, 0.74, 0.78]
    estimate = accuracy_estimate(seeds, 10**9)
    half = 4.302653 * np.std(seeds, ddof=1) / math.sqrt(3)
    assert (estimate.low, estimate.high) == pytest.approx((0.74 - half, 0.74 + half), abs=1e-4)


def test_interval_stays_between_0_and_1():
    estimate = accuracy_estimate([0.99, 0.90], 50)
    assert 0 <= estimate.low < estimate.value < estimate.high == 1


def test_interval_covers_at_its_rate():
    """Over seeds and rows drawn anew: 95 % by intent, and not less than 93 % of 400."""
    generator = np.random.default_rng(0)
    skill, n, covered = 1.0, 300, 0
    truth = float((generator.normal(size=400_000) < (skill + 0.15 * generator.normal(size=400_000))).mean())
    for _ in range(400):
        difficulty, levels = generator.normal(size=n), skill + 0.15 * generator.normal(size=3)
        estimate = accuracy_estimate([float((difficulty < level).mean()) for level in levels], n)
        covered += estimate.low <= truth <= estimate.high
    assert covered / 400 >= 0.93


# ------------------------------------------------------------------ differences


def test_difference_of_one_seed_is_paired():
    a, b = random_rows(0), random_rows(1, share=0.7)
    entry = compare({("faast", 0): a, ("knn", 0): b}).entry("knn", 4)
    difference = ((b.predicted == b.label).double() - (a.predicted == a.label).double()).numpy()
    half = 1.96 * difference.std() / math.sqrt(len(difference))
    assert entry.difference.value == pytest.approx(difference.mean())
    assert entry.difference.low == pytest.approx(difference.mean() - half, abs=0.1 * half)
    assert entry.difference.high == pytest.approx(difference.mean() + half, abs=0.1 * half)


def test_mcnemar_is_the_exact_binomial_test():
    from scipy.stats import binomtest

    a, b = random_rows(0), random_rows(1, share=0.7)
    entry = compare({("faast", 0): a, ("knn", 0): b}).entry("knn", 4)
    right_a, right_b = a.predicted == a.label, b.predicted == b.label
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    assert entry.mcnemar_p == pytest.approx(binomtest(only_a, only_a + only_b).pvalue)


def test_pairing_is_narrower_than_two_intervals():
    a = random_rows(0, n=1000)
    correct = (a.predicted == a.label).clone()
    correct[:10] = ~correct[:10]  # all but ten rows alike
    entry = compare({("faast", 0): a, ("knn", 0): rows_of(correct)}).entry("knn", 4)
    assert entry.difference.high - entry.difference.low < 0.4 * (entry.accuracy.high - entry.accuracy.low)


def test_several_seeds_average_each_row():
    runs = {(m, s): random_rows(10 * s + (m == "knn")) for m in ("faast", "knn") for s in (0, 1, 2)}
    entry = compare(runs).entry("knn", 4)
    rights = {key: (rows.predicted == rows.label).double() for key, rows in runs.items()}
    by_seed = [float((rights["knn", s] - rights["faast", s]).mean()) for s in (0, 1, 2)]
    assert entry.differences_by_seed == pytest.approx(by_seed)
    assert entry.difference.value == pytest.approx(np.mean(by_seed))
    assert entry.mcnemar_p is None


def test_only_common_seeds_are_compared():
    runs = {("faast", 0): random_rows(0), ("knn", 0): random_rows(1), ("knn", 1): random_rows(2, share=0.2)}
    entry = compare(runs).entry("knn", 4)
    assert len(entry.accuracy_by_seed) == 2
    assert len(entry.differences_by_seed) == 1
    assert entry.difference.value > -0.2


def test_equal_methods_are_level():
    entry = compare({("faast", 0): random_rows(0), ("knn", 0): random_rows(0)}).entry("knn", 4)
    assert (entry.difference.low, entry.difference.high, entry.mcnemar_p) == (0, 0, 1)


def test_loss_difference_is_of_the_other_less_the_reference():
    a, b = random_rows(0), random_rows(1)
    entry = compare({("faast", 0): a, ("knn", 0): replace(b, log_likelihood=a.log_likelihood - 0.25)}).entry("knn", 4)
    estimate = entry.loss_difference
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-6)


def test_infinite_loss_leaves_the_accuracy_compared():
    a, b = random_rows(0), random_rows(1)
    b.log_likelihood[3] = -math.inf
    entry = compare({("faast", 0): a, ("knn", 0): b}).entry("knn", 4)
    assert entry.loss_difference is None
    assert entry.difference is not None


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (random_rows(1, n=400), "Other test rows: 400 here, 500 of the reference."),
        (replace(random_rows(1), label=torch.ones(500, dtype=torch.long)), "500 of 500 labels are not the reference's"),
    ],
)
def test_other_test_rows_are_not_paired(other, says):
    entry = compare({("faast", 0): random_rows(0), ("knn", 0): other}).entry("knn", 4)
    assert entry.difference is None
    assert says in entry.unpaired


def test_no_common_seed_and_no_rows_are_said():
    a, b = random_rows(0), random_rows(1)
    entry = compare({("faast", 0): a, ("knn", 1): b}).entry("knn", 4)
    assert "No seed in common: [1] here, [0]" in entry.unpaired
    comparison = Comparison([record_of("faast", a), record_of("knn", b)], [a, None], "faast")
    assert "was not kept" in comparison.entry("knn", 4).unpaired
    comparison = Comparison([record_of("faast", a, shots=1), record_of("knn", b)], [a, b], "faast")
    assert "no run that ended with as many shots" in comparison.entry("knn", 4).unpaired


def test_same_numbers_every_time(compared):
    again = Comparison(compared.records, compared.rows, compared.reference, compared.about)
    assert again.entries == compared.entries


# ------------------------------------------------------------------ calibration


@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_is_torchmetrics(seed):
    torch.manual_seed(seed)
    log_probabilities, label = (2 * torch.randn(600, 7)).log_softmax(-1), torch.randint(7, (600,))
    expected = multiclass_calibration_error(log_probabilities.exp(), label, num_classes=7, n_bins=15)
    assert calibration_error(Rows.from_log_probabilities(log_probabilities, label)) == pytest.approx(
        float(expected), abs=1e-6
    )


def test_certain_predictions_are_calibrated_when_right():
    rows = replace(rows_of([True] * 50), confidence=torch.ones(50))
    assert calibration_error(rows) == calibrated_error(rows) == 0


def test_calibrated_error_is_what_calibrated_predictors_score():
    """Against torchmetrics' error on labels drawn from the very probabilities."""
    torch.manual_seed(0)
    probabilities = (2 * torch.randn(400, 5)).softmax(-1)
    errors = []
    for _ in range(300):
        label = torch.multinomial(probabilities, 1)[:, 0]
        errors.append(float(multiclass_calibration_error(probabilities, label, num_classes=5, n_bins=15)))
    rows = Rows.from_log_probabilities(probabilities.log(), label)
    assert calibrated_error(rows) == pytest.approx(np.mean(errors), abs=0.004)  # 4 standard errors


def test_reliability_adds_up_to_the_calibration_error():
    torch.manual_seed(0)
    rows = Rows.from_log_probabilities(torch.randn(300, 4).log_softmax(-1), torch.randint(4, (300,)))
    bins = reliability([rows])
    assert sum(b.count for b in bins) == 300
    error = sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / 300
    assert error == pytest.approx(calibration_error(rows), abs=1e-9)
    assert [b.count * 2 for b in bins] == [b.count for b in reliability([rows, rows])]


# ------------------------------------------------------------------ entries


def test_means_over_the_seeds_that_ended():
    a, b = random_rows(0), random_rows(1)
    records = [
        record_of("faast", a, 0, seconds_encode=1.0, seconds_fit=2.0, seconds_solve=3.0, peak_memory=10),
        record_of("faast", b, 1, seconds_encode=3.0, seconds_fit=2.0, seconds_solve=3.0),
        Record("faast", 4, 2, "failed", "out of memory"),
    ]
    (entry,) = Comparison(records, [a, b, None], "faast").entries
    assert (entry.status, entry.seeds, entry.reasons) == ("done", (0, 1), ("out of memory",))
    assert (entry.seconds, entry.seconds_encode, entry.peak_memory, entry.parameters) == (7, 2, 10, None)


def test_order_of_methods_and_shots(compared):
    assert compared.methods[0] == "faast"
    assert compared.shots == (4, 16, 64, None)
    assert compared.ranked(None)[0].method == "faast"
    assert compared.ranked(None)[-1].status == "failed"
    assert compared.entry("zero_shot", 64).status == "refused"


def test_read_from_a_folder(tmp_path, compared):
    for i, (record, rows) in enumerate(zip(compared.records, compared.rows, strict=True)):
        save_record(record, rows, tmp_path / f"{(7 * i) % 100:03d}.json")
    loaded = Comparison.load(tmp_path, "faast", compared.about)
    assert loaded.methods == ("faast", *sorted(compared.others))
    assert {entry.method: entry for entry in loaded.ranked(16)} == {e.method: e for e in compared.ranked(16)}


def test_path_of_the_regularization():
    a = random_rows(0)
    path = {"kind": "ridge", "grid": [1.0, 0.1, 10.0], "scores": [2.0, math.inf, 4.0], "chosen": 10**0.5}
    (entry,) = Comparison([record_of("faast", a, details={"path": path})], [a], "faast").entries
    assert (entry.path.grid, entry.path.scores) == ((1.0, 10.0), (2.0, 4.0))
    assert entry.path.chosen_score == pytest.approx(3)
    broken = record_of("faast", a, details={"path": path | {"scores": [1.0]}})
    with pytest.raises(ValueError, match=r"faast with 4 shots and seed 0 has .*3 values and 1 scores"):
        _ = Comparison([broken], [a], "faast").entries


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"status": "over"}, "expected done, failed or refused"),
        ({"accuracy": None}, "accuracy None on 500 test rows"),
        ({"accuracy": 0.1}, "one of the two files is of another run"),
        ({"test_rows": 499}, "one of the two files is of another run"),
    ],
)
def test_records_that_cannot_be_right(changes, says):
    rows = random_rows(0)
    with pytest.raises(ValueError, match=says):
        Comparison([replace(record_of("faast", rows), **changes)], [rows], "faast")


def test_rows_that_cannot_be_right():
    rows = random_rows(0)
    for changes, says in (
        ({"confidence": torch.full((500,), 1.5)}, "not from 0 to 1"),
        ({"confidence": torch.full((500,), math.nan)}, "not from 0 to 1"),
        ({"log_likelihood": torch.full((500,), math.nan)}, "no number"),
        ({"confidence": torch.full((499,), 0.5)}, "different lengths"),
    ):
        with pytest.raises(ValueError, match=says):
            Comparison([record_of("faast", rows)], [replace(rows, **changes)], "faast")


def test_comparisons_that_cannot_be_right():
    rows = random_rows(0)
    with pytest.raises(ValueError, match="no record"):
        Comparison([], [], "faast")
    with pytest.raises(ValueError, match="1 records with rows of 2"):
        Comparison([record_of("faast", rows)], [rows, rows], "faast")
    with pytest.raises(ValueError, match="Two records of faast with 4 shots and seed 0"):
        Comparison([record_of("faast", rows)] * 2, [rows] * 2, "faast")
