"""The correction of a discriminant by logistic regression on its own leave-one-out scores."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional as F

from lightning_faast.associative import FastWeights, Spectrum, correction
from lightning_faast.associative.readout import LeaveOneOutScores
from tests.associative.oracles import PlainDiscriminant, blobs, relative, statistics_of


def skewed(n, seed=0):
    """Three classes of very unequal spread, for which one shared covariance is wrong."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    spread = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)[labels]
    keys = torch.randn(n, 4, generator=generator, dtype=torch.float64) * spread[:, None] + 1
    keys[:, 0] += labels
    return keys, labels


def most_probable(model, loo_scores, keys, labels, weights):
    """B, b by SciPy, straight from the formula, in the keys' own coordinates."""
    centred = keys - (keys * weights[:, None]).sum(0) / weights.sum()
    scale = float((weights.sum() / (weights[:, None] * centred.square()).sum()).sqrt())
    z = (centred * scale).numpy()
    counts = torch.zeros(loo_scores.shape[1], dtype=torch.float64).index_add(0, labels, weights)
    offset = (loo_scores / model.solution.temperature + (counts / counts.sum()).log()).numpy()
    c, d = offset.shape[1], z.shape[1]

    def nats(flat):
        weight, bias = flat[: c * d].reshape(d, c), flat[c * d :]
        logits = torch.from_numpy(offset + z @ weight + bias)
        loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
        return float(loss) + correction.PRECISION / 2 * float((flat**2).sum())

    found = minimize(nats, np.zeros(c * d + c), method="L-BFGS-B", options={"ftol": 1e-15, "maxiter": 2000}).x
    weight = scale * torch.from_numpy(found[: c * d].reshape(d, c).T.copy())
    key_mean = keys.double().mul(weights[:, None]).sum(0) / weights.sum()
    return weight, torch.from_numpy(found[c * d :]) - weight @ key_mean


@pytest.mark.parametrize("prior", ["frequency", "uniform"])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_most_probable_one_at_the_training_frequencies(prior, weighted):
    keys, labels = skewed(120)
    labels[:30] = 2
    weights = torch.arange(120).remainder(3).double() + 1 if weighted else torch.ones(120, dtype=torch.float64)
    model = FastWeights(prior=prior).double().fit(keys, labels, weights)
    spectrum_scores = _leave_one_out(model, keys, labels, weights)
    weight, bias = most_probable(model, spectrum_scores, keys, labels, weights)
    assert relative(model.correction_weight, weight) < 1e-3
    assert relative(model.correction_bias, bias) < 1e-3


def _leave_one_out(model, keys, labels, weights):
    """Scores of each row from a fit without it at the same ridge and shrinkage, by brute force."""
    mu, k = model.solution.regularization.value, model.solution.shrinkage
    scores = []
    for i in range(len(keys)):
        rest = torch.arange(len(keys)) != i
        plain = PlainDiscriminant(keys[rest], labels[rest], mu, weights[rest], k)
        scores.append(plain.scores(keys[i : i + 1])[0])
    return torch.stack(scores)


def test_it_mends_what_gaussian_classes_get_wrong():
    """Keys with heavy tails, labels of a logistic model: no discriminant's assumption holds."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(6000, 4, generator=generator, dtype=torch.float64).exp()
    slopes = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    labels = (3 * keys @ slopes - 3 * (keys @ slopes).mean(0)).softmax(1).multinomial(1, generator=generator)[:, 0]
    keys, labels, unseen, truth = keys[:3000], labels[:3000], keys[3000:], labels[3000:]
    plain, corrected = (FastWeights(correct=on).double().fit(keys, labels) for on in (False, True))
    assert torch.equal(plain.weight, corrected.weight)
    assert float(F.cross_entropy(corrected(unseen), truth)) < float(F.cross_entropy(plain(unseen), truth)) - 0.02


def test_keys_of_another_scale_and_origin_get_the_same_logits():
    keys, labels = blobs(200, 5, 3)
    one = FastWeights().double().fit(keys, labels)
    other = FastWeights().double().fit(1000 * keys - 70, labels)
    assert relative(other(1000 * keys - 70), one(keys)) < 1e-4


@pytest.mark.parametrize(
    ("rows", "classes", "complete", "expected"),
    [(100, 5, False, True), (99, 5, False, False), (99, 5, True, True), (0, 5, True, False)],
)
def test_a_partial_sample_must_hold_twenty_rows_a_class(rows, classes, complete, expected):
    assert correction.can_correct(rows, classes, complete=complete) is expected


def test_a_sample_that_stands_for_more_rows_corrects_less():
    keys, labels = skewed(120)
    once = FastWeights().double().fit(keys, labels)
    for times, precision in ((1, correction.PRECISION), (4, 2 * correction.PRECISION)):
        spectrum = Spectrum.from_statistics(statistics_of(keys.repeat(times, 1), labels.repeat(times)), centered=True)
        weights = torch.ones(120, 1, dtype=torch.float64)
        scores = LeaveOneOutScores(torch.zeros(120, 3).double(), once.log_prior.expand(120, 3), labels, weights)
        found = correction.fit_correction(spectrum, spectrum.coordinates(keys), scores, 1.0)
        logits = keys @ found.weight.T + found.bias + once.log_prior
        residual = logits.softmax(1) - F.one_hot(labels)
        # Where the gradient is zero: precision B = sum of residuals times unit-scale keys.
        scale = (spectrum.count / spectrum.eigenvalues.sum()).sqrt()
        gradient = (residual.T @ (keys - keys.mean(0))) * scale + precision * found.weight / scale
        assert float(gradient.abs().max()) < 1e-3


def test_where_there_is_none_it_is_zero():
    keys, labels = blobs(500, 5, 3)
    for options in ({"correct": False}, {"reservoir_size": 0}, {"readout": "regression"}, {"reservoir_size": 29}):
        model = FastWeights(**options).fit(keys, labels)
        assert model.solution.correction is None
        assert not model.correction_weight.any()
        assert model.correction_weight.shape == model.weight.shape
    assert FastWeights(reservoir_size=60).fit(keys, labels).correction_weight.any()


def test_masked_classes_get_none():
    keys, labels = blobs(90, 5, 3)
    model = FastWeights(out_features=5, empty_classes="mask").double().fit(keys, labels)
    assert model.correction_weight[:3].any()
    assert not model.correction_weight[3:].any()
    assert model.predict_proba(keys)[:, 3:].max() == 0


def far_off(n, seed):
    """Half of the second class lies far away in a direction that does not matter, and bends the discriminant."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    keys = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    keys[:, 0] += 2 * labels
    keys[:, 1] += 30 * labels * (torch.arange(n) % 4 == 1)
    return keys, labels


def test_many_rows_choose_their_precision():
    """Where the discriminant is far off, a held-out fifth asks for less of a prior, and new rows agree."""
    (keys, labels), (new_keys, new_labels) = far_off(5000, 0), far_off(5000, 1)
    model = FastWeights(reservoir_size=5000).double().fit(keys, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correction, "ROWS_TO_CHOOSE", 10**9)
        fixed = FastWeights(reservoir_size=5000).double().fit(keys, labels)
    assert not torch.equal(model.correction_weight, fixed.correction_weight)
    losses = [F.cross_entropy(each(new_keys), new_labels) for each in (model, fixed)]
    assert losses[0] < losses[1]


def test_precision_stays_where_the_discriminant_is_right():
    generator = torch.Generator().manual_seed(0)
    z = F.pad(torch.randn(4000, 3, generator=generator, dtype=torch.float64) / 3**0.5, (0, 1), value=1.0)
    offset = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(offset.softmax(1), 1, generator=generator)[:, 0]
    sample = correction._Sample(
        z, offset, F.one_hot(labels, 2).double(), torch.ones(4000, 1, dtype=torch.float64), z.square().mean(0)
    )
    assert correction._choose(sample, 50.0) == 50.0
