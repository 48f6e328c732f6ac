from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_faast.language import KNNLM, FastWeightLM, OutputLayer
from tests.language.models import D, V, gemma2, gpt2, llama

pytest.importorskip("faiss")
FIXED = {"k": 5, "temperature": 3.0, "interpolation": 0.3}


def random_text(sequences: int = 12, length: int = 24) -> Tensor:
    return torch.randint(V, (sequences, length), generator=torch.Generator().manual_seed(3))


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.get_decoder()(input_ids=ids).last_hidden_state


def by_hand(
    keys: Tensor, tokens: Tensor, queries: Tensor, logits: Tensor, k: int, temperature: float, share: float
) -> Any:
    """The mixture in float64, one query after the other."""
    keys, queries = keys.double().numpy(), queries.double().numpy()
    found = []
    for query, z in zip(queries, logits.double().numpy(), strict=True):
        distances = ((keys - query) ** 2).sum(1)
        nearest = np.argsort(distances)[:k]
        votes = np.exp(-(distances[nearest] - distances[nearest[0]]) / temperature)
        p_knn = np.zeros(len(z))
        np.add.at(p_knn, tokens.numpy()[nearest], votes / votes.sum())
        p_lm = np.exp(z - z.max())
        found.append((1 - share) * p_lm / p_lm.sum() + share * p_knn)
    return np.stack(found)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_probabilities_equal_brute_force(make: Any) -> None:
    model = make()
    ids, new = random_text(), random_text(3, 10).flip(0)
    states = hidden_states(model, ids)
    with torch.no_grad():
        base = model(new).logits
    lm = FastWeightLM(model, mode="knn_lm", **FIXED).learn(ids)
    with torch.no_grad():
        mixed = lm(new).logits.softmax(-1)
    expected = by_hand(
        states[:, :-1].flatten(0, 1),
        ids[:, 1:].flatten(),
        hidden_states(lm.detach(), new).flatten(0, 1),
        base.flatten(0, 1),
        *FIXED.values(),
    )
    np.testing.assert_allclose(mixed.flatten(0, 1).numpy(), expected, rtol=2e-4, atol=1e-7)


def test_a_token_that_comes_twice_has_both_votes() -> None:
    output = OutputLayer(nn.Linear(4, 9, bias=False))
    keys = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [9, 9, 9, 9]])
    layer = KNNLM(output, k=3, temperature=1.0, interpolation=0.5)
    layer.update(keys, torch.tensor([7, 2, 2, 5]))
    layer.solve()
    query = torch.tensor([[0.1, 0.2, 0.0, 0.0]])
    expected = by_hand(keys, torch.tensor([7, 2, 2, 5]), query, output.logits(query).detach(), 3, 1.0, 0.5)
    np.testing.assert_allclose(layer.predict_proba(query).numpy(), expected, rtol=1e-5)
    targets = torch.tensor([7, 2, 5, 0])
    loss = layer.loss(query.expand(4, -1), targets)
    np.testing.assert_allclose(loss.numpy(), -np.log(expected[0][targets.numpy()]), rtol=1e-5)


def test_scaled_logits_and_half_precision_stores() -> None:
    output = OutputLayer(nn.Linear(16, 50), scale=0.25)
    keys, tokens, queries = torch.randn(40, 16), torch.randint(50, (40,)), torch.randn(6, 16)
    layer = KNNLM(output, **FIXED).fit(keys, tokens)
    half = KNNLM(output, **FIXED, dtype="float16").fit(keys, tokens)
    raw = output.module(queries).detach()
    mixed = (0.25 * layer.adjusted(raw.clone(), queries, scale=0.25)).softmax(-1)
    torch.testing.assert_close(mixed, layer.predict_proba(queries))
    torch.testing.assert_close(half.predict_proba(queries), layer.predict_proba(queries), rtol=0.02, atol=1e-3)
    assert layer.bytes_to_predict == 40 * (16 * 4 + 8)
    assert half.bytes_to_predict == 40 * (16 * 2 + 8)
    with pytest.raises(ValueError, match="float16"):
        half.update(torch.full((1, 16), 1e6), torch.tensor([1]))


def test_gradients_pass_through_the_mixture() -> None:
    output = OutputLayer(nn.Linear(16, 50))
    layer = KNNLM(output, **FIXED).fit(torch.randn(40, 16), torch.randint(50, (40,)))
    logits = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(3, 16)
    assert torch.autograd.gradcheck(lambda z: layer.adjusted(z, queries), [logits])


def test_choice_is_the_best_on_held_out_tokens() -> None:
    model = llama()
    ids = random_text(2, 24).repeat(8, 1)  # what was read comes again: neighbors know it
    lm = FastWeightLM(model, mode="knn_lm", k=4, temperature=(0.1, 1.0, 10.0), interpolation=(0.2, 0.9))
    lm.learn(ids)
    solution = lm.solve()
    assert solution.loss_after < solution.loss_before
    assert solution.interpolation == 0.9
    keys, tokens, _ = lm.learner._held.rows()
    store_keys, store_tokens = lm.learner._bank.joined()
    losses = {}
    for temperature in (0.1, 1.0, 10.0):
        for share in (0.2, 0.9):
            with torch.no_grad():
                logits = lm.learner.output.logits(keys)
            p = by_hand(store_keys, store_tokens, keys, logits, 4, temperature, share)
            losses[temperature, share] = -np.log(p[np.arange(len(tokens)), tokens.numpy()]).mean()
    best = min(losses, key=losses.__getitem__)
    assert (solution.temperature, solution.interpolation) == best
    assert solution.loss_after == pytest.approx(losses[best], rel=1e-4)
    figures = lm.figures()
    assert figures["stored_rows"] == figures["tokens"] == 16 * 23
    assert figures["perplexity_after"] < figures["perplexity_before"]


def test_no_vote_where_neighbors_do_not_help() -> None:
    model = llama()
    lm = FastWeightLM(model, mode="knn_lm", interpolation=0.9, temperature=(1e-6, 1e-5))
    lm.learn(random_text())  # random tokens: what came before says nothing
    assert lm.solve().interpolation == 0
    with torch.no_grad():
        adapted = lm(random_text(2, 9)).logits
        assert torch.equal(adapted, lm.detach()(random_text(2, 9)).logits)


def test_generation_saving_and_leaving(tmp_path: Path) -> None:
    model = llama()
    ids = torch.arange(2, 27).repeat(6, 2)
    before = model(ids[:1]).logits
    lm = FastWeightLM(model, mode="knn_lm", k=4, temperature=0.5, interpolation=0.95).learn(ids)
    new = lm.generate(ids[:1, :5], max_new_tokens=8, do_sample=False)
    assert new[0].tolist() == list(range(2, 15))
    assert torch.equal(new, lm.generate(ids[:1, :5], max_new_tokens=8, do_sample=False, use_cache=False))
    beams = lm.generate(ids[:1, :5], max_new_tokens=8, do_sample=False, num_beams=3)
    assert beams[0].tolist() == list(range(2, 15))
    with torch.no_grad():
        logits, loss = lm(ids[:2]).logits, lm(ids[:2], labels=ids[:2]).loss
    assert loss < 0.5
    lm.add("other", mode="residual")
    lm.use("other")
    assert torch.equal(lm(ids[:1]).logits, before)
    lm.use("default")
    for learning in (True, False):
        lm.save(tmp_path / f"{learning}.safetensors", learning=learning)
    assert torch.equal(lm.detach()(ids[:1]).logits, before)
    for learning in (True, False):
        with FastWeightLM.from_file(model, tmp_path / f"{learning}.safetensors") as again, torch.no_grad():
            assert torch.equal(again(ids[:2]).logits, logits)
            assert again.tokens == 6 * 49 * learning
            again.learn(random_text(2))
            assert again.tokens == 6 * 49 * learning + 2 * 23
    with FastWeightLM(model) as other, pytest.raises(ValueError, match="knn_lm"):
        other.load(tmp_path / "True.safetensors")


def test_over_fast_weights(tmp_path: Path) -> None:
    model = llama()
    ids = torch.cat([torch.arange(40).repeat(8, 1), random_text(8, 40)])[torch.randperm(16)]
    ids = torch.cat([ids, ids])
    options = {"mode": "residual", "key_layers": [0]}
    lm = FastWeightLM(model, mode="knn_lm", k=4, temperature=1.0, interpolation=(0.3, 0.6), over=options).learn(ids)
    lm.solve()
    base = lm.learner.base
    assert base.rows + lm.learner._held.size == lm.tokens == 32 * 39
    assert lm.learner.stored_rows == lm.tokens
    assert base.weight.abs().max() > 0
    lm.learner.interpolation = 0.3  # whatever was chosen
    assert "over residual" in lm.summary()
    with torch.no_grad(), lm.watching() as keys:
        logits = lm(ids[:3]).logits
    hidden = keys[0][..., -D:]
    store = [torch.cat(parts) for parts in zip(*lm.learner._parts, strict=True)]
    with torch.no_grad():
        beneath = lm.learner.output.logits(base(keys[0]), base.token_bias)
    expected = by_hand(
        *store,
        hidden.flatten(0, 1),
        beneath.flatten(0, 1),
        4,
        lm.learner.temperature,
        lm.learner.interpolation,
    )
    np.testing.assert_allclose(logits.softmax(-1).flatten(0, 1).numpy(), expected, rtol=1e-3, atol=1e-6)
    path = lm.save(tmp_path / "both.safetensors")
    lm.detach()
    with FastWeightLM.from_file(model, path) as again, torch.no_grad():
        assert torch.equal(again(ids[:3]).logits, logits)


def test_split_and_merge_store_the_same() -> None:
    ids = random_text()
    lm = FastWeightLM(llama(), mode="knn_lm", **FIXED).learn(ids)
    with torch.no_grad():
        whole = lm(ids[:2]).logits
        for name, part in (("first", ids[:5]), ("rest", ids[5:])):
            lm.add(name)
            lm.use(name).learn(part)
        torch.testing.assert_close(lm.merge("first")(ids[:2]).logits, whole)
    with pytest.raises(ValueError, match="cannot subtract"):
        lm.subtract("first")


def test_padding_is_not_stored_and_rows_are_bounded() -> None:
    ids = random_text(4, 10)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 7:] = 0, 0
    lm = FastWeightLM(llama(), mode="knn_lm", **FIXED).learn(ids, mask)
    lm.solve()
    assert lm.tokens == lm.learner.stored_rows == 4 * 9 - 4 - 3
    bounded = FastWeightLM(llama(), mode="knn_lm", **FIXED, max_rows=10).learn(ids)
    bounded.solve()
    assert (bounded.tokens, bounded.learner.stored_rows) == (36, 10)


def test_processes_share_one_datastore() -> None:
    output = OutputLayer(nn.Linear(16, 50))
    keys, tokens = torch.randn(8, 10, 16), torch.randint(50, (8, 10))
    options = {"k": 3, "temperature": (1.0, 5.0), "held_out_tokens": 8}
    both = [KNNLM(output, **options) for _ in range(2)]
    for rank, layer in enumerate(both):
        layer.update(keys[rank::2], tokens[rank::2])
    sent = [iter(_recorded(layer)) for layer in both]
    assert sum(layer.rows for layer in both) == 8 * 9
    first = KNNLM(output, **options)
    first.load_learned_state(both[0].learned_state())
    calls = list(zip(*sent, strict=True))
    replies = iter(calls)
    first.reduce(lambda t: t, lambda t: list(next(replies)))
    assert first.rows == 8 * 9
    first.solve()
    assert first.stored_rows == 8 * 9


def _recorded(layer: KNNLM) -> list[Tensor]:
    """What a layer sends to the others, each padded alike because both have as many rows."""
    sent: list[Tensor] = []

    def gather(t: Tensor) -> list[Tensor]:
        sent.append(t.clone())
        return [t, t]

    copy = KNNLM(layer.output, k=layer.k, temperature=layer.temperatures, held_out_tokens=layer.held_out_tokens)
    copy.load_learned_state(layer.learned_state())
    copy.reduce(lambda t: t, gather)
    return sent


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must"),
        ({"temperature": 0.0}, "temperature must"),
        ({"interpolation": 1.0}, "interpolation must"),
        ({"dtype": "int8"}, "dtype must"),
        ({"held_out_tokens": 0}, "held_out_tokens must"),
        ({"over": "knn_lm"}, "another mode"),
        ({"over": {"mode": "residual", "stepp": 1}}, "stepp"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastWeightLM(llama(), mode="knn_lm", **options)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="bounds its logits"):
        FastWeightLM(gemma2(), mode="knn_lm")
    layer = KNNLM(OutputLayer(nn.Linear(4, 9)))
    with pytest.raises(RuntimeError, match="No next-token pair"):
        layer.solve()
    with pytest.raises(ValueError, match="NaN"):
        layer.update(torch.full((2, 4), torch.nan), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="vocabulary"):
        layer.update(torch.randn(2, 4), torch.tensor([1, 9]))
    with pytest.raises(ValueError, match="no weights"):
        layer.update(torch.randn(2, 4), torch.tensor([1, 2]), torch.ones(2))
    assert layer.rows == 0
    layer.update(torch.randn(4, 4), torch.tensor([1, 2, 3, 4]))
    with pytest.raises(RuntimeError, match="Too few tokens"):
        layer.solve()
