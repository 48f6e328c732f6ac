"""The rows that a memory keeps."""

import pytest
import torch

from lightning_faast.associative import KNN
from lightning_faast.associative.bank import Bank
from lightning_faast.associative.faults import FaultLog, told_to_all
from tests.associative.oracles import blobs
from tests.associative.test_fast_weights import Group


def filled(bank, keys, labels, size=40, positions=None):
    positions = torch.arange(len(keys)) if positions is None else positions
    for part in zip(keys.split(size), labels.split(size), positions.split(size), strict=True):
        bank.update(*part)
    return bank


def test_rows_in_their_order():
    keys, labels = blobs(100, 5, 3)
    bank = filled(Bank(3), keys, labels)
    assert len(bank) == bank.seen == 100
    for found, given in zip(bank.joined(), (keys, labels), strict=True):
        assert torch.equal(found, given)


def test_a_view_does_not_keep_its_batch():
    tokens = torch.randn(4, 7, 5)
    bank = Bank()
    bank.update(tokens[:, 0], torch.arange(4))
    assert bank.joined()[0].untyped_storage().nbytes() == 4 * 5 * 4


def test_dtypes_are_joined_without_loss():
    keys, labels = blobs(20, 5, 3)
    bank = Bank()
    bank.update(keys.half(), labels)
    bank.update(keys, labels)
    assert torch.equal(bank.joined()[0], torch.cat([keys.half().double(), keys]))


@pytest.mark.parametrize("size", [1, 7, 300])
def test_a_bounded_bank_holds_the_same_sample_for_any_batches(size):
    keys, labels = blobs(300, 5, 3)
    whole = filled(Bank(3, max_rows=40), keys, labels, 300)
    streamed = filled(Bank(3, max_rows=40), keys, labels, size)
    assert (len(streamed), streamed.seen) == (40, 300)
    for found, expected in zip(streamed.joined(), whole.joined(), strict=True):
        assert torch.equal(found, expected)
    rows = (streamed.joined()[0][:, None] == keys).all(-1).nonzero()[:, 1]
    assert len(rows.unique()) == 40
    assert torch.equal(labels[rows], streamed.joined()[1])
    other = filled(Bank(3, max_rows=40, seed=1), keys, labels)
    assert not torch.equal(other.joined()[0], whole.joined()[0])


def test_a_bounded_bank_is_a_uniform_sample():
    kept = torch.zeros(50)
    for seed in range(400):
        bank = filled(Bank(max_rows=10, seed=seed), torch.arange(50.0)[:, None], torch.zeros(50, dtype=torch.int64))
        kept[bank.joined()[0][:, 0].long()] += 1
    assert bool(((kept - 80).abs() < 5 * (400 * 0.2 * 0.8) ** 0.5).all())


@pytest.mark.parametrize("max_rows", [None, 30])
def test_processes_interleave_their_rows(max_rows):
    keys, labels = blobs(101, 5, 3)
    positions = torch.arange(101)
    one = filled(Bank(3, max_rows=max_rows), keys, labels)
    banks = [Bank(3, max_rows=max_rows) for _ in range(2)]
    for rank, bank in enumerate(banks):  # 51 and 50 rows
        filled(bank, keys[rank::2], labels[rank::2], positions=positions[rank::2])
    for future in Group(2).run([_Reducing(bank) for bank in banks]):
        future.result()
    for bank in banks:
        assert bank.seen == 101
        for found, expected in zip(bank.joined(), one.joined(), strict=True):
            assert torch.equal(found, expected)


class _Reducing:
    def __init__(self, bank):
        self.bank = bank

    def reduce(self, add, gather):
        self.bank.reduce(gather, torch.device("cpu"))


def test_processes_agree_on_a_dtype():
    keys, labels = blobs(40, 5, 3)
    banks = [Bank(3), Bank(3)]
    banks[0].update(keys.half(), labels)
    banks[1].update(keys, labels)
    for future in Group(2).run([_Reducing(bank) for bank in banks]):
        future.result()
    assert [bank.joined()[0].dtype for bank in banks] == [torch.float64] * 2


def test_bad_rows_of_one_process_are_told_to_all():
    """As on a device, where bad rows are noted and not refused at once."""
    logs = [FaultLog(3), FaultLog(3)]
    noted = torch.tensor([[False] * 4, [True, False, False, False]])
    logs[1]._noted, logs[1]._batches = list(noted), 2

    class Telling:
        def __init__(self, log):
            self.log = log

        def reduce(self, add, gather):
            told_to_all(self.log, [1], gather, torch.device("cpu"))

    told = [future.exception() for future in Group(2).run([Telling(log) for log in logs])]
    assert "Another process saw bad rows" in str(told[0])
    assert "Batch 1 (counted from 0): keys hold NaN" in str(told[1])


def test_noted_batches_are_named():
    log = FaultLog(3)
    log._noted, log._batches = [torch.tensor([False, False, True, False])], 65
    with pytest.raises(ValueError, match=r"Batch 64 .*outside \[0, 3\)"):
        log.verify()


def test_lengths_must_agree():
    keys, labels = blobs(20, 5, 3)
    with pytest.raises(ValueError, match="20 keys, but 20 values and 7 positions"):
        Bank(3).update(keys, labels, torch.arange(7))


def test_bytes_of_a_bounded_memory():
    keys, labels = blobs(500, 6, 4, dtype=torch.float32)
    memory = KNN(6, 4, max_rows=50).fit(keys, labels)
    assert memory.rows == 500
    assert memory.figures() == {"stored_rows": 50.0}
    assert memory.bytes_to_update == 50 * (6 * 4 + 8 + 8 + 8), "keys, labels, weights, priorities"
    assert memory.summary() == "10 nearest neighbors, 50 keys in memory (at most 50)"
    assert memory.score(keys, labels) > 0.5
