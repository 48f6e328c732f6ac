"""Which hidden state predicts which token."""

import pytest
import torch

from lightning_faast.language.pairs import IGNORED, Pairs, pair_labels, windows

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def pairs_of(labels):
    states = torch.arange(labels.numel()).view(*labels.shape, 1)
    pairs = Pairs.of(labels)
    return [tuple(p) for p in zip(pairs.keys(states)[:, 0].tolist(), pairs.targets.tolist(), strict=True)]


def test_every_token_but_the_first_is_a_target_and_sequences_are_not_crossed():
    assert pairs_of(pair_labels(IDS)) == [(0, 2), (1, 3), (2, 4), (4, 6), (5, 7), (6, 8)]


def test_masked_labels_are_left_out():
    labels = IDS.clone()
    labels[0, 2] = labels[1, 0] = IGNORED
    assert pairs_of(pair_labels(IDS, None, labels)) == [(0, 2), (2, 4), (4, 6), (5, 7), (6, 8)]


@pytest.mark.parametrize(("mask", "kept"), [([1, 1, 1, 0], [(0, 2), (1, 3)]), ([0, 1, 1, 1], [(1, 3), (2, 4)])])
def test_padding_is_left_out_on_both_sides(mask, kept):
    assert pairs_of(pair_labels(IDS[:1], torch.tensor([mask]))) == kept


def test_next_states():
    states = torch.arange(8.0).view(2, 4, 1)
    assert Pairs.of(pair_labels(IDS)).next(states)[:, 0].tolist() == [1, 2, 3, 5, 6, 7]


def test_devices_that_must_be_waited_for_get_weights(monkeypatch):
    labels = pair_labels(IDS, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))
    expected = pairs_of(labels)
    pairs = Pairs(None, labels[:, 1:].reshape(-1).clamp_min(0), (labels[:, 1:] != IGNORED).float().reshape(-1))
    states = torch.full((2, 4, 1), torch.nan)
    states[1] = 1
    states[0, 0] = 1
    rows = pairs.keys(states)
    assert rows.isfinite().all()
    assert int(pairs.weights.sum()) == len(expected)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 4\)"):
        pair_labels(IDS, IDS[:, :2])


def test_windows_cover_a_text():
    parts = windows(torch.arange(12)[None], 5)
    assert torch.equal(torch.cat(parts, 1), torch.arange(12)[None])
    assert len(windows(torch.arange(11), 5)) == 2
    with pytest.raises(ValueError, match="at least 2"):
        windows(torch.arange(11), 1)
    with pytest.raises(ValueError, match="must be one text"):
        windows(IDS, 2)
