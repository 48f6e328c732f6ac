"""The readers of a memory against the paper's numbers, scikit-learn and their formulas."""

import pytest
import torch
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from lightning_faast.associative import KNN, LinearAttentionMemory, SoftmaxMemory, WeightedKNN
from tests.associative.oracles import GOLDEN, blobs, needs_golden, one_hot, relative

STORED = {"knn": KNN, "knn_weighted": WeightedKNN, "softmax": SoftmaxMemory}
each_stored = pytest.mark.parametrize("make", STORED.values(), ids=STORED)


# ---------------------------------------------------------------------- the paper's numbers


@needs_golden
@pytest.mark.parametrize(("make", "name"), [(KNN, "pred_knn"), (SoftmaxMemory, "pred_softmax")])
@pytest.mark.parametrize("block_size", [7, 2048])
def test_golden(make, name, block_size):
    golden = load_file(GOLDEN)
    memory = make(64, 10, class_embeddings=golden["class_embeddings"], block_size=block_size)
    for part in zip(golden["keys"].split(64), golden["labels"].split(64), strict=True):
        memory.update(*part)
    memory.solve()
    read = memory.read(golden["queries"])
    assert relative(read, golden[name]) < 1e-5
    logits = 100 * F.normalize(read, dim=-1) @ golden["class_embeddings"].T
    assert relative(memory(golden["queries"]), logits) < 1e-5


@needs_golden
def test_golden_linear_attention():
    golden = load_file(GOLDEN)
    embeddings = golden["class_embeddings"]
    memory = LinearAttentionMemory(64, 10, class_embeddings=embeddings).fit(golden["keys"], golden["labels"])
    read = memory.read(golden["queries"])
    # The golden vectors are a float32 difference of two numbers that agree in three digits (the weighted mean of values
    # and their mean), so they know their own last digits only relative to these.
    mean = embeddings.mean(0)
    assert relative(read + mean, golden["pred_linear"] + mean) < 1e-6
    # the exact difference is as far from them as ours
    keys, queries, values = (t.double() for t in (golden["keys"], golden["queries"], embeddings[golden["labels"]]))
    weights = attention(queries) @ attention(keys).T
    exact = weights / weights.sum(1, keepdim=True) @ values - values.mean(0)
    assert relative(golden["pred_linear"], exact) > 4e-5
    assert relative(read, exact) < 1e-5


def attention(keys):
    return F.elu(keys - keys.mean(-1, keepdim=True)) + 1


# ---------------------------------------------------------------------- nearest neighbors


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_knn_is_scikit_learns(normalize, k):
    keys, labels = blobs(200, 6, 4)
    queries, _ = blobs(50, 6, 4, seed=1)
    memory = KNN(k=k, normalize=normalize).fit(keys, labels)
    unit = (lambda x: F.normalize(x, dim=1)) if normalize else (lambda x: x)
    oracle = KNeighborsClassifier(k).fit(unit(keys).numpy(), labels.numpy())
    shares = torch.from_numpy(oracle.predict_proba(unit(queries).numpy()))
    assert relative(memory.read(queries), shares) < 1e-12
    assert relative(memory.predict_proba(queries), (k * shares + 1 / 4) / (k + 1)) < 1e-12
    assert memory.predict(queries).tolist() == oracle.predict(unit(queries).numpy()).tolist()


def test_an_offset_of_all_keys_costs_no_neighbors():
    keys, labels = blobs(200, 6, 4)
    exact = KNN(normalize=False).fit(keys, labels)
    moved = KNN(normalize=False).fit((keys + 3000).float(), labels)
    assert relative(moved.read((keys + 3000).float()), exact.read(keys)) < 0.02


def test_k_is_at_most_the_largest_class():
    keys = torch.tensor([[0.0], [1.0], [10.0], [11.0], [12.0]])
    memory = KNN(k=10, normalize=False).fit(keys, torch.tensor([0, 0, 1, 1, 1]))
    assert memory.summary() == "3 nearest neighbors, 5 keys in memory"
    assert relative(memory.read(torch.tensor([[0.0]])), torch.tensor([[2 / 3, 1 / 3]])) < 1e-6
    single = KNN(1, 3).fit(torch.ones(1, 1), torch.tensor([2]))
    assert single.predict(torch.tensor([[5.0]])).tolist() == [2]
    assert bool(single(torch.ones(1, 1)).isfinite().all()), "classes without rows"
    assert (
        relative(
            WeightedKNN(1, 3).fit(torch.ones(1, 1), torch.tensor([2])).read(torch.ones(2, 1)),
            one_hot(torch.tensor([2, 2])),
        )
        < 1e-6
    )


def test_of_equally_many_votes_the_lowest_label_wins():
    keys = torch.tensor([[1.0], [-1.0], [1.5], [-1.5]])
    memory = KNN(k=4, normalize=False, out_features=3).fit(keys, torch.tensor([2, 1, 2, 1]))
    assert memory.predict(torch.zeros(1, 1)).tolist() == [1]


def test_the_mode_of_embeddings_is_by_element():
    embeddings = torch.tensor([[1.0, 5.0], [2.0, 4.0]])
    memory = KNN(k=2, normalize=False, class_embeddings=embeddings)
    memory.fit(torch.tensor([[1.0], [-1.0], [9.0], [-9.0]]), torch.tensor([0, 1, 0, 1]))
    assert memory.read(torch.zeros(1, 1)).tolist() == [[1.0, 4.0]], "of equally frequent numbers the smallest"


def test_weighted_knn_is_its_formula():
    keys, labels = blobs(200, 6, 4)
    queries, _ = blobs(50, 6, 4, seed=1)
    memory = WeightedKNN(k=7, temperature=0.3).fit(keys, labels)
    cosines = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T
    votes = torch.zeros_like(cosines)
    nearest = cosines.topk(7)
    votes.scatter_(1, nearest.indices, (nearest.values / 0.3).exp())
    shares = votes @ one_hot(labels) / votes.sum(1, keepdim=True)
    assert relative(memory.read(queries), shares) < 1e-12
    assert relative(memory.predict_proba(queries), (7 * shares + 1 / 4) / 8) < 1e-12


# ---------------------------------------------------------------------- attention


@pytest.mark.parametrize("normalize", [True, False])
def test_softmax_is_its_formula(normalize):
    keys, labels = blobs(200, 6, 4)
    queries, _ = blobs(50, 6, 4, seed=1)
    memory = SoftmaxMemory(temperature=0.2, normalize=normalize, block_size=13).fit(keys, labels)
    unit = (lambda x: F.normalize(x, dim=1)) if normalize else (lambda x: x)
    scores = unit(queries) @ unit(keys).T / 0.2
    shares = (scores - scores.mean(1, keepdim=True)).softmax(1) @ one_hot(labels)
    assert relative(memory.read(queries), shares) < 1e-12
    assert relative(memory.predict_proba(queries), (200 * shares + 1 / 4) / 201) < 1e-12


def test_softmax_of_large_scores_is_finite():
    keys, labels = blobs(50, 6, 3, dtype=torch.float32)
    memory = SoftmaxMemory(normalize=False, temperature=1e-3).fit(1e3 * keys, labels)
    assert bool(memory(1e3 * keys).isfinite().all())


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_attention_is_its_formula(normalize):
    keys, labels = blobs(200, 6, 4)
    queries, _ = blobs(50, 6, 4, seed=1)
    memory = LinearAttentionMemory(normalize=normalize).double().fit(keys, labels)
    unit = (lambda x: F.normalize(x, dim=1)) if normalize else (lambda x: x)
    weights = attention(unit(queries)) @ attention(unit(keys)).T
    values = one_hot(labels)
    read = weights / weights.sum(1, keepdim=True) @ values - values.mean(0)
    assert relative(memory.read(queries), read) < 1e-12
    assert relative(memory(queries), 4 * read) < 1e-12


def test_linear_attention_does_not_grow():
    small, large = (LinearAttentionMemory().fit(*blobs(n, 6, 4)) for n in (20, 500))
    assert small.bytes_to_predict == large.bytes_to_predict == 4 * (4 * 6 + 6)
    assert small.bytes_to_update == large.bytes_to_update == 8 * (4 * 6 + 4)


# ---------------------------------------------------------------------- blocks and bytes


@each_stored
@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("block_size", [1, 3, 64, 10_000])
def test_blocks_of_any_size(make, embeds, block_size):
    keys, labels = blobs(150, 6, 4)
    queries, _ = blobs(40, 6, 4, seed=1)
    embeddings = torch.randn(4, 5, dtype=torch.float64) if embeds else None
    whole = make(class_embeddings=embeddings, block_size=1000).fit(keys, labels)
    assert (
        relative(make(class_embeddings=embeddings, block_size=block_size).fit(keys, labels)(queries), whole(queries))
        < 1e-12
    )


@each_stored
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keys_stay_in_their_dtype(make, dtype):
    keys, labels = blobs(100, 6, 4, dtype=dtype)
    memory = make(6, 4).fit(keys, labels)
    assert memory.keys.dtype == dtype
    assert memory.bytes_to_update == 100 * (6 * dtype.itemsize + 8 + 8), "keys, labels, positions"
    derived = (100 + 6) * max(4, dtype.itemsize) if make is KNN else 0
    assert memory.bytes_to_predict == 100 * (6 * dtype.itemsize + 8) + 4 * 8 + derived
    assert memory(keys).dtype == torch.promote_types(dtype, torch.float32)
    exact = make(6, 4).fit(keys.double(), labels)
    assert relative(memory.predict_proba(keys), exact.predict_proba(keys.double())) < 0.1


def test_eight_bit_keys_are_kept_in_sixteen():
    keys, labels = blobs(100, 6, 4)
    memory = KNN(normalize=False).fit(keys.to(torch.float8_e4m3fn), labels)
    assert memory.keys.dtype == torch.float16
    assert torch.equal(memory.keys, keys.to(torch.float8_e4m3fn).half())


@each_stored
def test_zero_keys_have_no_direction(make):
    keys, labels = blobs(60, 6, 4)
    keys[7] = 0
    with pytest.raises(ValueError, match="a key of zeros only"):
        make(6, 4).update(keys, labels)
    memory = make(6, 4).fit(*blobs(60, 6, 4))
    assert bool(memory(keys[7:8]).isfinite().all()), "as far from every row"


def test_options():
    for make, options, message in (
        (KNN, {"k": 0}, "k must be at least 1"),
        (WeightedKNN, {"temperature": 0.0}, "temperature must be above 0"),
        (SoftmaxMemory, {"temperature": float("nan")}, "temperature must be above 0"),
        (KNN, {"block_size": 0}, "block_size must be at least 1"),
        (KNN, {"max_rows": 0}, "max_rows must be at least 1"),
        (KNN, {"class_embeddings": torch.ones(3)}, r"class_embeddings must be \[c, e\]"),
        (LinearAttentionMemory, {"class_embeddings": torch.ones(3, 2)}, "out_features is 4, but"),
    ):
        with pytest.raises(ValueError, match=message):
            make(6, 4, **options)


def test_class_embeddings_come_with_the_state():
    embeddings = torch.randn(4, 3)
    for make in (*STORED.values(), LinearAttentionMemory):
        keys, labels = blobs(60, 6, 4, dtype=torch.float32)
        memory = make(class_embeddings=embeddings).fit(keys, labels)
        other = make()
        other.load_state_dict(memory.state_dict())
        assert torch.equal(other(keys), memory(keys))
