"""Sufficient statistics: exact sums whatever the batches, precision and order; bad rows refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_faast.associative import SufficientStatistics, statistics
from lightning_faast.associative.triangle import pack_triangle, unpack_triangle
from tests.associative.oracles import SHAPES, blobs, one_hot, relative, ridge_solution, statistics_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
quick = settings(max_examples=25, deadline=None)


def assert_same(found: SufficientStatistics, expected: SufficientStatistics, tolerance: float = 1e-13) -> None:
    """G, C, n and the sums agree to 1e-13 of their largest part."""
    assert found.rows == expected.rows
    assert found.count == pytest.approx(expected.count, rel=tolerance)
    assert found.value_trace == pytest.approx(expected.value_trace, rel=tolerance)
    for name in ("gram", "cross", "key_sum", "value_sum"):
        assert relative(getattr(found, name), getattr(expected, name)) <= tolerance, name


@st.composite
def streams(draw):
    """Keys, values (labels or dense), and places to cut them."""
    n, d = draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64) + draw(st.sampled_from([0.0, 3.0]))
    kind = draw(st.sampled_from(["labels", "dense", "duplicated", "constant column", "one class"]))
    if kind == "duplicated":
        keys = keys[torch.randint(n, (n,), generator=generator)]
    if kind == "constant column":
        keys[:, 0] = 0.1
    labels = torch.randint(1 if kind == "one class" else 4, (n,), generator=generator)
    values = torch.randn(n, 3, generator=generator, dtype=torch.float64) if kind == "dense" else labels
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return keys, values, cuts


def pieces(keys, values, cuts):
    edges = [0, *cuts, len(keys)]
    return [(keys[i:j], values[i:j]) for i, j in itertools.pairwise(edges)]


def solved(sums: SufficientStatistics):
    """W of a fixed ridge, without a bias."""
    gram = sums.gram + torch.eye(sums.gram.shape[0], dtype=torch.float64)
    return torch.linalg.solve(gram, sums.cross).T


def test_the_sums_are_the_sums():
    keys, labels = blobs(50, 6, 3)
    values = one_hot(labels)
    for found in (statistics_of(keys, labels), statistics_of(keys, values)):
        assert relative(found.gram, keys.T @ keys) < 1e-14
        assert relative(found.cross, keys.T @ values) < 1e-14
        assert relative(found.key_sum, keys.sum(0)) < 1e-14
        assert found.value_sum.tolist() == found.class_counts.tolist() == labels.bincount().tolist()
        assert (found.rows, found.count, found.value_trace, found.shape) == (50, 50.0, 50.0, (6, 3))
        assert found.gram.dtype == found.cross.dtype == torch.float64


@quick
@given(streams())
def test_batch_split_and_merge_of_any_partition_do_not_matter(stream):
    keys, values, cuts = stream
    whole = statistics_of(keys, values, num_classes=4 if values.ndim == 1 else 3)
    streamed, merged = SufficientStatistics(whole.num_classes), SufficientStatistics(whole.num_classes)
    for part in pieces(keys, values, cuts):
        streamed.update(*part)
        merged += statistics_of(*part, num_classes=whole.num_classes)
    for found in (streamed, merged):
        assert_same(found, whole)
        assert relative(solved(found), solved(whole)) < 1e-10


@quick
@given(streams(), st.randoms(use_true_random=False))
def test_row_order_does_not_matter(stream, random):
    keys, values, _ = stream
    order = torch.tensor(random.sample(range(len(keys)), len(keys)))
    assert_same(statistics_of(keys[order], values[order]), statistics_of(keys, values))


@quick
@given(streams())
def test_what_was_added_can_be_taken_out(stream):
    keys, values, _ = stream
    extra_keys, extra = keys.flip(0) * 2, values.flip(0)
    before, taken = statistics_of(keys, values), statistics_of(extra_keys, extra)
    rest = statistics_of(keys, values).update(extra_keys, extra) - taken
    assert_same(rest, before, 1e-12)
    assert (rest - before).rows == 0
    assert float((rest - before).gram.abs().max()) == 0, "without rows, nothing is left but zeros"


@quick
@given(streams(), st.integers(1, 4))
def test_a_weight_of_k_counts_as_k_equal_rows(stream, k):
    keys, values, _ = stream
    weights = torch.full((len(keys),), float(k))
    weights[0] = 0
    found = statistics_of(keys, values, weights, num_classes=4 if values.ndim == 1 else 3)
    if len(keys) == 1:
        assert found.count == 0
        return
    repeated = statistics_of(
        keys[1:].repeat(k, 1), values[1:].repeat(k, *[1] * (values.ndim - 1)), num_classes=found.num_classes
    )
    assert found.rows == len(keys)
    for name in ("gram", "cross", "key_sum", "value_sum"):
        assert relative(getattr(found, name), getattr(repeated, name)) < 1e-13
    assert found.count == repeated.count
    assert found.values_are_binary == repeated.values_are_binary


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_float_dtype_is_summed_in_float64(dtype):
    keys, labels = blobs(300, 5, 3, dtype=dtype)
    assert_same(statistics_of(keys, labels), statistics_of(keys.double(), labels))


@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_bound_memory_and_change_nothing(block, weighted, monkeypatch):
    keys, labels = blobs(100, 300, 3)
    weights = torch.rand(100) if weighted else None
    whole = statistics_of(keys, labels, weights)
    shapes = []
    add = SufficientStatistics._add
    monkeypatch.setattr(
        SufficientStatistics, "_add", lambda self, k, v, w: (shapes.append(len(k)), add(self, k, v, w))[1]
    )
    monkeypatch.setattr(statistics, "_BLOCK_ELEMENTS", block * 300)
    assert_same(statistics_of(keys, labels, weights), whole)
    assert max(shapes) == block
    assert sum(shapes) == 100


def test_a_long_constant_column_does_not_drift():
    keys = torch.full((300_000, 2), 0.1, dtype=torch.float64)
    found = statistics_of(keys, torch.zeros(300_000, dtype=torch.long))
    exact = 300_000 * 0.1 * 0.1
    assert abs(float(found.gram[1, 0]) - exact) / exact < 1e-13
    assert abs(float(found.cross[0, 0]) - 30_000) / 30_000 < 1e-13


def test_leading_dimensions_are_rows():
    keys, labels = blobs(24, 5, 3)
    flat = statistics_of(keys, labels, torch.ones(24))
    assert_same(statistics_of(keys.view(4, 6, 5), labels.view(4, 6), torch.ones(4, 6)), flat)
    assert_same(statistics_of(keys.view(4, 6, 5), one_hot(labels).view(4, 6, 3)), statistics_of(keys, one_hot(labels)))


def test_classes_grow_unless_their_number_is_given():
    keys = torch.randn(3, 2)
    grown = statistics_of(keys, torch.tensor([0, 1, 0])).update(keys, torch.tensor([4, 1, 0]))
    assert grown.class_counts.tolist() == [3, 2, 0, 0, 1]
    merged = statistics_of(keys, torch.tensor([0, 0, 0])) + grown
    assert merged.class_counts.tolist() == [6, 2, 0, 0, 1]
    assert statistics_of(keys, torch.tensor([0, 0, 0]), num_classes=4).class_counts.tolist() == [3, 0, 0, 0]


def test_what_values_are_survives_subtraction():
    keys, soft = torch.randn(4, 2), torch.tensor([[0.3, 0.7]]).repeat(4, 1)
    binary = statistics_of(keys, torch.eye(2).repeat(2, 1))
    both = binary + statistics_of(keys, soft)
    assert (binary.values_are_binary, binary.values_are_distributions) == (True, True)
    assert (both.values_are_binary, both.values_are_distributions) == (False, True)
    assert (both - statistics_of(keys, soft)).values_are_binary
    assert not statistics_of(keys, 2 * soft).values_are_distributions
    half = torch.softmax(torch.randn(9, 300), -1).half()
    assert statistics_of(torch.randn(9, 2), half).values_are_distributions


def test_state_goes_through_state_dict_and_to():
    keys, labels = blobs(30, 5, 3)
    found = statistics_of(keys, labels)
    state = found.state_dict()
    assert state["gram"].shape == (15,)
    loaded = SufficientStatistics()
    loaded.load_state_dict(state)
    for copy in (loaded, found.to("cpu")):
        assert_same(copy, found, 0.0)
        assert copy.labels
        copy.update(keys, labels)
        assert (copy.rows, found.rows) == (60, 30), "a copy, not a view"
    empty = SufficientStatistics(3)
    empty.load_state_dict(SufficientStatistics(3).state_dict())
    assert empty.count == 0
    assert found.num_bytes == 8 * (15 + 15 + 1 + 5 + 3 + 3 + 2)


@pytest.mark.parametrize("d", [1, 2, 7])
def test_triangles(d):
    matrix = torch.randn(d, d, dtype=torch.float64)
    matrix = matrix + matrix.T
    i, j = torch.tril_indices(d, d)
    assert torch.equal(pack_triangle(matrix), matrix[i, j])
    assert torch.equal(unpack_triangle(pack_triangle(matrix), d), matrix)
    with pytest.raises(ValueError, match="packed triangle"):
        unpack_triangle(torch.zeros(d * d + 2), d)


BAD_KEYS = torch.randn(4, 3)
LABELS = torch.tensor([0, 1, 1, 0])


def broken(value, shape=(4, 3)):
    tensor = torch.randn(*shape, dtype=torch.float64)
    tensor[2, 1] = value
    return tensor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((broken(float("nan")), LABELS), "Batch 1 .*keys hold NaN"),
        ((broken(float("inf")), LABELS), "Batch 1 .*keys hold NaN"),
        ((broken(1e200), LABELS), "squares are infinite"),
        ((BAD_KEYS, torch.tensor([0, 1, 2, 0])), r"Batch 1 .*outside \[0, 2\)"),
        ((BAD_KEYS, torch.tensor([0, 1, -100, 0])), r"Batch 1 .*ignore index"),
        ((BAD_KEYS, LABELS, torch.tensor([1.0, -1, 1, 1])), "weights must be finite and not negative"),
        ((BAD_KEYS, LABELS, torch.tensor([1.0, float("nan"), 1, 1])), "weights must be finite"),
        ((BAD_KEYS, LABELS, torch.ones(3)), "weights must be"),
        ((BAD_KEYS, LABELS, torch.ones(4, 1)), "weights must be"),
        ((BAD_KEYS, LABELS[:3]), "same rows"),
        ((BAD_KEYS, torch.cat([LABELS, LABELS])), "same rows"),
        ((BAD_KEYS, LABELS.view(2, 2)), "same rows"),
        ((BAD_KEYS, LABELS.to(torch.complex64)), "same rows"),
        ((BAD_KEYS, torch.randn(4, 0)), "same rows"),
        ((BAD_KEYS, torch.randn(4, 2)), "cannot be mixed"),
        ((BAD_KEYS[:, :2], LABELS), "width 3"),
        ((BAD_KEYS.long(), LABELS), "floating point"),
        ((BAD_KEYS[0], LABELS[0]), "floating point of shape"),
        ((torch.randn(4, 0), LABELS), "d at least 1"),
    ],
)
def test_bad_rows_are_refused_and_nothing_of_them_is_added(arguments, message):
    found = statistics_of(BAD_KEYS, LABELS, num_classes=2)
    before = found.state_dict()
    with pytest.raises(ValueError, match=message):
        found.update(*arguments)
    after = found.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_bad_first_batch_leaves_nothing_behind():
    found = SufficientStatistics()
    with pytest.raises(ValueError, match="outside"):
        found.update(BAD_KEYS, torch.tensor([-1, 7, 0, 0]))
    found.update(torch.randn(2, 5), torch.randn(2, 4))
    assert (found.rows, found.shape) == (2, (5, 4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (broken(float("nan"), (4, 2)), "values hold NaN"),
        (broken(1e300, (4, 2)), "values hold"),
        (torch.randn(4, 5), "2 columns"),
    ],
)
def test_bad_dense_values_are_refused(values, message):
    found = statistics_of(BAD_KEYS, torch.randn(4, 2))
    with pytest.raises(ValueError, match=message):
        found.update(BAD_KEYS, values)
    assert found.rows == 4


def test_a_huge_label_is_refused_before_anything_is_allocated():
    with pytest.raises(ValueError, match="1000000000000 would make"):
        SufficientStatistics().update(BAD_KEYS, torch.tensor([0, 1, 10**12, 0]))


@pytest.mark.parametrize("sizes", [{"num_classes": 0}, {"num_features": -1}])
def test_sizes_are_positive(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        SufficientStatistics(**sizes)


def test_no_rows_is_an_error_only_when_read():
    found = SufficientStatistics(2).update(torch.randn(0, 3), torch.zeros(0, dtype=torch.long))
    assert (found.rows, found.count) == (0, 0.0)
    with pytest.raises(RuntimeError, match="No rows were seen"):
        _ = found.gram


def test_devices_that_check_late_refuse_at_the_next_read(monkeypatch):
    monkeypatch.setattr(statistics, "_flags_are_free", lambda device: False)
    found = statistics_of(BAD_KEYS, LABELS, num_classes=2)
    found.update(BAD_KEYS, LABELS + 5).update(broken(float("nan")), LABELS).update(BAD_KEYS, LABELS)
    for read in (lambda: found.gram, found.state_dict, lambda: found + found, lambda: found.to("cpu")):
        with pytest.raises(ValueError, match=r"Batch 1 .*outside \[0, 2\)"):
            read()
    late = SufficientStatistics(2).update(broken(float("nan")), LABELS)
    for _ in range(62):
        late.update(BAD_KEYS, LABELS)
    with pytest.raises(ValueError, match="Batch 0"):
        late.update(BAD_KEYS, LABELS)


OTHER = {
    "width": (lambda: statistics_of(torch.randn(4, 5), LABELS), "different widths"),
    "kind": (lambda: statistics_of(BAD_KEYS, torch.randn(4, 2)), "labels and of dense"),
    "classes": (lambda: statistics_of(BAD_KEYS, LABELS + 1), "value widths"),
    "declared": (lambda: statistics_of(BAD_KEYS, LABELS, num_classes=3), "value widths"),
}


@pytest.mark.parametrize("case", OTHER)
@pytest.mark.parametrize("seen", [False, True])
def test_only_statistics_of_one_kind_combine(case, seen):
    mine = SufficientStatistics(2, 3)
    if seen:
        mine.update(BAD_KEYS, LABELS)
    make, message = OTHER[case]
    if case == "kind" and not seen:
        assert (mine + make()).labels is False
        return
    with pytest.raises(ValueError, match=message):
        _ = mine + make()


@pytest.mark.parametrize(
    "other", [(BAD_KEYS.repeat(2, 1), LABELS.repeat(2)), (BAD_KEYS, 1 - LABELS * 0), (3 * BAD_KEYS, LABELS)]
)
def test_more_than_there_is_cannot_be_taken_out(other):
    with pytest.raises(ValueError, match="Cannot take out"):
        _ = statistics_of(BAD_KEYS, LABELS) - statistics_of(*other)


@pytest.mark.parametrize("change", ["missing", "shape", "nan", "width", "classes", "cross"])
def test_a_damaged_or_foreign_state_is_refused_and_changes_nothing(change):
    found = statistics_of(BAD_KEYS, LABELS, num_classes=2)
    state = statistics_of(BAD_KEYS, LABELS).state_dict()
    if change == "missing":
        del state["key_sum"]
    elif change == "shape":
        state["key_sum"] = state["key_sum"][:2]
    elif change == "nan":
        state["gram"][1] = float("nan")
    elif change == "width":
        state = statistics_of(BAD_KEYS[:, :2], LABELS).state_dict()
    elif change == "classes":
        state = statistics_of(BAD_KEYS, LABELS + 1).state_dict()
    else:
        state["cross"] = state["cross"].flatten()
    with pytest.raises(ValueError, match=r"missing|damaged|width|classes"):
        found.load_state_dict(state)
    assert_same(found, statistics_of(BAD_KEYS, LABELS, num_classes=2), 0.0)


def test_sums_survive_inference_mode():
    with torch.inference_mode():
        found = statistics_of(BAD_KEYS, LABELS)
    assert found.update(BAD_KEYS, LABELS).rows == 8


def test_autocast_does_not_touch_the_sums():
    keys, labels = blobs(200, 20, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = statistics_of(keys, labels)
        dense = statistics_of(keys, one_hot(labels))
    assert_same(found, statistics_of(keys, labels), 0.0)
    assert relative(dense.cross, found.cross) < 1e-14


def test_ridge_from_the_sums_is_ridge_from_the_rows():
    keys, labels = blobs(40, 6, 3)
    assert (
        relative(solved(statistics_of(keys, labels)), ridge_solution(keys, one_hot(labels), 1.0, bias=False)[0]) < 1e-12
    )


@pytest.mark.cuda
def test_cuda_and_cpu_agree_and_bad_rows_are_refused_at_the_latest_at_the_next_read():
    keys, labels = blobs(5000, 64, 10, dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = SufficientStatistics(10).update(keys.cuda(), labels.cuda())
    assert found.device.type == "cuda"
    assert_same(found.to("cpu"), statistics_of(keys, labels, num_classes=10), 1e-12)
    for bad in ((keys.cuda() / 0, labels.cuda()), (keys.cuda(), labels.cuda() + 10)):
        spoiled = SufficientStatistics(10).update(*bad)
        with pytest.raises(ValueError, match="Batch 0"):
            _ = spoiled.gram
