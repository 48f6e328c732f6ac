"""ResidualFastWeights: its sums and its step against dense float64 formulas; order, merging, state, processes."""

import pytest
import torch
from torch import nn

from lightning_faast.language import FastWeightLM, OutputLayer, ResidualFastWeights
from lightning_faast.language.candidates import Candidate, Candidates
from lightning_faast.language.latest import LatestTokens
from lightning_faast.language.residual import Curvature
from lightning_faast.language.token_store import TokenStore
from tests.associative.test_fast_weights import Group
from tests.language.models import llama, text

D, V = 12, 40
FIXED = {"step": 0.7, "key_ridge": 1e-3, "value_ridge": 0.1}
PLAIN = {**FIXED, "token_bias": False}


@pytest.fixture
def output():
    return OutputLayer(nn.Linear(D, V, bias=False, dtype=torch.float64))


def stream(output, sequences=20, length=30, width=D):
    """Hidden states whose next tokens follow a map that is not the identity."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(sequences, length, width, dtype=torch.float64, generator=generator)
    turned = hidden[..., -D:] + 2 * hidden[..., -D:].roll(1, -1)
    tokens = (8 * output.logits(turned)).softmax(-1).flatten(0, 1).multinomial(1, generator=generator)
    return hidden, tokens.view(sequences, length).roll(1, 1)  # the token of a state is the label one place on


def rows_of(hidden, labels):
    return hidden[:, :-1].reshape(-1, hidden.shape[-1]), labels[:, 1:].reshape(-1)


def dense(output, keys, hidden, targets, at=None):
    """G, C and mean F with all logits at once."""
    hidden = hidden if at is None else hidden + keys @ at.T
    p = output.logits(hidden).softmax(-1)
    weight = output.module.weight.detach()
    r = weight[targets] - p @ weight
    return keys.T @ keys, keys.T @ r, r.T @ r / len(r)


def formula(g, c, f, s, key_ridge, value_ridge):
    largest = [torch.linalg.eigvalsh(m)[-1] for m in (g, f)]
    left = f + value_ridge * largest[1] * torch.eye(len(f), dtype=f.dtype)
    right = g + key_ridge * largest[0] * torch.eye(len(g), dtype=g.dtype)
    return s * torch.linalg.solve(left, c.T) @ torch.linalg.inv(right)


def test_sums_and_step_are_the_formulas(output):
    hidden, labels = stream(output)
    keys, targets = rows_of(hidden, labels)
    layer = ResidualFastWeights(output, **PLAIN, block_elements=500).fit(hidden, labels)
    g, c, f = dense(output, keys, keys, targets)
    gram = layer._everything().statistics.gram
    torch.testing.assert_close(gram[:D, :D], g, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram[:D, D:], c, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gram[D:, D:] / len(keys), f, rtol=1e-11, atol=1e-11)
    expected = formula(g, c, f, FIXED["step"], FIXED["key_ridge"], FIXED["value_ridge"])
    torch.testing.assert_close(layer.weight, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer(keys), keys + keys @ expected.T, rtol=1e-9, atol=1e-9)
    assert layer.rows == len(keys)
    assert layer.solution.loss_before is None


def test_further_passes_step_from_the_point_reached(output):
    hidden, labels = stream(output)
    keys, targets = rows_of(hidden, labels)
    layer = ResidualFastWeights(output, **PLAIN, passes=3).fit(hidden, labels)
    point = torch.zeros(D, D, dtype=torch.float64)
    for _ in range(3):
        point = point + formula(*dense(output, keys, keys, targets, point), *FIXED.values())
    torch.testing.assert_close(layer.weight, point, rtol=1e-8, atol=1e-10)


def test_several_hidden_states_are_unit_keys(output):
    hidden, labels = stream(output, width=5 + D)
    keys, targets = rows_of(hidden, labels)
    unit = torch.cat([nn.functional.normalize(part, dim=-1) for part in keys.split([5, D], 1)], 1)
    layer = ResidualFastWeights(output, **PLAIN, key_widths=[5]).fit(hidden, labels)
    expected = formula(*dense(output, unit, keys[:, 5:], targets), *FIXED.values())
    torch.testing.assert_close(layer.weight, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer(hidden), hidden[..., 5:] + layer._features(hidden) @ expected.T)


def test_the_choice_lowers_the_loss_and_held_out_tokens_are_learned_too(output):
    hidden, labels = stream(output)
    keys, targets = rows_of(hidden, labels)
    layer = ResidualFastWeights(output, held_out_tokens=50, token_bias=False).fit(hidden, labels)
    assert layer.solution.loss_after < layer.solution.loss_before
    assert 0 < layer._held.size <= 50
    assert layer.rows == len(keys)
    chosen = layer.solution.steps[0]
    all_rows = formula(*dense(output, keys, keys, targets), chosen.step, chosen.key_ridge, chosen.value_ridge)
    torch.testing.assert_close(layer.weight, all_rows, rtol=1e-8, atol=1e-10)
    assert output.loss(layer(keys), targets).mean() < output.loss(keys, targets).mean()
    figures = layer.figures()
    assert figures["perplexity_after"] < figures["perplexity_before"]
    assert figures["tokens"] == len(keys)
    assert "held-out perplexity" in layer.summary()


def test_the_bias_and_the_centred_step_are_the_formulas(output):
    hidden, labels = stream(output)
    keys, targets = rows_of(hidden, labels)
    layer = ResidualFastWeights(output, **FIXED, smoothing=2.0).fit(hidden, labels)
    p = output.logits(keys).softmax(-1)
    bias = ((torch.bincount(targets, minlength=V) + 2) / (p.sum(0) + 2)).log().detach()
    torch.testing.assert_close(layer.token_bias, bias, rtol=1e-11, atol=1e-11)
    weight = output.module.weight.detach()
    r = weight[targets] - (p @ weight).detach()
    k, r = keys - keys.mean(0), r - r.mean(0)
    expected = formula(k.T @ k, k.T @ r, r.T @ r / len(r), *FIXED.values())
    torch.testing.assert_close(layer.weight, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer(keys), keys + k @ expected.T, rtol=1e-9, atol=1e-9)
    logits = output.logits(layer(keys)) + bias
    torch.testing.assert_close(layer.predict_proba(keys), logits.softmax(-1).detach())
    assert layer.bytes_to_predict == 8 * (D * D + D + V)


def test_the_bias_learns_how_often_tokens_come(output):
    hidden = torch.randn(30, 40, D, dtype=torch.float64)
    frequent = torch.zeros(V, dtype=torch.float64)
    frequent[[3, 8]] = 2.0  # whatever the state is
    p = output.logits(hidden, frequent).softmax(-1).flatten(0, 1)
    labels = p.multinomial(1).view(30, 40).roll(1, 1)
    losses = {}
    for token_bias in (True, False):
        layer = ResidualFastWeights(output, token_bias=token_bias).fit(hidden, labels)
        losses[token_bias] = layer.solution.loss_after
    assert losses[True] < losses[False]
    layer = ResidualFastWeights(output).fit(hidden, labels)
    assert set(layer.token_bias.topk(2).indices.tolist()) == {3, 8}
    layer.forget()
    assert not layer.changes_logits or not layer.token_bias.any()


def test_a_bias_of_tokens_reaches_the_model_and_leaves_it():
    model = llama()
    ids = text(8, 20)
    before = model(ids).logits
    with FastWeightLM(model) as lm:
        lm.learn(ids)
        after = lm(ids).logits
        hidden = lm.learner(lm.keys(ids))
        torch.testing.assert_close(after, lm.learner.output.logits(hidden, lm.learner.token_bias), rtol=1e-5, atol=1e-5)
        assert lm.learner.token_bias.any()
    assert torch.equal(model(ids).logits, before)


def test_noise_is_not_learned(output):
    hidden = torch.randn(20, 30, D, dtype=torch.float64)
    p = output.logits(hidden).softmax(-1).flatten(0, 1)
    labels = p.multinomial(1).view(20, 30).roll(1, 1)  # the model is right already
    layer = ResidualFastWeights(output, step=(1.0, 0.5)).fit(hidden, labels)
    assert not layer.solution.steps
    assert not layer.weight.any()
    assert "no step" in layer.summary()


@pytest.mark.parametrize("cuts", [[20], [1] * 20, [7, 13], [3, 16, 1]])
def test_batching_does_not_matter(output, cuts):
    hidden, labels = stream(output)
    whole = ResidualFastWeights(output).fit(hidden, labels)
    parts = ResidualFastWeights(output)
    for h, y in zip(hidden.split(cuts), labels.split(cuts), strict=True):
        parts.update(h, y)
    parts.solve()
    torch.testing.assert_close(
        parts._everything().statistics.gram, whole._everything().statistics.gram, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-9, atol=1e-12)
    assert parts.solution.steps == whole.solution.steps


def test_order_does_not_matter_where_nothing_is_chosen(output):
    hidden, labels = stream(output)
    order = torch.randperm(len(hidden))
    one = ResidualFastWeights(output, **FIXED).fit(hidden, labels)
    other = ResidualFastWeights(output, **FIXED).fit(hidden[order], labels[order])
    torch.testing.assert_close(
        one._everything().statistics.gram, other._everything().statistics.gram, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("options", [FIXED, {}], ids=["fixed", "chosen"])
def test_merging_and_subtracting(output, options):
    hidden, labels = stream(output)
    whole = ResidualFastWeights(output, **options).fit(hidden, labels)
    one = ResidualFastWeights(output, **options).fit(hidden[:12], labels[:12])
    other = ResidualFastWeights(output, **options).fit(hidden[12:], labels[12:])
    before, steps = one._everything().statistics.gram, one.solution.steps
    one.merge(other)
    assert one.rows == whole.rows
    torch.testing.assert_close(
        one._everything().statistics.gram, whole._everything().statistics.gram, rtol=1e-12, atol=1e-11
    )
    one.subtract(other)
    torch.testing.assert_close(one._everything().statistics.gram, before, rtol=1e-11, atol=1e-11)
    one.solve()
    assert one.solution.steps == steps
    with pytest.raises(ValueError, match="not all among them"):
        other.subtract(whole)


def test_merging_into_an_empty_layer(output):
    hidden, labels = stream(output)
    full = ResidualFastWeights(output).fit(hidden, labels)
    empty = ResidualFastWeights(output)
    empty.merge(full)
    empty.solve()
    torch.testing.assert_close(empty.weight, full.weight, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="other keys"):
        empty.merge(ResidualFastWeights(output, normalize=True))


@pytest.mark.parametrize("options", [FIXED, {}, {"passes": 2}], ids=["fixed", "chosen", "passes"])
def test_state_goes_on(output, options):
    hidden, labels = stream(output)
    one, other = ResidualFastWeights(output, **options), ResidualFastWeights(output, **options)
    one.update(hidden[:12], labels[:12])
    other.load_learned_state(one.learned_state())
    for layer in (one, other):
        layer.update(hidden[12:], labels[12:])
        layer.solve()
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="Not a state"):
        other.load_learned_state({"nothing": torch.zeros(1)})


def test_stored_tokens_on_disk_are_those_in_memory(output, tmp_path):
    hidden, labels = stream(output)
    options = {"passes": 3, "held_out_tokens": 50}
    memory = ResidualFastWeights(output, **options).fit(hidden, labels)
    disk = ResidualFastWeights(output, **options, store=tmp_path / "states")
    disk.update(hidden, labels)
    disk.solve()
    torch.testing.assert_close(memory.weight, disk.weight, rtol=1e-12, atol=1e-14)
    assert list((tmp_path / "states").iterdir())
    with pytest.raises(FileExistsError, match="give an empty folder"):
        ResidualFastWeights(output, passes=2, store=tmp_path / "states")
    disk.reset()
    assert not list((tmp_path / "states").iterdir())


def test_the_store_is_bounded_and_says_so(output):
    hidden, labels = stream(output)
    limit = 5000
    layer = ResidualFastWeights(output, passes=2, store_bytes=limit, held_out_tokens=50)
    for h, y in zip(hidden, labels, strict=True):
        layer.update(h[None], y[None])
    layer.solve()
    assert 0 < layer._store.num_bytes <= limit
    assert 0 < layer.figures()["stored_tokens"] < layer.rows
    store = TokenStore(limit)
    store.add(torch.zeros(10**4, 2), torch.zeros(10**4), torch.zeros(10**4))
    assert store.full
    assert not store.tokens


@pytest.mark.parametrize("cuts", [(8, 14), (0, 20)])
@pytest.mark.parametrize("options", [FIXED, {}, {"held_out_tokens": 70}], ids=["fixed", "chosen", "few"])
def test_processes_learn_what_one_would(output, cuts, options):
    hidden, labels = stream(output)
    one = ResidualFastWeights(output, **options).fit(hidden, labels)
    layers = [ResidualFastWeights(output, **options) for _ in range(3)]
    for layer, i, j in zip(layers, (0, *cuts), (*cuts, 20), strict=True):
        layer.update(hidden[i:j], labels[i:j])
    for future in Group(3).run(layers):
        future.result()
    for layer in layers:
        layer.solve()
        assert layer.rows == one.rows
        assert layer.solution.steps == layers[0].solution.steps
        torch.testing.assert_close(
            layer._everything().statistics.gram, one._everything().statistics.gram, rtol=1e-11, atol=1e-11
        )
        torch.testing.assert_close(layer.weight, layers[0].weight, rtol=0, atol=0)


def test_several_passes_stay_in_one_process(output):
    layers = [ResidualFastWeights(output, passes=2) for _ in range(2)]
    for future in Group(2).run(layers):
        with pytest.raises(ValueError, match="need all tokens in one process"):
            future.result()


def test_weights_count_as_repeats(output):
    hidden, labels = stream(output)
    rows, targets = rows_of(hidden, labels)
    weights = torch.randint(0, 3, (len(rows),))
    one = ResidualFastWeights(output, **FIXED)
    one.update(rows, targets, weights.double())
    one.solve()
    two = ResidualFastWeights(output, **FIXED).fit(
        rows.repeat_interleave(weights, 0), targets.repeat_interleave(weights)
    )
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-9, atol=1e-12)
    sequences = ResidualFastWeights(output, **FIXED)
    sequences.update(hidden, labels, nn.functional.pad(weights.view(20, -1).double(), (1, 0)))
    sequences.solve()
    torch.testing.assert_close(one.weight, sequences.weight, rtol=1e-9, atol=1e-12)


def test_bad_rows_change_nothing(output):
    hidden, labels = stream(output)
    layer = ResidualFastWeights(output)
    layer.update(hidden[:4], labels[:4])
    before = {name: t.clone() for name, t in layer.learned_state().items()}
    bad = hidden[4:8].clone()
    bad[2, 3, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.update(bad, labels[4:8])
    with pytest.raises(ValueError, match="Token id 40 is outside"):
        layer.update(hidden[4:8], labels[4:8].clone().fill_(V))
    with pytest.raises(ValueError, match="keys must have width 12"):
        layer.update(hidden[..., 1:], labels)
    with pytest.raises(ValueError, match="values must be token ids"):
        layer.update(hidden, labels[:, 1:])
    with pytest.raises(ValueError, match="weights must be"):
        layer.update(hidden, labels, torch.ones(3))
    after = layer.learned_state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_seen_is_refused(output):
    layer = ResidualFastWeights(output)
    with pytest.raises(RuntimeError, match="No next-token pair"):
        layer.solve()
    with pytest.raises(RuntimeError, match="not solved"):
        layer.figures()
    with pytest.raises(RuntimeError, match="not solved"):
        layer.summary()


@pytest.mark.parametrize("length", [2, 3, 9])
def test_one_short_sequence_is_learned(output, length):
    hidden, labels = stream(output)
    layer = ResidualFastWeights(output).fit(hidden[:1, :length], labels[:1, :length])
    assert layer.weight.isfinite().all()
    assert layer.rows == length - 1


def test_options_are_checked(output):
    for options, message in (
        ({"step": -1.0}, "step must be"),
        ({"key_ridge": []}, "key_ridge must be"),
        ({"key_ridge": [1e-3] * 9}, "at most 8"),
        ({"passes": 0}, "passes must be at least 1"),
        ({"held_out_tokens": 0}, "held_out_tokens must be at least 1"),
        ({"store": "folder"}, "passes=2"),
    ):
        with pytest.raises(ValueError, match=message):
            ResidualFastWeights(output, **options)


def test_candidates_are_tried_one_coordinate_at_a_time():
    candidates = Candidates((1.0, 0.5), (1e-4, 1e-2), (0.1, 0.3))
    tried = []

    def loss(candidate):
        tried.append(candidate)
        return (candidate.step - 0.5) ** 2 + abs(candidate.key_ridge - 1e-2) + candidate.value_ridge

    best, lowest = candidates.best(loss)
    assert best == Candidate(0.5, 1e-2, 0.1)
    assert lowest == pytest.approx(0.1)
    assert len(tried) == candidates.number == 4


def test_zero_states_give_a_zero_step(output):
    layer = ResidualFastWeights(output, **FIXED)
    layer.update(torch.zeros(5, D, dtype=torch.float64), torch.arange(5))
    layer.solve()
    assert not layer.weight.any()


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_the_latest_tokens_are_held_out_whatever_the_batches(batch):
    held, left = LatestTokens(25), []
    for rows in torch.arange(40).split(batch):
        leaving = held.push(rows[:, None].float(), rows, torch.ones(len(rows)))
        if leaving is not None:
            left += leaving[1].tolist()
    assert left == list(range(15))
    assert held.rows()[1].tolist() == list(range(15, 40))
    older, latest = held.parted(10)
    assert (older[1].tolist(), latest[1].tolist()) == (list(range(15, 30)), list(range(30, 40)))
    assert held.size == 25


def test_choices_are_made_on_a_fifth_of_the_tokens_at_most(output):
    hidden, labels = stream(output)
    layer = ResidualFastWeights(output, held_out_tokens=10**6).fit(hidden, labels)
    older, latest = layer._to_choose_on()
    assert len(latest[1]) == layer.rows // 5
    assert len(older[1]) == layer.rows - layer.rows // 5
    fixed = ResidualFastWeights(output, **vars(layer.solution.steps[0])).fit(hidden, labels)
    torch.testing.assert_close(layer.weight, fixed.weight, rtol=1e-9, atol=1e-12)


def test_curvature_of_candidates_scales_with_the_step(output):
    hidden, labels = stream(output)
    layer = ResidualFastWeights(output, **FIXED).fit(hidden, labels)
    curvature = Curvature(layer._sums, D, smoothing=3.0)
    full, half = (curvature.step(Candidate(s, 1e-3, 0.1)) for s in (1.0, 0.5))
    torch.testing.assert_close(half.weight, full.weight / 2)
    torch.testing.assert_close(half.offset, full.offset / 2)
    assert torch.equal(half.bias, full.bias)


def test_predictions_read_the_output_layer(output):
    hidden, labels = stream(output)
    layer = ResidualFastWeights(output).fit(hidden, labels)
    rows, targets = rows_of(hidden, labels)
    proba = layer.predict_proba(rows)
    torch.testing.assert_close(proba.sum(-1), torch.ones_like(proba[:, 0]))
    assert torch.equal(layer.predict(rows), proba.argmax(-1))
    assert 0 <= layer.score(rows, targets) <= 1
