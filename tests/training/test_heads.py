"""Trained heads against their formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_faast.training import ResidualLinear, linear_head


def test_labels_get_a_plain_linear_layer():
    head = linear_head(6, 4)
    assert type(head) is nn.Linear
    assert (head.in_features, head.out_features) == (6, 4)


def test_embeddings_get_the_residual_head_that_starts_as_zero_shot():
    embeddings, x = torch.randn(4, 6), torch.randn(5, 6)
    head = linear_head(6, 4, class_embeddings=embeddings)
    assert (head.in_features, head.out_features) == (6, 4)
    expected = 100 * F.cosine_similarity(x[:, None], embeddings[None], dim=-1)
    torch.testing.assert_close(head(x), expected)


def test_residual_formula():
    embeddings, x, weight = torch.randn(4, 6), torch.randn(5, 6), torch.randn(6, 6)
    head = ResidualLinear(6, embeddings, scale=7.0)
    with torch.no_grad():
        head.weight.copy_(weight)
    expected = 7 * F.cosine_similarity((x + x @ weight.T)[:, None], embeddings[None], dim=-1)
    torch.testing.assert_close(head(x), expected)
    assert [name for name, _ in head.named_parameters()] == ["weight"]  # the embeddings are not trained
    torch.testing.assert_close(head(3 * x), head(x))


def test_embeddings_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 5\); expected \(classes, 6\)"):
        linear_head(6, 4, class_embeddings=torch.zeros(4, 5))
