"""Classifiers from class means and one covariance, against scikit-learn."""

import pytest
import torch
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestCentroid

from lightning_faast.associative import LinearDiscriminant, NearestClassMean
from tests.associative.oracles import blobs, relative

both = pytest.mark.parametrize("make", [NearestClassMean, LinearDiscriminant])


def within_rows(keys, labels):
    means = torch.stack([keys[labels == c].mean(0) for c in range(int(labels.max()) + 1)])
    return keys - means[labels], means


@pytest.mark.parametrize("shape", [(30, 50, 3), (200, 6, 4), (1000, 20, 2), (40, 1, 3)])
def test_lda_is_scikit_learns(shape):
    keys, labels = blobs(*shape)
    queries, _ = blobs(50, *shape[1:], seed=1)
    model = LinearDiscriminant().double().fit(keys, labels)
    _, shrinkage = oas(within_rows(keys, labels)[0].numpy(), assume_centered=True)
    if shape[1] > 1:  # one variance is its own mean: scikit-learn calls that no shrinkage
        assert model.figures()["shrinkage"] == pytest.approx(shrinkage, rel=1e-9)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=float(shrinkage)).fit(keys.numpy(), labels.numpy())
    assert relative(model.predict_proba(queries), torch.from_numpy(oracle.predict_proba(queries.numpy()))) < 1e-8


@pytest.mark.parametrize("shape", [(30, 50, 3), (200, 6, 4), (1000, 20, 2)])
def test_nearest_class_mean_is_scikit_learns(shape):
    keys, labels = blobs(*shape)
    queries, _ = blobs(50, *shape[1:], seed=1)
    model = NearestClassMean().double().fit(keys, labels)
    oracle = NearestCentroid().fit(keys.numpy(), labels.numpy())
    assert model.predict(queries).tolist() == oracle.predict(queries.numpy()).tolist()
    rows, means = within_rows(keys, labels)
    n, d, c = shape
    variance = rows.square().sum() / ((n - c) * d)
    assert model.figures()["variance"] == pytest.approx(float(variance), rel=1e-9)
    logits = -torch.cdist(queries, means).square() / (2 * variance)
    assert relative(model.predict_proba(queries), logits.softmax(1)) < 1e-9
    assert relative(model.weight, means / variance) > 0, "relative to the mean of all keys, which every class shares"


@both
def test_an_offset_of_all_keys_changes_nothing(make):
    keys, labels = blobs(200, 6, 4)
    model, moved = make().double().fit(keys, labels), make().double().fit(keys + 1e4, labels)
    assert relative(moved.predict_proba(keys + 1e4), model.predict_proba(keys)) < 1e-5


@both
def test_weights_are_repeated_rows(make):
    keys, labels = blobs(60, 5, 3)
    weights = torch.randint(1, 4, (60,))
    weighted = make().double()
    weighted.update(keys, labels, weights.double())
    weighted.solve()
    repeated = make().double().fit(keys.repeat_interleave(weights, 0), labels.repeat_interleave(weights))
    assert relative(weighted(keys), repeated(keys)) < 1e-10
    with pytest.raises(ValueError, match="one a row"):
        make().update(keys, labels, torch.ones(7))


@both
def test_one_row_a_class(make):
    keys, _ = blobs(5, 8, 2)
    model = make().double().fit(keys, torch.arange(5))
    assert model.score(keys, torch.arange(5)) == 1
    nearest = torch.cdist(keys + 0.1, keys).argmin(1)
    assert torch.equal(model.predict(keys + 0.1), nearest)
    assert model.predict_proba(keys).max() < 1


@both
def test_rows_that_repeat_within_each_class(make):
    keys, _ = blobs(5, 8, 2)
    labels = torch.arange(5).repeat(3)
    assert make().double().fit(keys.repeat(3, 1), labels).score(keys, torch.arange(5)) == 1


@both
def test_keys_that_are_all_equal(make):
    with pytest.raises(ValueError, match="All keys are equal"):
        make().fit(torch.ones(10, 4), torch.arange(10) % 2)


@both
def test_bytes(make):
    model = make(6, 4).fit(*blobs(100, 6, 4))
    assert model.bytes_to_predict == 4 * (4 * 6 + 4)
    assert model.bytes_to_update == model.statistics.num_bytes
    weight, bias = model.linear()
    assert (weight.shape, bias.shape) == ((4, 6), (4,))
