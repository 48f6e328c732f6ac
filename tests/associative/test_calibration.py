"""One temperature by likelihood, and the accuracy that leave-one-out promises."""

import inspect
import math

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
@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize(("scale", "center"), [(0.05, 3.0), (1.0, 0.2), (50.0, 3.0), (1e6, 1.0)])
def test_the_temperature_is_the_most_probable_one(multilabel, rows, scale, center):
    loo = scored(rows + 3, multilabel=multilabel, scale=scale)
    found = calibration.fit_temperature(loo, center, multilabel=multilabel)

    def nats(log10):
        terms = loo.weights.expand(-1, 3 if multilabel else 1).sum()
        prior = calibration.temperature_penalty(10**log10, center)
        return mean_loss(loo, 10**log10, multilabel) * float(terms) + prior

    oracle = minimize_scalar(nats, bounds=(-4, 9), method="bounded", options={"xatol": 1e-10})
    assert found == pytest.approx(10**oracle.x, rel=1e-3)
    assert nats(math.log10(found)) <= oracle.fun + 1e-9
    mean = mean_loss(loo, found, multilabel)
    assert calibration.log_loss(loo, found, multilabel=multilabel) == pytest.approx(mean, rel=1e-9)


def test_the_temperatures_prior_is_a_factor_of_e_wide():
    assert calibration.temperature_penalty(3.0, 3.0) == 0
    step = 1e-3
    around = [calibration.temperature_penalty(3.0 * math.exp(sign * step), 3.0) for sign in (-1, 1)]
    assert sum(around) / step**2 == pytest.approx(1, rel=1e-3)


def test_scores_that_separate_every_row_leave_a_finite_temperature():
    labels = torch.arange(100) % 2
    loo = LeaveOneOutScores(10 * F.one_hot(labels).double(), torch.zeros(100, 2), labels, torch.ones(100, 1))
    found = calibration.fit_temperature(loo, 3.0, multilabel=False)
    assert 0.1 < found < 3
    assert calibration.accuracy(loo, found, multilabel=False) == 1.0
    flat = LeaveOneOutScores(torch.zeros(100, 2), torch.zeros(100, 2), labels, torch.ones(100, 1))
    assert calibration.fit_temperature(flat, 3.0, multilabel=False) is None


@pytest.mark.parametrize("multilabel", [False, True])
def test_accuracy_is_the_weighted_share_of_right_answers(multilabel):
    loo = scored(multilabel=multilabel)
    logits = loo.scores / 2 + loo.log_prior
    right = (logits > 0) == (loo.values > 0) if multilabel else (logits.argmax(1) == loo.values)[:, None]
    expected = float((right * loo.weights).sum() / loo.weights.expand_as(right).sum())
    assert calibration.accuracy(loo, 2.0, multilabel=multilabel) == pytest.approx(expected)


@pytest.mark.parametrize(("readout", "expected"), [("discriminant", 2**0.5), ("regression", 0.2)])
def test_one_row_a_class_keeps_the_documented_temperature(readout, expected):
    keys, labels = blobs(6, 3, 2, spread=0.5)
    solution = FastWeights(readout=readout).fit(keys[:2], labels[:2]).solution
    assert (solution.temperature, solution.temperature_fitted) == (expected, False)
    assert solution.leave_one_out_accuracy is None
    more = FastWeights(readout=readout).fit(keys, labels).solution
    assert more.temperature_fitted
    assert more.temperature != expected


def test_the_documented_temperatures_are_the_constants():
    text = " ".join(inspect.getdoc(Solution).split())
    default = calibration.DEFAULT_TEMPERATURE
    said = (
        f"{default['discriminant']:g} for a discriminant "
        "(the root of the number of classes where it saw one row of each)"
    )
    assert f"{said} and {default['regression']:g} for a regression" in text


@pytest.mark.parametrize("readout", ["discriminant", "regression"])
@pytest.mark.parametrize("data", [blobs, multi_hot])
def test_another_sample_changes_the_temperature_and_the_correction_alone(readout, data):
    keys, values = data(3000, 6, 3)
    one, other = (FastWeights(readout=readout, reservoir_size=200, seed=s).fit(keys, values) for s in (0, 1))
    assert float(one.temperature) != float(other.temperature)
    for name in ("weight", "bias", "log_prior"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert one.solution.regularization == other.solution.regularization


def test_switched_off_the_state_is_sums_only():
    keys, labels = blobs(700, 6, 3)
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
    with_sample = FastWeights(reservoir_size=300).fit(keys, labels)
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
