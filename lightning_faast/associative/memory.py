"""Memory: heads that answer from what they remember of every row; and the rows it keeps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_faast.associative.bank import Bank
from lightning_faast.associative.labels import LabelLearner


class Memory(LabelLearner):
    """A head that remembers and reads: :meth:`read` answers a key with a combination of values, the rest is shared.

    The value of a row is the class embedding of its label where there are such, else its label as a one-hot row.

    Args:
        in_features: Width d of the keys; from the first batch where not given.
        out_features: Number of classes c; from the labels where not given.
        class_embeddings: [c, e], the value of each class. Logits are then ``scale`` times the cosine between what is
            read and them.
        scale: Scale of the cosines (CLIP's 100).
        normalize: Whether keys are scaled to unit norm first, as in the paper.
    """

    class_embeddings: Tensor | None

    def __init__(
        self,
        in_features: int | None,
        out_features: int | None,
        *,
        class_embeddings: Tensor | None,
        scale: float,
        normalize: bool,
    ) -> None:
        if class_embeddings is not None:
            if class_embeddings.ndim != 2:
                raise ValueError(f"class_embeddings must be [c, e], got {tuple(class_embeddings.shape)}.")
            if out_features not in (None, len(class_embeddings)):
                raise ValueError(
                    f"out_features is {out_features}, but class_embeddings have {len(class_embeddings)} rows."
                )
            out_features = len(class_embeddings)
        super().__init__(in_features, out_features)
        self.scale = scale
        self.normalize = normalize
        embeddings = None if class_embeddings is None else class_embeddings.detach().clone()
        self.register_buffer("class_embeddings", embeddings)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(prefix + "class_embeddings")
        if loaded is not None and self.class_embeddings is None:
            self.class_embeddings = torch.empty_like(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _remembered(self, keys: Tensor, values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys [N, d], of unit norm where asked for and in their own dtype, and labels [N]."""
        if weights is not None:
            raise ValueError(f"{type(self).__name__} remembers rows as they are and takes no weights: repeat rows.")
        keys, labels = self._rows_of(keys, values)
        if self.normalize:
            # An all-zero key has no direction. 0/0 makes it NaN, which is refused by batch.
            wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
            keys = (wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True)).to(keys.dtype)
        return keys, labels

    # ------------------------------------------------------------------ predicting

    @abstractmethod
    def _read(self, queries: Tensor) -> Tensor:
        """Values [Q, c], or [Q, e] with class embeddings, of queries [Q, d] in the precision of the answer."""

    @abstractmethod
    def _logits_of_shares(self, shares: Tensor) -> Tensor:
        """Logits [Q, c] of what is read [Q, c] where values are one-hot rows."""

    def read(self, keys: Tensor) -> Tensor:
        """What the memory answers: values [..., e] with class embeddings, else [..., c], of keys [..., d].

        In float32, or float64 where keys are. Keys that hold NaN or infinite values read NaN.

        Raises:
            RuntimeError: Where nothing is remembered yet.
            ValueError: For keys of another width.
        """
        self._require_fitted()
        keys = self._checked(keys)
        queries = keys.reshape(-1, keys.shape[-1]).to(torch.promote_types(keys.dtype, torch.float32))
        if self.normalize:
            queries = F.normalize(queries, dim=-1)
        with torch.autocast(queries.device.type, enabled=False):  # scores in half precision find other neighbors
            values = self._read(queries)
        unreadable = ~queries.isfinite().all(-1, keepdim=True)
        return values.masked_fill(unreadable, float("nan")).reshape(*keys.shape[:-1], values.shape[1])

    def forward(self, keys: Tensor) -> Tensor:
        """Logits [..., c] of keys [..., d]; zeros before the first solve, where the sizes are declared."""
        keys = self._checked(keys)
        if not self.is_fitted:
            return self._unfitted_logits(keys)
        values = self.read(keys)
        if self.class_embeddings is None:
            return self._logits_of_shares(values)
        directions = F.normalize(self.class_embeddings.to(values), dim=-1)
        with torch.autocast(values.device.type, enabled=False):
            return self.scale * F.linear(F.normalize(values, dim=-1), directions)

    # ------------------------------------------------------------------ reporting

    @property
    def num_solved(self) -> int:
        """0: a memory only remembers."""
        return 0

    def extra_repr(self) -> str:
        """In the manner of nn.Linear."""
        return f"{super().extra_repr()}, normalize={self.normalize}"


class KeyMemory(Memory):
    """A memory that keeps keys and labels and reads them in blocks.

    Never more than [``block_size``, ``block_size``] scores are held at a time.

    Logits without class embeddings: of n votes (of the neighbors, or of all rows) a share p_c went to class c; one more
    vote, shared equally by all c classes, keeps every probability above zero: log((n p_c + 1/c)/(n + 1)).

    Args:
        in_features: As in :class:`Memory`, and so are the others.
        out_features: Number of classes.
        class_embeddings: [c, e].
        scale: Of the cosines.
        normalize: Whether keys are scaled to unit norm.
        max_rows: Rows kept at most, a uniform sample of those seen (another one by ``seed``); all where None.
        block_size: Rows of the memory, and keys to answer, taken at a time.
        seed: Of the sample.

    Attributes:
        keys: [N, d], in the dtype in which they came (at least 16 bits), of unit norm with ``normalize``.
        labels: [N] int64.
        class_counts: Rows of each class, [c] int64.
    """

    keys: Tensor
    labels: Tensor
    class_counts: Tensor
    _published = ("keys", "labels", "class_counts")

    def __init__(
        self,
        in_features: int | None,
        out_features: int | None,
        *,
        class_embeddings: Tensor | None,
        scale: float,
        normalize: bool,
        max_rows: int | None,
        block_size: int,
        seed: int,
    ) -> None:
        super().__init__(in_features, out_features, class_embeddings=class_embeddings, scale=scale, normalize=normalize)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}.")
        self.max_rows = max_rows
        self.block_size = block_size
        self.seed = seed
        self.reset()
        self.register_buffer("keys", torch.empty(0, in_features or 0))
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64))
        self.register_buffer("class_counts", torch.empty(0, dtype=torch.int64))

    # ------------------------------------------------------------------ learning

    def reset(self) -> None:
        """Forget every row seen; what was solved stays until the next :meth:`solve`."""
        d, c = self._declared
        self._bank = Bank(c, d, self.max_rows, self.seed)

    def update(
        self, keys: Tensor, values: Tensor, weights: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Remember rows; they are read after the next :meth:`solve`.

        Args:
            keys: [..., d], any floating dtype.
            values: Labels [...] or [..., 1].
            weights: Not taken: repeat rows.
            positions: Optional int64 [rows] on the CPU: places of these rows in the whole stream.

        Raises:
            ValueError: For NaN or infinite keys (zero keys with ``normalize``), labels out of range, values that are
                no labels, keys of another width. Devices other than the CPU tell at the next solve, or every 64
                batches.
        """
        self._bank.update(*self._remembered(keys, values, weights), positions)

    def reduce(self, add: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Replace the rows of this process by those of all, in the order of their positions."""
        self._bank.reduce(gather, self.class_counts.device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def solve(self) -> None:
        """Publish the rows seen.

        Raises:
            RuntimeError: Where no row was seen.
        """
        keys, labels = self._bank.joined()
        counts = torch.bincount(labels, minlength=self._declared[1] or 0)
        self._publish(keys=keys, labels=labels, class_counts=counts)
        self._prepare()

    @property
    def rows(self) -> int:
        """Rows seen since the last :meth:`reset`."""
        return self._bank.seen

    # ------------------------------------------------------------------ reading

    def _prepare(self) -> None:
        """Derive what a reader needs beside the published rows."""
        self._votes = self._num_votes()

    @abstractmethod
    def _num_votes(self) -> int:
        """Votes that an answer counts."""

    @abstractmethod
    def _answer(self, queries: Tensor) -> Tensor:
        """:meth:`_read` for no more than ``block_size`` queries."""

    def _read(self, queries: Tensor) -> Tensor:
        queries = queries.to(torch.promote_types(queries.dtype, self.keys.dtype))
        return torch.cat([self._answer(block) for block in queries.split(self.block_size)])

    def _score_blocks(self, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores [Q, B] of queries against blocks of rows, the larger the nearer, and the labels [B] of these."""
        for keys, labels in zip(self.keys.split(self.block_size), self.labels.split(self.block_size), strict=True):
            yield F.linear(queries, keys.to(queries.dtype)), labels

    def _nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores [Q, k] and labels [Q, k] of the k best rows, the best first."""
        best = queries.new_empty(len(queries), 0)
        classes = self.labels.new_empty(len(queries), 0)
        for scores, labels in self._score_blocks(queries):
            found, index = scores.topk(min(k, scores.shape[1]))
            best, classes = torch.cat([best, found], 1), torch.cat([classes, labels[index]], 1)
            best, index = best.topk(min(k, best.shape[1]))
            classes = classes.gather(1, index)
        return best, classes

    def _shares(self, votes: Tensor, classes: Tensor) -> Tensor:
        """Shares [Q, c] of votes [Q, k] for classes [Q, k]."""
        total = votes.new_zeros(len(votes), len(self.class_counts)).scatter_add(1, classes, votes)
        return total / votes.sum(1, keepdim=True)

    def _valued(self, shares: Tensor) -> Tensor:
        """The values of shares [Q, c] of the classes."""
        return shares if self.class_embeddings is None else shares @ self.class_embeddings.to(shares)

    def _logits_of_shares(self, shares: Tensor) -> Tensor:
        c = shares.shape[-1]
        return ((self._votes * shares + 1 / c) / (self._votes + 1)).log()

    # ------------------------------------------------------------------ state

    def _apply(self, *args: Any, **kwargs: Any) -> KeyMemory:
        super()._apply(*args, **kwargs)  # another device or dtype
        if self.is_fitted:
            self._prepare()
        return self

    def _sizes(self, published: Mapping[str, Tensor]) -> tuple[int, int]:
        return published["keys"].shape[1], len(published["class_counts"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "keys" in state_dict:  # keys stay in the dtype in which they came
            self.keys = self.keys.to(state_dict[prefix + "keys"].dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.is_fitted:
            self._prepare()

    def learned_state(self) -> dict[str, Tensor]:
        """The rows seen, flat."""
        return self._bank.state_dict()

    def load_learned_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`learned_state`.

        Raises:
            ValueError: For a damaged state, or one of other sizes.
        """
        self._bank.load_state_dict(state)

    @property
    def bytes_to_update(self) -> int:
        """Bytes of the rows kept."""
        return self._bank.num_bytes

    def figures(self) -> dict[str, float]:
        """``stored_rows``: rows that a prediction reads."""
        self._require_fitted()
        return {"stored_rows": float(len(self.labels))}

    def summary(self) -> str:
        """How it reads, and how many rows."""
        self._require_fitted()
        sampled = "" if self.max_rows is None else f" (at most {self.max_rows:,})"
        return f"{self._manner()}, {len(self.labels):,} keys in memory{sampled}"

    @abstractmethod
    def _manner(self) -> str:
        """How it reads, in a phrase."""
