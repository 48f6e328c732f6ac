"""Read-outs and their leave-one-out scores, against NumPy, scikit-learn and really leaving the row out."""

import math

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from lightning_faast.associative import (
    Choice,
    Discriminant,
    FastWeights,
    PairedDiscriminants,
    Regression,
    Ridge,
    Truncation,
)
from lightning_faast.associative.readout import MASKED_LOGIT, ONE_SHOT_SHRINKAGE
from tests.associative.oracles import (
    PlainDiscriminant,
    blobs,
    centred_scores,
    multi_hot,
    one_hot,
    relative,
    ridge_solution,
    spectrum_of,
    statistics_of,
)

MU = 2.0
PRIMAL_AND_DUAL = pytest.mark.parametrize("shape", [(40, 6), (14, 50)], ids=["primal", "dual"])
WEIGHTED = pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])


def discriminant(keys, labels, weights=None, *, shrink=True, mu=MU, dual=False, prior=None):
    counts = statistics_of(keys, labels, weights).class_counts
    return Discriminant(spectrum_of(keys, labels, weights, dual=dual), Choice("ridge", mu), counts, prior, shrink)


def some_weights(n, weighted):
    return torch.rand(n, dtype=torch.float64) + 0.3 if weighted else None


def applied(linear, keys):
    return keys @ linear.weight.T + linear.bias


# ---------------------------------------------------------------------- the solved maps


@PRIMAL_AND_DUAL
@WEIGHTED
@pytest.mark.parametrize("shrink", [True, False])
def test_discriminant_is_the_formula(shape, weighted, shrink):
    keys, labels = blobs(*shape, 3, spread=0.7)
    weights = some_weights(len(keys), weighted)
    found = discriminant(keys, labels, weights, shrink=shrink, dual=shape[0] < shape[1])
    oracle = PlainDiscriminant(keys, labels, MU, weights, k=None if shrink else 0.0)
    assert found.shrinkage == pytest.approx(oracle.shrinkage, rel=1e-9)
    fresh = torch.randn(20, shape[1], dtype=torch.float64)
    assert relative(centred_scores(applied(found.linear(), fresh)), oracle.scores(fresh)) < 1e-10
    assert relative(found.linear().log_prior, torch.from_numpy(oracle.log_prior)) < 1e-12


def test_one_row_a_class_takes_the_documented_shrinkage():
    keys, labels = blobs(10, 6, 5)
    assert discriminant(keys[:5], labels[:5]).shrinkage == ONE_SHOT_SHRINKAGE == 2
    assert discriminant(keys[:5], labels[:5], shrink=False).shrinkage == 0
    assert discriminant(keys[:2], labels[:2]).shrinkage == 0


def test_shrinkage_follows_noise_and_signal():
    strong, none = (discriminant(*blobs(300, 5, 6, spread=spread)) for spread in (3.0, 0.0))
    assert 0 < strong.shrinkage < 1
    assert none.shrinkage > 30, "without any difference between the means, they shrink to their average"
    assert discriminant(*blobs(50, 5, 2)).shrinkage == 0, "two classes do not tell a variance between classes"


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("shape", [(200, 6), (30, 70)])
@pytest.mark.parametrize("prior", ["frequency", "uniform", "given"])
def test_discriminant_is_scikit_learns_with_equal_shrinkage(classes, shape, prior):
    """Its covariance (1 - s) S_w/N + s tr(S_w/N)/d I is (1 - s) times ours at mu = N s/(1 - s) tr(S_w/N)/d."""
    keys, labels = blobs(*shape, classes)
    n, d = shape
    means = torch.stack([keys[labels == c].mean(0) for c in range(classes)])
    s, trace = 0.2, float((keys - means[labels]).square().sum()) / n
    frequency = labels.bincount().double() / n
    wanted = {
        "frequency": frequency,
        "uniform": torch.full((classes,), 1 / classes, dtype=torch.float64),
        "given": torch.softmax(torch.arange(float(classes)), 0).double(),
    }[prior]
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s).fit(keys.numpy(), labels.numpy())
    fresh = torch.randn(50, d, dtype=torch.float64)
    # Its priors also weigh the covariance; Bayes' rule puts ours in place of the training frequencies.
    decision = torch.from_numpy(lda.decision_function(fresh.numpy())).reshape(50, -1)
    expected = decision if classes > 2 else torch.cat([-decision / 2, decision / 2], 1)
    expected = expected + (wanted / frequency).log()

    mu = n * s / (1 - s) * trace / d
    given = wanted if prior == "given" else prior
    model = FastWeights(regularization=Ridge(mu), shrink_means=False, prior=given, reservoir_size=0).double()
    model.fit(keys, labels)
    logits = applied(model, fresh) / (1 - s) + model.log_prior
    assert relative(centred_scores(logits), centred_scores(expected)) < 1e-10
    assert relative(logits.softmax(-1), expected.softmax(-1)) < 1e-10


@pytest.mark.parametrize("shape", [(60, 5), (10, 40)])
def test_regression_is_ridge_with_exact_centring(shape):
    keys, labels = blobs(*shape, 3)
    found = Regression(spectrum_of(keys, labels), Choice("ridge", MU)).linear()
    weight, bias = ridge_solution(keys, one_hot(labels), MU, bias=True)
    assert relative(found.weight, weight) < 1e-11
    assert relative(found.bias, bias) < 1e-11


@WEIGHTED
def test_paired_discriminants_are_two_class_discriminants(weighted):
    keys, values = multi_hot(60, 5, 4)
    weights = some_weights(60, weighted)
    spectrum, sums = spectrum_of(keys, values, weights), statistics_of(keys, values, weights)
    found = PairedDiscriminants(spectrum, Choice("ridge", MU), sums.value_sum, None).linear()
    for column in range(4):
        oracle = PlainDiscriminant(keys, values[:, column], MU, weights, k=0.0)
        pair = oracle.scores(keys) + torch.from_numpy(oracle.log_prior)
        logit = (applied(found, keys) + found.log_prior)[:, column]
        assert relative(logit, pair[:, 1] - pair[:, 0]) < 1e-10


# ---------------------------------------------------------------------- leave-one-out


def without(i, keys, values, weights):
    rest = torch.arange(len(keys)) != i
    return keys[rest], values[rest], None if weights is None else weights[rest]


def leave_one_out(readout, keys, values, weights):
    return readout.leave_one_out(
        readout.spectrum.coordinates(keys), values, torch.ones(len(keys)) if weights is None else weights
    )


@PRIMAL_AND_DUAL
@WEIGHTED
@pytest.mark.parametrize("bias", [True, False])
def test_regression_scores_are_those_of_the_row_really_left_out(shape, weighted, bias):
    keys, labels = blobs(*shape, 3)
    weights = some_weights(len(keys), weighted)
    spectrum = spectrum_of(keys, labels, weights, centered=bias, dual=shape[0] < shape[1])
    found = leave_one_out(Regression(spectrum, Choice("ridge", MU)), keys, labels, weights)
    for i in range(len(keys)):
        rest, targets, left = without(i, keys, one_hot(labels), weights)
        linear = Regression(spectrum_of(rest, targets, left, centered=bias), Choice("ridge", MU)).linear()
        assert relative(found.scores[i], applied(linear, keys[i])) < 1e-12
    assert bool((found.weights > 0).all())


@PRIMAL_AND_DUAL
@WEIGHTED
@pytest.mark.parametrize("shrink", [True, False])
def test_discriminant_scores_are_those_of_the_row_really_left_out(shape, weighted, shrink):
    """Mu, k and the prior are those of the fit."""
    keys, labels = blobs(*shape, 3, spread=0.7)
    weights = some_weights(len(keys), weighted)
    readout = discriminant(keys, labels, weights, shrink=shrink, dual=shape[0] < shape[1])
    found = leave_one_out(readout, keys, labels, weights)
    worst = 0.0
    for i in range(len(keys)):
        oracle = PlainDiscriminant(
            *without(i, keys, labels, weights)[:2], MU, without(i, keys, labels, weights)[2], readout.shrinkage
        )
        worst = max(worst, relative(centred_scores(found.scores[i]), oracle.scores(keys[i : i + 1])[0]))
        assert torch.equal(found.log_prior[i], readout.linear().log_prior)
    print(f"worst {worst:.1e}")
    assert worst < 1e-12
    assert bool((found.weights > 0).all())


@PRIMAL_AND_DUAL
@WEIGHTED
def test_paired_scores_are_those_of_the_row_really_left_out(shape, weighted):
    keys, values = multi_hot(*shape, 3)
    weights = some_weights(len(keys), weighted)
    sums = statistics_of(keys, values, weights)
    spectrum = spectrum_of(keys, values, weights, dual=shape[0] < shape[1])
    found = leave_one_out(
        PairedDiscriminants(spectrum, Choice("ridge", MU), sums.value_sum, None), keys, values, weights
    )
    for i in range(len(keys)):
        rest, targets, left = without(i, keys, values, weights)
        linear = PairedDiscriminants(
            spectrum_of(rest, targets, left), Choice("ridge", MU), statistics_of(rest, targets, left).value_sum, None
        ).linear()
        defined = found.weights[i] > 0
        assert relative(found.scores[i][defined], applied(linear, keys[i])[defined]) < 1e-11
        both = torch.stack([targets.double().mean(0) > 0, targets.double().mean(0) < 1]).all(0)
        assert torch.equal(defined, both)


def test_truncated_scores_hold_the_subspace_fixed():
    keys, labels = blobs(60, 4, 3)
    found = leave_one_out(Regression(spectrum_of(keys, labels), Choice("truncation", 1e-6)), keys, labels, None)
    rest, targets, _ = without(0, keys, one_hot(labels), None)
    linear = Regression(spectrum_of(rest, targets), Choice("truncation", 1e-6)).linear()
    assert relative(found.scores[0], applied(linear, keys[0])) < 1e-11, "nothing is cut here, so the subspace is all"


def test_the_last_row_of_a_class_has_no_score():
    keys, labels = blobs(30, 5, 2)
    labels[-1] = 2
    found = leave_one_out(discriminant(keys, labels), keys, labels, None)
    assert (found.weights[:, 0] > 0).tolist() == [True] * 29 + [False]
    assert bool(found.scores.isfinite().all())


def test_a_row_that_the_fit_passes_through_has_no_score():
    keys = torch.randn(6, 20, dtype=torch.float64)
    labels = torch.arange(6) % 2
    found = leave_one_out(Regression(spectrum_of(keys, labels), Choice("truncation", 1e-12)), keys, labels, None)
    assert not bool((found.weights > 0).any())
    assert bool(found.scores.isfinite().all())


# ---------------------------------------------------------------------- edges


def test_singular_within_class_scatter_is_refused():
    keys, labels = torch.eye(4, dtype=torch.float64)[torch.arange(20) % 4], torch.arange(20) % 4
    with pytest.raises(ValueError, match="within-class scatter is singular"):
        discriminant(keys[:, :3], labels, mu=0.0)
    with pytest.raises(ValueError, match=r"singular"):
        FastWeights(regularization=Ridge(0.0)).fit(torch.randn(8, 6), torch.arange(8) % 4)


@pytest.mark.parametrize("classes", [2, 4])
def test_classes_of_identical_keys_are_told_apart(classes):
    labels = torch.arange(80) % classes
    keys = torch.randn(classes, 10)[labels]
    model = FastWeights().fit(keys, labels)
    assert model.score(keys, labels) == 1.0
    assert bool(model.predict_proba(keys).isfinite().all())
    assert math.isfinite(model.solution.temperature)


@pytest.mark.parametrize("prior", [None, "zero"])
def test_masked_classes_are_never_the_highest(prior):
    """Scores of well separated classes are large and negative away from their means: far below the mask itself."""
    keys, labels = blobs(60, 5, 3, spread=1e4)
    labels = labels + (labels > 0).long()  # class 1 is empty
    given = torch.tensor([0.5, 0.0, 0.5, 0.0]).double() if prior else None
    found = discriminant(keys, labels, prior=given, mu=1e-6)
    linear = found.linear()
    logits = applied(linear, torch.randn(200, 5, dtype=torch.float64) * 1e5) + linear.log_prior
    assert float(logits.min()) < 10 * MASKED_LOGIT
    hidden = [1, 3] if prior else [1]
    assert float(logits.softmax(-1)[:, hidden].max()) == 0
    scored = leave_one_out(found, keys, labels, None)
    assert float((scored.scores + scored.log_prior).softmax(-1)[:, hidden].max()) == 0


def test_a_prior_on_empty_classes_alone_is_refused():
    keys, labels = blobs(30, 5, 2)
    with pytest.raises(ValueError, match="classes without rows"):
        FastWeights(5, 3, prior=[0.0, 0.0, 1.0], empty_classes="mask").fit(keys, labels)


def test_a_perfectly_linear_column_keeps_its_decisions():
    """R^2 = 1: the scale of the discriminant is unbounded, its sign is not."""
    keys = torch.randn(200, 4, dtype=torch.float64)
    values = torch.stack([keys[:, 0] > 0, keys[:, 1] > 0], 1)
    keys = torch.cat([keys, values.double()], 1)
    model = FastWeights().double().fit(keys, values)
    assert model.score(keys, values) == 1.0
    assert bool(model.weight.isfinite().all())


@pytest.mark.parametrize("rule", [Ridge(1e-3), Ridge(10.0)])
def test_the_discriminants_bound_is_a_bound(rule):
    keys, labels = blobs(300, 20, 3)
    keys = keys * torch.logspace(0, -5, 20)
    model = FastWeights(regularization=rule, shrink_means=False).double().fit(keys, labels)
    oracle = PlainDiscriminant(keys, labels, rule.mu, k=0.0)
    error = relative(centred_scores(model.weight.T), centred_scores(torch.from_numpy(oracle.weight).T))
    assert error <= model.solution.error_bound < 1e-4


def test_truncation_cannot_be_read_out_as_a_discriminant():
    with pytest.raises(ValueError, match="needs a ridge"):
        FastWeights(regularization=Truncation(0.1), readout="discriminant")
