"""Time, memory and quality."""

import math
import subprocess
import sys
import time

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss
from torch import nn

from lightning_faast.evaluation.measure import microseconds, quality


def test_quality_agrees_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    log_probabilities = torch.randn(200, 4, generator=generator).log_softmax(-1)
    labels = torch.randint(0, 4, (200,), generator=generator)
    figures, rows = quality(log_probabilities, labels)
    predicted = log_probabilities.argmax(-1)
    assert figures["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert figures["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert figures["loss"] == pytest.approx(
        log_loss(labels, log_probabilities.double().exp(), labels=range(4)), rel=1e-6
    )
    assert torch.equal(rows.predicted, predicted)
    assert torch.allclose(rows.confidence, log_probabilities.exp().max(-1).values)


def test_calibration_error_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    figures, _ = quality(probabilities.log(), torch.tensor([0, 1, 1, 1]))
    assert figures["calibration_error"] == pytest.approx(0.5 * abs(0.9 - 0.5) + 0.5 * abs(0.6 - 1.0), abs=1e-6)


def test_absent_class_does_not_count_in_the_mean_over_classes():
    figures, _ = quality(torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]).log(), torch.tensor([0, 2]))
    assert figures["mean_class_accuracy"] == 1.0


def test_nan_predictions_are_refused():
    with pytest.raises(ValueError, match="predicts NaN"):
        quality(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))


def test_peak_memory_sees_what_was_given_back():
    """In a process of its own: one that freed memory before would take that first."""
    code = (
        "import torch; from lightning_faast.evaluation.measure import PeakMemory; peak = PeakMemory()\n"
        "held = torch.ones(20_000_000); del held; print(peak.growth())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    if printed == "None":
        pytest.skip("this system does not tell")
    assert 70e6 < int(printed) < 200e6


class Slow(nn.Module):
    def forward(self, keys):
        time.sleep(0.004)
        self.rows = len(keys)
        return keys


def test_microseconds_are_a_row():
    head = Slow()
    assert 4000 <= microseconds(head, torch.zeros(5, 2), 1) < 12000
    assert head.rows == 1
    assert 4000 / 256 <= microseconds(head, torch.zeros(5, 2), 256) < 12000 / 256
    assert head.rows == 256  # five keys were repeated
