"""Logistic regression on stored keys, against scikit-learn."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression as Oracle
from torch.nn import functional as F

from lightning_faast.associative import LogisticRegression
from lightning_faast.associative.logistic import _held_out
from tests.associative.oracles import blobs


def apart(model, keys, labels, strength, **options):
    oracle = Oracle(C=strength, tol=1e-9, max_iter=10_000, **options).fit(keys.numpy(), labels.numpy())
    return float((model.predict_proba(keys) - torch.from_numpy(oracle.predict_proba(keys.numpy()))).abs().max())


@pytest.mark.parametrize("shape", [(150, 8, 3), (150, 8, 2), (60, 100, 4)])
@pytest.mark.parametrize("strength", [1e-4, 1.0, 1e4])
def test_the_optimum_is_scikit_learns(shape, strength):
    keys, labels = blobs(*shape, spread=0.5)
    model = LogisticRegression(strengths=[strength]).double().fit(keys, labels)
    assert apart(model, keys, labels, strength) < 1e-4
    assert model.figures() == {"strength": strength}


def test_balanced_classes():
    keys, labels = blobs(300, 8, 3, spread=0.5)
    keep = (labels > 0) | (torch.arange(300) % 5 == 0)
    keys, labels = keys[keep], labels[keep]
    model = LogisticRegression(strengths=[0.1], class_weight="balanced").double().fit(keys, labels)
    assert apart(model, keys, labels, 0.1, class_weight="balanced") < 1e-4
    assert apart(model, keys, labels, 0.1) > 0.01
    chosen = LogisticRegression(class_weight="balanced").double().fit(keys, labels)
    assert apart(chosen, keys, labels, chosen.figures()["strength"], class_weight="balanced") < 1e-4


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_strength_of_least_held_out_loss(scale, offset):
    keys, labels = blobs(200, 10, 3, spread=0.6)
    keys = scale * (keys + offset)
    model = LogisticRegression().double().fit(keys, labels)
    held_out = _held_out(labels, 0)
    losses, accuracies = {}, {}
    for strength in model.strengths:
        part = LogisticRegression(strengths=[strength]).double().fit(keys[~held_out], labels[~held_out])
        losses[strength] = float(F.cross_entropy(part(keys[held_out]), labels[held_out]))
        accuracies[strength] = part.score(keys[held_out], labels[held_out])
    figures = model.figures()
    best = min(losses, key=losses.get)
    assert figures["strength"] == best
    assert figures["held_out_loss"] == pytest.approx(losses[best], rel=1e-3)
    assert figures["held_out_accuracy"] == pytest.approx(accuracies[best])
    assert figures["at_edge"] == (best in (model.strengths[0], model.strengths[-1]))
    if not offset:
        assert apart(model, keys, labels, best) < 1e-4, "all rows are fitted again"


def test_the_edge_is_told():
    keys, labels = blobs(200, 10, 3, spread=0.6)
    model = LogisticRegression(strengths=[1e-4, 1e-3]).fit(keys, labels)
    assert model.figures()["at_edge"] == 1
    assert "C = 0.001 (at the grid's edge), held-out accuracy" in model.summary()


def test_a_fifth_is_held_out_by_class():
    labels = torch.cat([torch.zeros(100), torch.ones(40), torch.full((7,), 2), torch.full((1,), 3)]).long()
    held_out = _held_out(labels, 0)
    counts = torch.bincount(labels[held_out], minlength=4)
    assert counts[:2].tolist() == [20, 8]
    assert 1 <= counts[2] <= 2
    assert counts[3] == 0, "a class of one row is never held out"
    assert torch.equal(held_out, _held_out(labels, 0))
    assert not torch.equal(held_out, _held_out(labels, 1))


def test_every_class_keeps_a_row():
    for sizes in ([2] * 30, [2, 3, 4, 5, 6] * 5):
        labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        for seed in range(20):
            held_out = _held_out(labels, seed)
            assert int(torch.bincount(labels[~held_out], minlength=len(sizes)).min()) > 0


@pytest.mark.parametrize(("n", "c"), [(12, 4), (60, 60)])
def test_too_few_rows_to_choose(n, c):
    keys, _ = blobs(n, 10, 3)
    labels = torch.arange(n) % c
    model = LogisticRegression().double().fit(keys, labels)
    assert model.figures() == {"strength": 1.0}
    assert model.summary() == "logistic regression, C = 1, not chosen"
    assert apart(model, keys, labels, 1.0) < 1e-4


def test_one_class():
    with pytest.raises(ValueError, match="only one class"):
        LogisticRegression().fit(torch.randn(20, 3), torch.zeros(20).long())


def test_keys_that_do_not_vary():
    keys, labels = torch.ones(60, 3), torch.arange(60) % 3 // 2
    model = LogisticRegression().fit(keys, labels)
    assert torch.allclose(model.predict_proba(keys[:1]), torch.tensor([[2 / 3, 1 / 3]]), atol=1e-4)


def test_too_few_iterations_are_told():
    keys, labels = blobs(150, 8, 3, spread=0.5)
    with pytest.warns(UserWarning, match="did not converge in 2 iterations"):
        LogisticRegression(strengths=[1.0], max_iterations=2).fit(keys, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": []}, "strengths must be positive"),
        ({"strengths": [1.0, 0.0]}, "strengths must be positive"),
        ({"class_weight": "even"}, "class_weight must be 'balanced' or None"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        LogisticRegression(**options)


def test_no_weights_of_rows():
    keys, labels = blobs(60, 5, 3)
    with pytest.raises(ValueError, match="class_weight='balanced'"):
        LogisticRegression().update(keys, labels, torch.ones(60))


def test_many_classes_with_few_rows_get_a_strength_that_learns():
    """Under strong penalties the held-out loss moves by less than its noise; the path must not end there."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 20
    centers = torch.randn(20, 200, generator=generator)
    keys = F.normalize(centers[labels] + 1.5 * torch.randn(80, 200, generator=generator), dim=-1)
    new = F.normalize(centers[labels] + 1.5 * torch.randn(80, 200, generator=generator), dim=-1)
    model = LogisticRegression().fit(keys, labels)
    assert model.figures()["strength"] > 1
    assert model.score(new, labels) > 0.5
