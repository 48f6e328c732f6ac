"""Readers of a memory of keys: nearest neighbors, weighted neighbors, softmax over all rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_faast.associative.memory import KeyMemory

#: Rows of the memory, and keys to answer, taken at a time.
_BLOCK_SIZE = 2048


class KNN(KeyMemory):
    """Nearest neighbors: the label that most of the k nearest rows have, as the paper's kNN reader.

    Distances are Euclidean, and k never exceeds the rows of the largest class, so that with one row a class the nearest
    decides. With class embeddings, what is read is the element-wise mode of the neighbors' embeddings (of equally
    frequent numbers the smallest). The element-wise mode of one-hot rows would be all zeros without a strict majority:
    without class embeddings the shares of the votes are read, whose largest is the mode of the labels. Of classes with
    equally many votes the lowest label wins. Which of several rows at the very distance of the k-th votes is open.

    Args:
        in_features: Width d of the keys; from the first batch where not given.
        out_features: Number of classes c; from the labels where not given.
        k: Neighbors.
        class_embeddings: [c, e], the value of each class. Logits are then ``scale`` times the cosine between what is
            read and them; without them they are the logarithm of the shares, smoothed as :class:`KeyMemory` says.
        scale: Scale of the cosines (CLIP's 100).
        normalize: Whether keys are scaled to unit norm first, as in the paper.
        max_rows: Rows kept at most, a uniform sample of those seen; all where None.
        block_size: Rows of the memory, and keys to answer, taken at a time.
        seed: Of the sample.

    Example:
        >>> import torch
        >>> from lightning_faast.associative import KNN
        >>> keys = torch.randn(300, 16)
        >>> labels = (keys[:, 0] > 0).long()
        >>> memory = KNN(k=5).fit(keys[:200], labels[:200])
        >>> memory.predict_proba(keys[200:]).shape
        torch.Size([100, 2])
        >>> memory.score(keys[200:], labels[200:]) > 0.6
        True
    """

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        k: int = 10,
        class_embeddings: Tensor | None = None,
        scale: float = 100.0,
        normalize: bool = True,
        max_rows: int | None = None,
        block_size: int = _BLOCK_SIZE,
        seed: int = 0,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            class_embeddings=class_embeddings,
            scale=scale,
            normalize=normalize,
            max_rows=max_rows,
            block_size=block_size,
            seed=seed,
        )
        self.k = _checked_k(k)

    def _num_votes(self) -> int:
        return min(self.k, int(self.class_counts.max()))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _prepare(self) -> None:
        # |q - x|^2 / 2 = |x - m|^2 / 2 - (q - m).x + (a term of q alone). With m the mean, no digits are lost to an
        # offset that all keys have in common.
        super()._prepare()
        dtype = torch.promote_types(self.keys.dtype, torch.float32)
        blocks = self.keys.split(self.block_size)
        mean = torch.stack([keys.sum(0, dtype=torch.float64) for keys in blocks]).sum(0) / len(self.keys)
        halves = [(keys.to(torch.float64) - mean).square().sum(1) / 2 for keys in blocks]
        self._mean, self._half_squares = mean.to(dtype), torch.cat(halves).to(dtype)

    def _score_blocks(self, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        blocks = super()._score_blocks(queries - self._mean)
        for (scores, labels), halves in zip(blocks, self._half_squares.split(self.block_size), strict=True):
            yield scores - halves, labels

    def _answer(self, queries: Tensor) -> Tensor:
        _, classes = self._nearest(queries, self._votes)
        if self.class_embeddings is None:
            return self._shares(torch.ones_like(classes, dtype=queries.dtype), classes)
        return self.class_embeddings.to(queries)[classes].mode(1).values

    @property
    def bytes_to_predict(self) -> int:
        """Bytes of keys, labels and the keys' squares."""
        derived = (self._mean, self._half_squares) if self.is_fitted else ()
        return super().bytes_to_predict + sum(t.numel() * t.element_size() for t in derived)

    def _manner(self) -> str:
        return f"{self._votes} nearest neighbors"


class WeightedKNN(KeyMemory):
    r"""Weighted nearest neighbors by cosine, as self-supervised encoders are measured.

    Each of the k most similar rows votes for its class with exp(cosine/temperature). Keys are always scaled to unit
    norm.

    Args:
        in_features: Width d of the keys; from the first batch where not given.
        out_features: Number of classes c; from the labels where not given.
        k: Neighbors; all rows where there are fewer.
        temperature: Of the votes.
        class_embeddings: [c, e], the value of each class. Logits are then ``scale`` times the cosine between the
            weighted mean of values and them; without them they are the logarithm of the shares of votes, smoothed as
            :class:`KeyMemory` says.
        scale: Scale of the cosines (CLIP's 100).
        max_rows: Rows kept at most, a uniform sample of those seen; all where None.
        block_size: Rows of the memory, and keys to answer, taken at a time.
        seed: Of the sample.

    Example:
        >>> import torch
        >>> from lightning_faast.associative import WeightedKNN
        >>> keys = torch.randn(300, 16)
        >>> labels = (keys[:, 0] > 0).long()
        >>> WeightedKNN().fit(keys[:200], labels[:200]).score(keys[200:], labels[200:]) > 0.6
        True

    References:
        Wu, Xiong, Yu and Lin, Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018; Caron et
        al., Emerging Properties in Self-Supervised Vision Transformers, 2021.
    """

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        k: int = 20,
        temperature: float = 0.07,
        class_embeddings: Tensor | None = None,
        scale: float = 100.0,
        max_rows: int | None = None,
        block_size: int = _BLOCK_SIZE,
        seed: int = 0,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            class_embeddings=class_embeddings,
            scale=scale,
            normalize=True,
            max_rows=max_rows,
            block_size=block_size,
            seed=seed,
        )
        self.k = _checked_k(k)
        self.temperature = _checked_temperature(temperature)

    def _num_votes(self) -> int:
        return min(self.k, len(self.labels))

    def _answer(self, queries: Tensor) -> Tensor:
        cosines, classes = self._nearest(queries, self._votes)
        votes = ((cosines - cosines[:, :1]) / self.temperature).exp()  # relative to the best: shares are the same
        return self._valued(self._shares(votes, classes))

    def _manner(self) -> str:
        return f"{self._votes} weighted nearest neighbors"


class SoftmaxMemory(KeyMemory):
    r"""Softmax attention over all rows, as the paper's softmax reader: weights softmax(q.k/temperature) on the values.

    The paper centres the scores by their mean, which a softmax does not see. Blocks are merged by a running maximum and
    running sums, so that memory does not grow with N beyond the keys themselves.

    Args:
        in_features: Width d of the keys; from the first batch where not given.
        out_features: Number of classes c; from the labels where not given.
        temperature: Scores are divided by it; the paper multiplies by 100.
        class_embeddings: [c, e], the value of each class. Logits are then ``scale`` times the cosine between the
            weighted mean of values and them; without them they are the logarithm of the weights' sums by class,
            smoothed as :class:`KeyMemory` says.
        scale: Scale of the cosines (CLIP's 100).
        normalize: Whether keys are scaled to unit norm first, as in the paper. Without it the largest key decides
            nearly alone, unless the temperature is raised.
        max_rows: Rows kept at most, a uniform sample of those seen; all where None.
        block_size: Rows of the memory, and keys to answer, taken at a time.
        seed: Of the sample.

    Example:
        >>> import torch
        >>> from lightning_faast.associative import SoftmaxMemory
        >>> keys = torch.randn(300, 16)
        >>> labels = (keys[:, 0] > 0).long()
        >>> SoftmaxMemory().fit(keys[:200], labels[:200]).score(keys[200:], labels[200:]) > 0.6
        True
    """

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        temperature: float = 0.01,
        class_embeddings: Tensor | None = None,
        scale: float = 100.0,
        normalize: bool = True,
        max_rows: int | None = None,
        block_size: int = _BLOCK_SIZE,
        seed: int = 0,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            class_embeddings=class_embeddings,
            scale=scale,
            normalize=normalize,
            max_rows=max_rows,
            block_size=block_size,
            seed=seed,
        )
        self.temperature = _checked_temperature(temperature)

    def _num_votes(self) -> int:
        return len(self.labels)

    def _answer(self, queries: Tensor) -> Tensor:
        largest = queries.new_full((len(queries), 1), -torch.inf)
        mass = queries.new_zeros(len(queries), len(self.class_counts))
        for scores, labels in self._score_blocks(queries / self.temperature):
            new = torch.maximum(largest, scores.amax(1, keepdim=True))
            mass = mass * (largest - new).exp()
            mass = mass.scatter_add(1, labels.expand_as(scores), (scores - new).exp())
            largest = new
        return self._valued(mass / mass.sum(1, keepdim=True))

    def _manner(self) -> str:
        return f"softmax at temperature {self.temperature:g}"


def _checked_k(k: int) -> int:
    if k < 1:
        raise ValueError(f"k must be at least 1 neighbor, got {k}.")
    return k


def _checked_temperature(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    return temperature
