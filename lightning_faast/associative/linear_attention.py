"""LinearAttentionMemory: the paper's linear attention, folded into sums that do not grow with N."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_faast.associative.faults import FaultLog, agreed_width, told_to_all
from lightning_faast.associative.memory import Memory
from lightning_faast.associative.precision import accumulation_device

#: Rows added at a time, in float64.
_BLOCK_ROWS = 1024


class LinearAttentionMemory(Memory):
    r"""Linear attention over all rows, as the paper's reader, in memory that does not depend on N.

    With :math:`\phi(x) = \mathrm{elu}(x - \bar x) + 1`, :math:`\bar x` the mean of the elements of x, a key q reads

    .. math:: \frac{\sum_i \phi(q)\cdot\phi(k_i)\, v_i}{\sum_i \phi(q)\cdot\phi(k_i)} - \bar v
              = \frac{\sum_c \phi(q)\cdot (S_c - \frac{n_c}{N} z)\, v_c}{\phi(q)\cdot z}

    with :math:`S_c` the sum of :math:`\phi(k)` over the rows of class c, :math:`z = \sum_c S_c` and :math:`\bar v` the
    mean value. So one pass keeps the sums :math:`S_c` and the counts :math:`n_c` (float64), and the subtraction happens
    once, in the solve, where no digits are lost. No key is kept.

    Without class embeddings the logits are c times what is read: to first order their softmax is 1/c plus what is read,
    the attention's own weights where classes are balanced.

    Args:
        in_features: Width d of the keys; from the first batch where not given.
        out_features: Number of classes c; from the labels where not given.
        class_embeddings: [c, e], the value of each class. Logits are then ``scale`` times the cosine between what is
            read and them.
        scale: Scale of the cosines (CLIP's 100).
        normalize: Whether keys are scaled to unit norm first, as in the paper.

    Attributes:
        numerator: Rows S_c - n_c/N z, [c, d].
        denominator: z, [d].

    Example:
        >>> import torch
        >>> from lightning_faast.associative import LinearAttentionMemory
        >>> keys = torch.randn(300, 16)
        >>> labels = (keys[:, 0] > 0).long()
        >>> memory = LinearAttentionMemory().fit(keys[:200], labels[:200])
        >>> memory.score(keys[200:], labels[200:]) > 0.6
        True
        >>> memory.bytes_to_predict
        192
    """

    numerator: Tensor
    denominator: Tensor
    _published = ("numerator", "denominator")

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        class_embeddings: Tensor | None = None,
        scale: float = 100.0,
        normalize: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, class_embeddings=class_embeddings, scale=scale, normalize=normalize)
        self.reset()
        self.register_buffer("numerator", torch.empty(0, 0))
        self.register_buffer("denominator", torch.empty(0))

    # ------------------------------------------------------------------ learning

    def reset(self) -> None:
        """Forget every row seen; what was solved stays until the next :meth:`solve`."""
        d, c = self._declared
        self._faults = FaultLog(c)
        self._class_sums = torch.zeros(c or 0, d or 0, dtype=torch.float64)
        self._class_counts = torch.zeros(c or 0, dtype=torch.float64)
        self._seen = 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, keys: Tensor, values: Tensor, weights: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Add rows; they are read after the next :meth:`solve`.

        Args:
            keys: [..., d], any floating dtype.
            values: Labels [...] or [..., 1].
            weights: Not taken: repeat rows.
            positions: Of no account: sums know no order.

        Raises:
            ValueError: For NaN or infinite keys (zero keys with ``normalize``), labels out of range, values that are no
                labels, keys of another width. Devices other than the CPU tell at the next solve, or every 64 batches.
        """
        keys, labels = self._remembered(keys, values, weights)
        width = self._declared[0] if not self._seen else self._class_sums.shape[1]
        if width not in (None, keys.shape[1]):
            raise ValueError(f"keys must have width {width}, as declared or seen before, got {keys.shape[1]}.")
        if not len(keys):
            return
        device = accumulation_device(keys.device)
        keys, labels = keys.to(device), labels.to(device)
        self._faults.check(keys, labels)
        self._make_room(self._declared[1] or int(labels.max()) + 1, keys.shape[1], device)
        for k, y in zip(keys.split(_BLOCK_ROWS), labels.split(_BLOCK_ROWS), strict=True):
            y = y.clamp(0, len(self._class_counts) - 1)  # a label out of range is noted; never index outside
            self._class_sums.index_add_(0, y, _features(k.to(torch.float64)))
            self._class_counts += torch.bincount(y, minlength=len(self._class_counts))
        self._seen += len(keys)

    def _make_room(self, c: int, d: int, device: torch.device) -> None:
        """Sums of at least c classes on ``device``."""
        held = self._class_sums
        if self._seen and held.shape[0] >= c and held.device == device:
            return
        rows = max(c, held.shape[0])
        counts = torch.zeros(rows, dtype=torch.float64, device=device)
        sums = torch.zeros(rows, d, dtype=torch.float64, device=device)
        if self._seen:
            sums[: len(held)], counts[: len(held)] = held, self._class_counts
        self._class_sums, self._class_counts = sums, counts

    @torch.inference_mode(False)
    @torch.no_grad()
    def reduce(self, add: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Replace the sums of this process by those of all."""
        device = self._class_sums.device if self._seen else accumulation_device(self.numerator.device)
        own = [self._seen, self._class_sums.shape[1] if self._seen else 0, self._class_sums.shape[0]]
        table = told_to_all(self._faults, own, gather, device)
        if not bool(table[:, 0].any()):
            return
        self._make_room(int(table[:, 2].max()), agreed_width(table[table[:, 0] > 0, 1]), device)
        self._class_sums, self._class_counts = add(self._class_sums), add(self._class_counts)
        self._seen = int(table[:, 0].sum())

    @torch.inference_mode(False)
    @torch.no_grad()
    def solve(self) -> None:
        """Publish numerator and denominator of the rows seen.

        Raises:
            RuntimeError: Where no row was seen.
        """
        if not self._seen:
            raise RuntimeError(
                "No rows were seen: there is nothing to remember. Call fit, or update with at least one row."
            )
        self._faults.verify()
        total = self._class_sums.sum(0)
        shares = self._class_counts / self._class_counts.sum()
        numerator = self._class_sums - shares[:, None] * total
        dtype = self.numerator.dtype
        scale = float(total.max())  # a quotient: so that half precision does not overflow
        self._publish(numerator=(numerator / scale).to(dtype), denominator=(total / scale).to(dtype))

    @property
    def rows(self) -> int:
        """Rows seen since the last :meth:`reset`."""
        return self._seen

    # ------------------------------------------------------------------ reading

    def _read(self, queries: Tensor) -> Tensor:
        features = _features(queries)
        parts = F.linear(features, self.numerator.to(features)) / (features @ self.denominator.to(features))[:, None]
        return parts if self.class_embeddings is None else parts @ self.class_embeddings.to(parts)

    def _logits_of_shares(self, shares: Tensor) -> Tensor:
        return shares.shape[-1] * shares

    # ------------------------------------------------------------------ state

    def _sizes(self, published: Mapping[str, Tensor]) -> tuple[int, int]:
        c, d = published["numerator"].shape
        return d, c

    def learned_state(self) -> dict[str, Tensor]:
        """Sums and counts by class."""
        self._faults.verify()
        state = {"class_sums": self._class_sums, "class_counts": self._class_counts}
        return {"seen": torch.tensor(self._seen), **{name: t.clone() for name, t in state.items()}}

    def load_learned_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`learned_state`.

        Raises:
            ValueError: For missing entries or other sizes.
        """
        missing = [name for name in ("seen", "class_sums", "class_counts") if name not in state]
        if missing:
            raise ValueError(f"Not a state of LinearAttentionMemory: {', '.join(missing)} missing.")
        sums, counts = (state[name].detach().to(torch.float64, copy=True) for name in ("class_sums", "class_counts"))
        if int(state["seen"]):
            d, c = self._declared
            if sums.ndim != 2 or counts.shape != sums.shape[:1] or d not in (None, sums.shape[1]):
                raise ValueError(f"The state has sums {tuple(sums.shape)}, expected keys of width {d}.")
            if c not in (None, len(counts)):
                raise ValueError(f"The state has {len(counts)} classes, expected {c}.")
        self._seen, self._class_sums, self._class_counts = int(state["seen"]), sums, counts

    @property
    def bytes_to_update(self) -> int:
        """Bytes of the sums and counts."""
        return 8 * (self._class_sums.numel() + self._class_counts.numel())

    def figures(self) -> dict[str, float]:
        """Nothing was chosen."""
        self._require_fitted()
        return {}

    def summary(self) -> str:
        """How it reads."""
        self._require_fitted()
        return "linear attention, no key in memory"


def _features(keys: Tensor) -> Tensor:
    """phi(x) = elu(x - mean(x)) + 1 of rows [N, d]: positive."""
    return F.elu(keys - keys.mean(-1, keepdim=True)) + 1
