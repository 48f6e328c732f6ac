import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_faast.data.labels import choose_per_class, encode_labels, hold_out
from lightning_faast.data.sources import ArrayRows


def rows(labels, names=None):
    labels = np.asarray(labels)
    return ArrayRows(np.zeros((len(labels), 2, 2), np.uint8), labels, names)


class TestEncode:
    def test_declared_classes_keep_their_numbers(self):
        names, labels = encode_labels({"train": rows([2, 0], ["a", "b", "c"]), "test": rows([1], ["a", "b", "c"])})
        assert names == ["a", "b", "c"]
        assert labels["train"].tolist() == [2, 0]
        assert labels["test"].tolist() == [1]

    def test_integers(self):
        names, labels = encode_labels({"train": rows([10, 7, 10]), "test": rows([7])})
        assert names == ["7", "10"]
        assert labels["train"].tolist() == [1, 0, 1]
        assert labels["test"].tolist() == [0]

    def test_strings(self):
        names, labels = encode_labels({"train": rows(["dog", "cat"]), "test": rows(["dog", "dog"])})
        assert names == ["cat", "dog"]
        assert labels["test"].tolist() == [1, 1]
        assert labels["test"].dtype == np.int64

    @pytest.mark.parametrize(
        ("splits", "message"),
        [
            ({"train": rows(["a"]), "test": rows(["a", "z"])}, r"'test' has 1 labels.*z"),
            ({"train": rows([0, 1]), "test": rows(["0"])}, "'test' has 1 labels"),
            ({"train": rows([0, -1], ["a", "b"])}, "unlabeled"),
            ({"train": rows([0, 2], ["a", "b"])}, "outside the 2 classes"),
            ({"train": rows([0], ["a"]), "test": rows([0], ["b"])}, "declares other classes"),
            ({"train": rows(np.zeros(0, np.int64))}, "no rows"),
        ],
    )
    def test_errors(self, splits, message):
        with pytest.raises(ValueError, match=message):
            encode_labels(splits)

    def test_unused_classes_can_be_left_out(self):
        splits = {"train": rows([4, 1], list("abcde")), "test": rows([2, 1], list("abcde"))}
        names, labels = encode_labels(splits, keep_unused=False)
        assert names == ["b", "c", "e"]
        assert labels["train"].tolist() == [2, 0]
        assert labels["test"].tolist() == [1, 0]
        assert labels["test"].dtype == np.int64
        assert encode_labels(splits)[0] == list("abcde")


class TestHoldOut:
    @given(
        counts=st.lists(st.integers(2, 12), min_size=1, max_size=5),
        share=st.floats(0.01, 0.99),
        seed=st.integers(0, 2**32),
    )
    def test_properties(self, counts, share, seed):
        labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
        names = [str(i) for i in range(len(counts))]
        kept, held = hold_out(labels, names, share, seed)
        assert sorted([*kept, *held]) == list(range(len(labels)))
        assert np.array_equal(kept, np.unique(kept))
        assert np.array_equal(held, np.unique(held))
        for index, count in enumerate(counts):
            here = int((labels[held] == index).sum())
            assert 1 <= here <= count - 1
            assert abs(here - share * count) <= 0.5 + 1e-9 or here in (1, count - 1)
        assert np.array_equal(held, hold_out(labels, names, share, seed)[1])
        assert set(held) <= set(hold_out(labels, names, min(share + 0.1, 0.99), seed)[1])

    def test_class_without_rows(self):
        kept, held = hold_out(np.array([0, 0, 2, 2]), ["a", "b", "c"], 0.5, 0)
        assert len(kept) == len(held) == 2

    def test_class_with_one_row(self):
        with pytest.raises(ValueError, match="1 classes have one row only: b"):
            hold_out(np.array([0, 0, 1]), ["a", "b"], 0.5, 0)

    def test_every_row_is_held_out_as_often(self):
        labels = np.repeat(np.arange(2), 8)
        counts = np.bincount(np.concatenate([hold_out(labels, ["a", "b"], 0.25, seed)[1] for seed in range(400)]))
        assert counts.sum() == 4 * 400
        assert (abs(counts - 100) < 5 * np.sqrt(400 * 0.25 * 0.75)).all()


class TestChoosePerClass:
    @given(
        labels=st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array),
        limit=st.integers(1, 10),
        seed=st.integers(0, 2**32),
    )
    def test_properties(self, labels, limit, seed):
        chosen, counts = choose_per_class(labels, 5, limit, seed)
        assert np.array_equal(chosen, np.unique(chosen))
        assert np.array_equal(np.bincount(labels[chosen], minlength=5), counts)
        assert np.array_equal(counts, np.minimum(np.bincount(labels, minlength=5), limit))
        again, _ = choose_per_class(labels, 5, limit, seed)
        assert np.array_equal(chosen, again)
        more, _ = choose_per_class(labels, 5, limit + 1, seed)
        assert set(chosen) <= set(more)

    def test_seed_changes_the_choice(self):
        labels = np.repeat(np.arange(3), 100)
        assert not np.array_equal(choose_per_class(labels, 3, 5, 0)[0], choose_per_class(labels, 3, 5, 1)[0])
