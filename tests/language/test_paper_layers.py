"""The paper's layers: equal to the authors' golden vectors, and to dense oracles."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_faast.associative import Ridge
from lightning_faast.language import (
    ChunkedFastWeights,
    EmbeddingFastWeights,
    MiddleFastWeights,
    OutputLayer,
    slow_weights,
)
from lightning_faast.language.chunked import ChunkedMap, pseudoinverse_map
from tests.associative.oracles import relative
from tests.associative.test_fast_weights import Group

D, V = 12, 40
SIZES = {"update_size": 256, "memory_size": 512, "alpha": 0.8}


@pytest.fixture
def golden(shared):
    return load_file(shared / "golden" / "lm_memory_layer.safetensors")


def part(golden, name):
    return {key.removeprefix(f"{name}."): t for key, t in golden.items() if key.startswith(f"{name}.")}


def test_chunked_output_layer_is_the_papers(golden):
    g = part(golden, "output")
    table = nn.Embedding.from_pretrained(g["target_embeds"].reshape(-1, 48))  # every place is a token of its own
    layer = ChunkedFastWeights(OutputLayer(nn.Linear(48, len(table.weight))), table, **SIZES)
    tokens = torch.arange(len(table.weight)).view(14, 64).masked_fill(g["mask"] == 0, -100)
    for hidden, labels in zip(g["hidden"].split(2), tokens.split(2), strict=True):
        layer.update(hidden, labels)
    solution = layer.solve()
    assert (layer._map.count, solution.count) == (int(g["N0"]), int(g["N"]))
    assert relative(layer._map.weight, g["W0"].double()) < 1e-4
    assert relative(solution.weight, g["W"].double()) < 1e-4
    assert relative(layer(g["query"]), g["out"]) < 1e-4
    assert "812 tokens" in layer.summary()


def test_middle_layer_is_the_papers(golden):
    g = part(golden, "middle")
    layer = MiddleFastWeights(OutputLayer(nn.Linear(48, 50)), 48, **SIZES).eval()
    names = {"memory_layers.3.memory_reader.scorer.weight": g["scorer"]}
    layer.load_slow_weights(names | {"memory_layers.3.interpreter.out_proj.weight": g["out_proj"]})
    labels = torch.zeros_like(g["mask"]).masked_fill(g["mask"] == 0, -100)
    for hidden, y in zip(g["hidden"].split(2), labels.split(2), strict=True):
        layer.update(hidden, y)
    solution = layer.solve()
    assert (layer._map.count, solution.count) == (int(g["N0"]), int(g["N"]))
    assert relative(layer._map.weight, g["W0"].double()) < 1e-4
    assert relative(solution.weight, g["W"].double()) < 1e-4
    assert relative(layer(g["query"]), g["out"]) < 1e-4


def test_embedding_is_exact_in_any_order():
    hidden, tokens = torch.randn(10, 20, D), torch.randint(V, (10, 20))
    table = nn.Embedding(V, D)
    output = OutputLayer(nn.Linear(D, V))
    whole = EmbeddingFastWeights(output, table, regularization=Ridge(0.5)).fit(hidden, tokens)
    keys, values = hidden[:, :-1].reshape(-1, D).double(), table.weight.detach()[tokens[:, 1:].reshape(-1)].double()
    expected = torch.linalg.solve(keys.T @ keys + 0.5 * torch.eye(D, dtype=torch.float64), keys.T @ values).T
    torch.testing.assert_close(whole.solution.weight, expected, rtol=1e-9, atol=1e-11)
    query = torch.randn(3, D)
    torch.testing.assert_close(whole(query), 0.1 * query + 0.9 * query @ expected.float().T)
    parts = EmbeddingFastWeights(output, table, regularization=Ridge(0.5))
    order = torch.randperm(10)
    for h, y in zip(hidden[order].split(3), tokens[order].split(3), strict=True):
        parts.update(h, y)
    parts.solve()
    torch.testing.assert_close(parts.solution.weight, whole.solution.weight, rtol=1e-12, atol=1e-12)
    one, two = (EmbeddingFastWeights(output, table, regularization=Ridge(0.5)) for _ in range(2))
    one.update(hidden[:4], tokens[:4])
    two.update(hidden[4:], tokens[4:])
    one.merge(two)
    torch.testing.assert_close(one._sums.gram, whole._sums.gram, rtol=1e-12, atol=1e-12)
    one.subtract(two)
    assert one.rows == 4 * 19
    assert parts.figures()["ridge"] == 0.5


def test_before_the_first_solve_states_come_back_bit_for_bit():
    output, table = OutputLayer(nn.Linear(D, V)), nn.Embedding(V, D)
    hidden = torch.randn(5, D)
    for layer in (EmbeddingFastWeights(output, table), MiddleFastWeights(output, D)):
        assert torch.equal(layer(hidden), hidden)


def test_exact_and_chunked_agree_on_one_chunk():
    hidden, tokens = torch.randn(6, 20, D), torch.randint(V, (6, 20))
    output, table = OutputLayer(nn.Linear(D, V)), nn.Embedding(V, D)
    exact = EmbeddingFastWeights(output, table).fit(hidden, tokens)
    chunked = ChunkedFastWeights(output, table).fit(hidden, tokens)
    torch.testing.assert_close(exact.solution.weight, chunked.solution.weight, rtol=1e-9, atol=1e-12)


def test_chunked_map_is_the_mean_of_pseudoinverses():
    keys, values = torch.randn(70, D, dtype=torch.float64), torch.randn(70, 5, dtype=torch.float64)
    chunked = ChunkedMap(20, 40, alpha=0.5)
    for k, v in zip(keys.split(15), values.split(15), strict=True):
        chunked.add(k, v)
    weight, count = chunked.read()
    solved = [
        (torch.linalg.pinv(k, rtol=len(k) ** -0.5) @ v).T * len(k)
        for k, v in zip(keys.split((20, 20, 30)), values.split((20, 20, 30)), strict=True)
    ]
    assert (count, chunked.count, chunked.held) == (70, 40, 30)
    torch.testing.assert_close(weight, sum(solved) / 70, rtol=1e-9, atol=1e-11)
    copy = ChunkedMap(20, 40, alpha=0.5)
    copy.load_state_dict(chunked.state_dict())
    torch.testing.assert_close(copy.read()[0], weight, rtol=0, atol=0)


def test_discount_counts_in_training_only():
    keys, values = torch.randn(70, D, dtype=torch.float64), torch.randn(70, 5, dtype=torch.float64)
    chunked = ChunkedMap(20, 40, 0.5, update_discount=0.9)
    for k, v in zip(keys.split(10), values.split(10), strict=True):
        chunked.add(k, v, training=True)
    assert chunked.read(training=True)[1] == pytest.approx(0.9 * chunked.count + chunked.held)
    assert chunked.read()[1] == pytest.approx(chunked.count + chunked.held)


def test_pseudoinverse_map_is_differentiable_by_its_values():
    keys, values = torch.randn(30, D, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(pseudoinverse_map(keys, values, 1e-3), (torch.linalg.pinv(keys, rtol=1e-3) @ values).T)
    pseudoinverse_map(keys, values, 1e-3).sum().backward()
    torch.testing.assert_close(values.grad, torch.linalg.pinv(keys, rtol=1e-3).sum(0)[:, None].expand(-1, 4))


def test_slow_weights_get_gradients_in_training():
    layer = MiddleFastWeights(OutputLayer(nn.Linear(D, V)), D, update_size=10, memory_size=20)
    nn.init.normal_(layer.out_proj.weight)
    hidden, labels = torch.randn(4, 15, D), torch.zeros(4, 15, dtype=torch.int64)
    for h, y in zip(hidden.split(1), labels.split(1), strict=True):
        layer.update(h, y)
    layer(hidden).square().sum().backward()
    assert layer.scorer.weight.grad.abs().max() > 0
    assert layer.out_proj.weight.grad.abs().max() > 0
    layer.eval()
    layer.solve()
    assert layer.weight.any()
    assert not layer.weight.requires_grad


def test_untrained_slow_weights_are_said_to_do_nothing():
    layer = MiddleFastWeights(OutputLayer(nn.Linear(D, V)), D)
    layer.update(torch.randn(2, 5, D), torch.zeros(2, 5, dtype=torch.int64))
    with pytest.warns(UserWarning, match="out_proj is zero"):
        layer.solve()


def test_slow_weights_are_found_by_name(tmp_path):
    scorer, proj = torch.randn(1, 2 * D), torch.randn(D, D)
    state = {}
    for i in (3, 13):
        state[f"model.memory.{i}.memory_reader.scorer.weight"] = scorer + i
        state[f"model.memory.{i}.interpreter.out_proj.weight"] = proj + i
    assert torch.equal(slow_weights(state, at=13)["scorer.weight"], scorer + 13)
    with pytest.raises(ValueError, match="Several layers"):
        slow_weights(state)
    with pytest.raises(ValueError, match=r"No scorer\.weight and no out_proj\.weight.*q_proj"):
        slow_weights({"q_proj.weight": proj})
    file = tmp_path / "slow.safetensors"
    save_file({"scorer.weight": scorer, "out_proj.weight": proj}, file)
    layer = MiddleFastWeights(OutputLayer(nn.Linear(D, V)), D)
    layer.load_slow_weights(file)
    assert torch.equal(layer.out_proj.weight, proj)


@pytest.mark.parametrize("kind", ["embedding", "chunked", "middle"])
def test_processes_learn_together(kind):
    hidden, tokens = torch.randn(9, 20, D, dtype=torch.float64), torch.randint(V, (9, 20))
    output = OutputLayer(nn.Linear(D, V, dtype=torch.float64))
    table = nn.Embedding(V, D, dtype=torch.float64)

    def make():
        if kind == "embedding":
            return EmbeddingFastWeights(output, table)
        if kind == "chunked":
            return ChunkedFastWeights(output, table, update_size=30, memory_size=60)
        torch.manual_seed(0)
        return MiddleFastWeights(output, D, update_size=30, memory_size=60).eval()

    layers = [make() for _ in range(3)]
    solved, counts = [], []
    for layer, h, y in zip(layers, hidden.split((2, 6, 1)), tokens.split((2, 6, 1)), strict=True):
        layer.update(h, y)
        alone = make()
        alone.update(h, y)
        if kind != "embedding":
            weight, count = alone._map.read(*([alone._weighted] if kind == "middle" else []))
            solved.append(weight.detach() * count)
            counts.append(count)
    for future in Group(3).run(layers):
        future.result()
    if kind == "embedding":
        one = make().fit(hidden, tokens)
        layers[0].solve()
        torch.testing.assert_close(layers[0].mixed, one.mixed, rtol=1e-9, atol=1e-11)
        return
    for layer in layers:
        weight, count = layer._map.read()
        assert count == sum(counts)
        torch.testing.assert_close(weight, sum(solved) / count, rtol=1e-9, atol=1e-11)


def test_what_cannot_be_is_refused():
    output, table = OutputLayer(nn.Linear(D, V)), nn.Embedding(V, D)
    hidden, tokens = torch.randn(2, 5, D), torch.randint(V, (2, 5))
    for layer in (ChunkedFastWeights(output, table), MiddleFastWeights(output, D)):
        with pytest.raises(ValueError, match="takes no weights"):
            layer.update(hidden, tokens, torch.ones(2, 5))
        with pytest.raises(ValueError, match="cannot forget"):
            layer.subtract(layer)
        with pytest.raises(RuntimeError, match="No next-token pair"):
            layer.solve()
        with pytest.raises(ValueError, match="NaN"):
            layer.update(hidden * torch.nan, tokens)
        assert layer.rows == 0
    for options, message in (
        ({"update_size": 9, "memory_size": 5}, "update_size must be"),
        ({"alpha": 0.0}, "alpha must be"),
        ({"mix": 0.0}, "mix must be"),
    ):
        with pytest.raises(ValueError, match=message):
            ChunkedFastWeights(output, table, **options)
    with pytest.raises(ValueError, match="update_discount must be"):
        MiddleFastWeights(output, D, update_discount=0.0)
    with pytest.raises(ValueError, match="Input embeddings have width 5"):
        EmbeddingFastWeights(output, nn.Embedding(V, 5))
