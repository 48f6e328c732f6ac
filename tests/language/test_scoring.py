"""What is said of every token, and windows that score each once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_faast.language.metrics import TokenMetrics
from lightning_faast.language.scoring import score_logits, sliding_windows


@pytest.mark.parametrize("block_elements", [1, 40, 2**24])
def test_scores_are_those_of_the_softmax(block_elements):
    logits = 3 * torch.randn(4, 6, 11)
    labels = torch.randint(11, (4, 6))
    labels[1, 2] = labels[3] = -100
    scores = score_logits(logits, labels, block_elements)
    kept = labels != -100
    expected = logits.double().log_softmax(-1)[kept]
    torch.testing.assert_close(scores.label, labels[kept])
    torch.testing.assert_close(scores.predicted, expected.argmax(-1))
    torch.testing.assert_close(scores.confidence, expected.exp().amax(-1).float())
    torch.testing.assert_close(scores.log_likelihood, expected.gather(-1, labels[kept][:, None])[:, 0].float())


def test_nothing_to_score_is_no_token():
    assert len(score_logits(torch.randn(2, 3, 5), torch.full((2, 3), -100))) == 0


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(50, 1000).bfloat16()
    labels = torch.randint(1000, (50,))
    scores = score_logits(logits, labels)
    expected = -torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    torch.testing.assert_close(scores.log_likelihood, expected)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"need labels \(2, 3\), got \(2, 4\)"):
        score_logits(torch.randn(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))


@given(st.integers(2, 60), st.integers(2, 12), st.data())
def test_sliding_windows_score_every_token_once_with_its_context(tokens, window, data):
    stride = data.draw(st.integers(1, window))
    windows = sliding_windows(tokens, window, stride)
    scored = [place for w in windows for place in range(w.first, w.end)]
    if stride < window:
        assert scored == list(range(1, tokens))
    else:  # the first token of a disjoint window has no token before it
        assert scored == [place for place in range(tokens) if place % window]
    for w in windows:
        assert w.end - w.start <= window
        assert w.first - w.start >= min(max(window - stride, 1), w.first)


@pytest.mark.parametrize(("window", "stride"), [(1, None), (4, 0), (4, 5)])
def test_windows_that_cannot_be_are_refused(window, stride):
    with pytest.raises(ValueError, match="stride from 1 to window"):
        sliding_windows(10, window, stride)


def test_metrics_add_over_batches_of_any_size():
    logits, labels = torch.randn(9, 7), torch.randint(7, (9,))
    parts = TokenMetrics()
    for rows in (slice(0, 2), slice(2, 9)):
        parts.update(score_logits(logits[rows], labels[rows]), torch.tensor([4, 5]))
    figures = parts.compute()
    loss = torch.nn.functional.cross_entropy(logits.double(), labels)
    assert float(figures["loss"]) == pytest.approx(float(loss))
    assert float(figures["perplexity"]) == pytest.approx(float(loss.exp()))
    assert float(figures["bits_per_byte"]) == pytest.approx(float(loss) * 9 / 18 / 0.6931472)
    assert float(figures["accuracy"]) == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))


def test_bits_per_byte_need_the_bytes():
    metrics = TokenMetrics()
    metrics.update(score_logits(torch.randn(3, 5), torch.zeros(3, dtype=torch.long)))
    assert set(metrics.compute()) == {"loss", "perplexity", "accuracy"}
