"""One temperature by likelihood, and the accuracy that leave-one-out promises."""

import inspect

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from lightning_faast.associative import FastWeights, Solution, calibration
from lightning_faast.associative.readout import LeaveOneOutScores
from tests.associative.oracles import blobs, multi_hot


def scored(n=200, c=3, *, multilabel=False, scale=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = (
        torch.randint(2, (n, c), generator=generator).double()
        if multilabel
        else torch.randint(c, (n,), generator=generator)
    )
    signal = values - 0.5 if multilabel else F.one_hot(values, c)
    scores = scale * (signal + torch.randn(n, c, generator=generator, dtype=torch.float64))
    weights = torch.rand(n, c if multilabel else 1, generator=generator, dtype=torch.float64)
    weights[:3] = 0
    prior = torch.linspace(-0.5, 0.5, c, dtype=torch.float64)
    return LeaveOneOutScores(scores, prior.expand_as(scores), values, weights)


def mean_loss(loo, temperature, multilabel):
    logits = loo.scores / temperature + loo.log_prior
    if multilabel:
        losses = F.binary_cross_entropy_with_logits(logits, loo.values, reduction="none")
    else:
        losses = F.cross_entropy(logits, loo.values, reduction="none")[:, None]
    return float((losses * loo.weights).sum() / loo.weights.expand_as(losses).sum())


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 50.0, 1e9])
def test_the_temperature_is_the_most_likely_one(multilabel, scale):
    loo = scored(multilabel=multilabel, scale=scale)
    found = calibration.fit_temperature(loo, multilabel=multilabel)
    bracket = (torch.tensor(scale).log10().item() - 3, torch.tensor(scale).log10().item() + 3)
    oracle = minimize_scalar(
        lambda t: mean_loss(loo, 10**t, multilabel), bounds=bracket, method="bounded", options={"xatol": 1e-9}
    )
    assert found == pytest.approx(10**oracle.x, rel=1e-4)
    assert calibration.log_loss(loo, found, multilabel=multilabel) == pytest.approx(oracle.fun, rel=1e-9)


def test_scores_that_separate_every_row_leave_a_finite_temperature():
    labels = torch.arange(100) % 2
    loo = LeaveOneOutScores(10 * F.one_hot(labels).double(), torch.zeros(100, 2), labels, torch.ones(100, 1))
    found = calibration.fit_temperature(loo, multilabel=False)
    assert 0.01 < found < 1
    assert calibration.accuracy(loo, found, multilabel=False) == 1.0
    flat = LeaveOneOutScores(torch.zeros(100, 2), torch.zeros(100, 2), labels, torch.ones(100, 1))
    assert calibration.fit_temperature(flat, multilabel=False) is None


@pytest.mark.parametrize("multilabel", [False, True])
def test_accuracy_is_the_weighted_share_of_right_answers(multilabel):
    loo = scored(multilabel=multilabel)
    logits = loo.scores / 2 + loo.log_prior
    right = (logits > 0) == (loo.values > 0) if multilabel else (logits.argmax(1) == loo.values)[:, None]
    expected = float((right * loo.weights).sum() / loo.weights.expand_as(right).sum())
    assert calibration.accuracy(loo, 2.0, multilabel=multilabel) == pytest.approx(expected)


@pytest.mark.parametrize(("rows", "fitted"), [(49, False), (50, True)])
@pytest.mark.parametrize("readout", ["discriminant", "regression"])
def test_few_rows_keep_the_documented_temperature(rows, fitted, readout):
    keys, labels = blobs(rows, 4, 3, spread=0.5)
    solution = FastWeights(readout=readout).fit(keys, labels).solution
    assert solution.temperature_fitted is fitted
    assert (solution.temperature == {"discriminant": 3.0, "regression": 0.2}[readout]) is not fitted
    assert solution.leave_one_out_accuracy is not None


def test_the_documented_temperatures_are_the_constants():
    text = " ".join(inspect.getdoc(Solution).split())
    default = calibration.DEFAULT_TEMPERATURE
    assert f"{default['discriminant']:g} for a discriminant and {default['regression']:g} for a regression" in text
    assert f"fewer than {calibration.MIN_ROWS} rows" in text


@pytest.mark.parametrize("readout", ["discriminant", "regression"])
@pytest.mark.parametrize("data", [blobs, multi_hot])
def test_another_sample_changes_the_temperature_and_nothing_else(readout, data):
    keys, values = data(3000, 6, 3)
    one, other = (FastWeights(readout=readout, reservoir_size=200, seed=s).fit(keys, values) for s in (0, 1))
    assert float(one.temperature) != float(other.temperature)
    for name in ("weight", "bias", "log_prior"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert one.solution.regularization == other.solution.regularization


def test_switched_off_the_state_is_sums_only():
    keys, labels = blobs(300, 6, 3)
    model = FastWeights(reservoir_size=0).fit(keys, labels)
    solution = model.solution
    assert (solution.leave_one_out_accuracy, solution.leave_one_out_loss, solution.temperature_fitted) == (
        None,
        None,
        False,
    )
    assert model.bytes_to_update == model.statistics.num_bytes
    assert not [
        name
        for name in model.learned_state()
        if name.startswith("reservoir.") and name not in ("reservoir.seen", "reservoir.priorities")
    ]
    with_sample = FastWeights().fit(keys, labels)
    assert torch.equal(with_sample.weight, model.weight)


@pytest.mark.parametrize("readout", ["discriminant", "regression"])
def test_softmax_of_the_logits_is_a_probability(readout):
    """Calibration error of at most .05, accuracy as promised, and far better calibrated than without a temperature."""
    keys, labels = blobs(4000, 10, 4, spread=0.4)
    model = FastWeights(readout=readout).fit(keys[:600].float(), labels[:600])
    probabilities = model.predict_proba(keys[600:].float())
    confidence, predicted = probabilities.max(-1)
    right = (predicted == labels[600:]).double()
    bins = (confidence * 15).long().clamp(max=14)
    error = sum(abs(float((confidence[bins == b] - right[bins == b]).sum())) for b in range(15)) / len(right)
    assert error < 0.05
    assert model.solution.leave_one_out_accuracy == pytest.approx(float(right.mean()), abs=0.05)
    loss = float(F.nll_loss(probabilities.log(), labels[600:]))
    assert model.solution.leave_one_out_loss == pytest.approx(loss, abs=0.1)
