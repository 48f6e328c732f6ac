"""A uniform sample that does not depend on batches, merges over streams, and is bounded."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from lightning_faast.associative import Reservoir


def filled(n=500, size=20, *, batch=64, seed=0, start=0, dtype=torch.float32):
    sample = Reservoir(size, seed)
    rows = torch.arange(start, start + n)
    for part in rows.split(batch):
        sample.update(part[:, None].to(dtype).repeat(1, 3), part, positions=part)
    return sample


def held(sample):
    return sorted(sample.values.tolist())


def test_every_row_is_equally_likely_to_stay():
    counts = torch.zeros(100)
    for seed in range(400):
        counts[filled(100, 10, batch=100, seed=seed).values] += 1
    # Binomial(400, 0.1): mean 40, standard deviation 6; chi-squared of 99 degrees of freedom.
    assert counts.sum() == 4000
    assert 60 < float(((counts - 40).square() / 36).sum()) < 145
    assert counts[:50].sum() == pytest.approx(2000, abs=140)


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_batches_do_not_matter(batch):
    sample = filled(batch=batch)
    assert held(sample) == held(filled())
    assert (len(sample), sample.seen, sample.complete) == (20, 500, False)
    assert torch.equal(sample.keys[:, 0].long(), sample.values), "rows stay whole"
    assert sample.weights.tolist() == [1.0] * 20


def test_another_seed_keeps_other_rows():
    assert held(filled(seed=1)) != held(filled(seed=0))
    assert len(filled(seed=2**70)) == len(filled(seed=-5)) == 20


@pytest.mark.parametrize("batch", [1, 7, 500])
@pytest.mark.parametrize("n", [15, 40])
def test_a_short_stream_is_held_completely(n, batch):
    sample = filled(n, batch=batch)
    assert sample.complete
    assert held(sample) == list(range(n))
    assert not Reservoir(0).complete


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_a_stream_that_grows_long_is_sampled(batch):
    sample = filled(41, batch=batch)
    assert (len(sample), sample.seen, sample.complete) == (20, 41, False)
    assert held(sample) == held(filled(41))
    assert set(held(filled(500))) & set(range(41)) <= set(held(sample)), "what stays of a longer one was there before"
    assert sample.num_bytes == 20 * (8 + 3 * 4 + 8 + 8)


@pytest.mark.parametrize("split", [5, 20, 25, 40])
@pytest.mark.parametrize("n", [40, 41, 60])
def test_merging_short_streams_is_sampling_the_whole(n, split):
    merged = filled(split)
    merged.merge(filled(n - split, start=split))
    assert held(merged) == held(filled(n))
    assert (merged.seen, merged.complete) == (n, n <= 40)


def test_merging_streams_is_sampling_the_whole():
    merged = filled(200)
    merged.merge(filled(300, start=200))
    assert held(merged) == held(filled(500))
    assert merged.seen == 500


@pytest.mark.parametrize("lengths", [(200, 0, 300), (10, 0, 20), (30, 0, 15), (5, 0, 0), (0, 0, 0)])
def test_gathering_processes_is_sampling_the_whole(lengths):
    starts = [0, lengths[0], lengths[0]]
    parts = [filled(n, start=start) if n else Reservoir(20) for n, start in zip(lengths, starts, strict=True)]
    empty = {"keys": torch.empty(0, 3), "values": torch.empty(0, dtype=torch.long), "weights": torch.empty(0).double()}
    sent, everyone = [None] * 3, Barrier(3)

    def gathered(process):
        def gather(tensor):
            sent[process] = tensor
            everyone.wait()
            received = list(sent)
            everyone.wait()
            assert len({(t.shape, t.dtype) for t in received}) == 1, "a collective needs equal shapes"
            return received

        return parts[process].gathered(gather, empty)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(gathered, range(3)))
    for one in found:
        assert len(one) == 0 if sum(lengths) == 0 else held(one) == held(filled(sum(lengths)))
        assert one.seen == sum(lengths)
        assert one.complete == (0 < sum(lengths) <= 40)


def test_switched_off_it_only_counts():
    sample = filled(size=0)
    assert (len(sample), sample.seen, sample.num_bytes) == (0, 500, 0)


@pytest.mark.parametrize("size", [5, 20, 50])
def test_state_stays_a_uniform_sample_whatever_the_size(size):
    loaded = Reservoir(size)
    loaded.load_state_dict(filled(size=20).state_dict())
    rows = torch.arange(500, 900)
    loaded.update(rows[:, None].float().repeat(1, 3), rows, positions=rows)
    # Rows beyond the stored 20 are gone: a larger reservoir can only go on with 20.
    assert held(loaded) == held(filled(900, min(size, 20)))


def test_complete_state_keeps_its_room():
    loaded = Reservoir(50)
    loaded.load_state_dict(filled(15).state_dict())
    loaded.update(torch.zeros(10, 3), torch.arange(10))
    assert (len(loaded), loaded.complete) == (25, True)
    off = Reservoir(0)
    off.load_state_dict(filled(15).state_dict())
    assert (len(off), off.seen) == (0, 15)
    empty = Reservoir(5)
    empty.load_state_dict(Reservoir(5).state_dict())
    assert len(empty) == 0


def test_rows_of_several_dtypes_keep_all_their_digits():
    sample = Reservoir(10)
    sample.update(torch.ones(2, 1).half(), torch.zeros(2))
    sample.update(torch.full((2, 1), 1 + 1e-12, dtype=torch.float64), torch.zeros(2))
    assert sample.keys.dtype == torch.float64
    assert float(sample.keys.max()) == 1 + 1e-12


@pytest.mark.parametrize("drop", ["seen", "priorities", "keys", "short"])
def test_a_damaged_state_is_refused(drop):
    state = filled(15).state_dict()
    if drop == "short":
        state["values"] = state["values"][:3]
    else:
        del state[drop]
    with pytest.raises(ValueError, match="Not a state of Reservoir"):
        Reservoir(20).load_state_dict(state)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="negative"):
        Reservoir(-1)
    with pytest.raises(ValueError, match="3 keys, but 2 values"):
        Reservoir(5).update(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="2 positions"):
        Reservoir(5).update(torch.zeros(3, 2), torch.zeros(3), positions=torch.arange(2))
