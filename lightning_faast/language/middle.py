"""MiddleFastWeights: the paper's layer between decoder layers, with slow weights that are trained."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_faast.associative.faults import FaultLog
from lightning_faast.language.chunked import ChunkedMap
from lightning_faast.language.embedding import MapSolution, map_figures, map_summary
from lightning_faast.language.learner import HiddenLearner
from lightning_faast.language.output import OutputLayer

#: Where the released checkpoints keep the slow weights of a layer -> our names.
_RELEASED = {"memory_reader.scorer.weight": "scorer.weight", "interpreter.out_proj.weight": "out_proj.weight"}


class MiddleFastWeights(HiddenLearner):
    r"""hidden' = h + P W h between two decoder layers, as in the paper.

    The value of a position is the next position's hidden state times sigmoid(scorer([key; value])). W comes from
    :class:`~lightning_faast.language.chunked.ChunkedMap`; the scorer and P (``out_proj``) are slow weights: parameters,
    trained by backpropagation through the model in training mode, where W is computed anew in every forward pass and
    is differentiable by the scorer. Untrained, P is zero and the layer changes nothing.

    Args:
        output: The model's output layer; only its vocabulary counts.
        width: Of the hidden states.
        update_size: Tokens of a chunk.
        memory_size: Tokens in the bank from which on a chunk leaves it.
        alpha: A chunk's tolerance is its tokens to the power -alpha; in training it is that of float32 rounding.
        update_discount: Factor of the count of earlier chunks when one enters, in training only; 0.9 in the paper.
        dropout: Of W h in training; 0.1 in the paper.

    Attributes:
        scorer: [1, 2 d].
        out_proj: P, [d, d].
        weight: W, [d, d].

    Example:
        >>> import torch
        >>> from lightning_faast.language import MiddleFastWeights, OutputLayer
        >>> layer = MiddleFastWeights(OutputLayer(torch.nn.Linear(16, 50)), width=16)
        >>> hidden, tokens = torch.randn(4, 30, 16), torch.randint(50, (4, 30))
        >>> layer.update(hidden, tokens)
        >>> layer(hidden).sum().backward()  # in training mode
        >>> layer.out_proj.weight.grad.abs().max() > 0
        tensor(True)
    """

    weight: Tensor

    def __init__(
        self,
        output: OutputLayer,
        width: int,
        *,
        update_size: int = 8192,
        memory_size: int = 65536,
        alpha: float = 0.8,
        update_discount: float = 0.9,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(output)
        self.in_features = width
        self._map = ChunkedMap(update_size, memory_size, alpha, update_discount)
        options: dict[str, Any] = {
            "device": output.device,
            "dtype": torch.promote_types(output.module.weight.dtype, torch.float32),
        }
        self.scorer = nn.Linear(2 * width, 1, bias=False, **options)
        self.out_proj = nn.Linear(width, width, bias=False, **options)
        nn.init.zeros_(self.out_proj.weight)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("weight", torch.zeros(width, width, **options))
        self.reset()

    # ------------------------------------------------------------------ learning

    def reset(self) -> None:
        """Forget every token seen; W stays until the next :meth:`solve`, and the slow weights for good."""
        self._map.clear()
        self._faults = FaultLog(self.output.vocabulary)
        self.solution: MapSolution | None = None

    def forget(self) -> None:
        """Set W to zero; the slow weights stay."""
        self.weight = torch.zeros_like(self.weight)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, keys: Tensor, values: Tensor, weights: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Take in hidden states, in order.

        Args:
            keys: Hidden states of the decoder layer [B, T, d].
            values: Labels [B, T]: a pair counts where that of its second position is not -100.
            weights: Not taken: chunks count tokens.
            positions: Not taken: the order is that of the calls.

        Raises:
            ValueError: For NaN or infinite states, shapes that do not fit, and weights.
        """
        if weights is not None:
            raise ValueError("The middle layer takes no weights: a chunk counts its tokens.")
        self._check_width(keys)
        if keys.ndim != 3:
            raise ValueError(f"keys must be hidden states [B, T, {self.in_features}], got {tuple(keys.shape)}.")
        pairs, kept = self._pairs(keys, values, None)
        before, after = pairs.keys(keys), pairs.next(keys)
        if kept is not None:  # chunks must be counted, so the device is waited for
            before, after = before[kept > 0], after[kept > 0]
        if len(before):
            counted = torch.zeros(len(before), dtype=torch.int64, device=before.device)
            for rows in (before, after):
                self._faults.check(rows, counted)
            self._map.add(before, after, self._weighted, self.training)

    def _weighted(self, keys: Tensor, values: Tensor) -> Tensor:
        dtype = self.scorer.weight.dtype
        return values.to(dtype) * self.scorer(torch.cat([keys, values], -1).to(dtype)).sigmoid()

    def merge(self, other: MiddleFastWeights) -> None:
        """Take in the other's solution, weighted by its tokens."""
        with torch.no_grad():
            self._map.merge(*other._map.read(other._weighted))

    def subtract(self, other: MiddleFastWeights) -> None:
        """Refused: a mean of solutions does not forget."""
        raise ValueError("The middle layer cannot forget: use the output layer's 'embedding' or 'residual'.")

    def reduce(self, add: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Replace this process's solution by the mean of all, weighted by their tokens; as :meth:`Learner.reduce`."""
        self._map.reduce(add, self.weight, self._weighted)

    @property
    def rows(self) -> int:
        """Tokens seen since the last :meth:`reset`."""
        return self._map.rows

    @torch.inference_mode(False)
    @torch.no_grad()
    def solve(self) -> MapSolution:
        """Set W from the chunks that left the bank and those still in it.

        Raises:
            RuntimeError: Where no token was seen.
        """
        self._faults.verify()
        if not bool(self.out_proj.weight.any()):
            warnings.warn(
                "The middle layer's out_proj is zero, so what it learned changes nothing: train its slow weights, or "
                "load them (slow_weights=PATH).",
                stacklevel=2,
            )
        solution = MapSolution(*self._map.read(self._weighted))
        self.weight = solution.weight.to(device=self.weight.device, dtype=self.weight.dtype)
        self.solution = solution
        return solution

    # ------------------------------------------------------------------ predicting

    def forward(self, keys: Tensor) -> Tensor:
        """Hidden states h + P W h [..., d] of hidden states h [..., d], in their dtype."""
        self._check_width(keys)
        weight = self.weight
        if self.training and self._map.rows:  # the scorer has changed since, and gets its gradient from here
            weight = self._map.read(self._weighted, training=True)[0].to(weight)
        memory = self.dropout(F.linear(keys.to(weight), weight))
        return (keys + self.out_proj(memory)).to(keys.dtype)

    def load_slow_weights(self, source: str | os.PathLike[str] | Mapping[str, Tensor], at: int | None = None) -> None:
        """Read the scorer and out_proj of a safetensors file or a state dict, ours or a released checkpoint's.

        Args:
            source: File, or name -> tensor.
            at: Number of the decoder layer, where there are several with slow weights.

        Raises:
            ValueError: Where they are not there, listing what is.
        """
        state = load_file(Path(source)) if isinstance(source, (str, os.PathLike)) else source
        self.load_state_dict(slow_weights(state, at), strict=False)

    # ------------------------------------------------------------------ state

    def learned_state(self) -> dict[str, Tensor]:
        """W0 and the bank: what is needed to go on learning, beside the slow weights."""
        return self._map.state_dict()

    def load_learned_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`learned_state`."""
        self._map.load_state_dict({name: t.to(self.weight.device) for name, t in state.items()})

    # ------------------------------------------------------------------ reporting

    @property
    def bytes_to_predict(self) -> int:
        """Bytes of W and P."""
        return sum(t.numel() * t.element_size() for t in (self.weight, self.out_proj.weight))

    @property
    def bytes_to_update(self) -> int:
        """Bytes of W0, the bank and the scorer."""
        return self._map.num_bytes + self.scorer.weight.numel() * self.scorer.weight.element_size()

    @property
    def num_solved(self) -> int:
        """Numbers in W."""
        return self.weight.numel()

    def figures(self) -> dict[str, float]:
        """Figures of the last solve by the names under which they are logged."""
        return map_figures(self._last_solution())

    def summary(self) -> str:
        """How many tokens the mean is of."""
        return f"middle, {map_summary(self._last_solution())}"

    def _last_solution(self) -> MapSolution:
        if self.solution is None:
            raise RuntimeError("The layer was not solved in this process: call solve().")
        return self.solution

    def extra_repr(self) -> str:
        """In the manner of nn.Linear."""
        m = self._map
        return f"width={self.in_features}, update_size={m.update_size}, memory_size={m.memory_size}, alpha={m.alpha}"


def slow_weights(state: Mapping[str, Tensor], at: int | None = None) -> dict[str, Tensor]:
    """``scorer.weight`` and ``out_proj.weight`` of a state dict: ours, or a released checkpoint's.

    The authors' code calls them ``....memory_reader.scorer.weight`` and ``....interpreter.out_proj.weight``, below
    the number of a layer where there are several.

    Args:
        state: Name -> tensor.
        at: Number of the layer; not needed where only one has slow weights.

    Raises:
        ValueError: Where they are not there or not unique, listing the names that may be meant.
    """
    found: dict[str, Tensor] = {}
    for suffix, name in {**{ours: ours for ours in _RELEASED.values()}, **_RELEASED}.items():
        names = [n for n in state if re.search(rf"(^|\.){re.escape(suffix)}$", n)]
        if at is not None and len(names) > 1:
            names = [n for n in names if str(at) in n.split(".")]
        if len(names) > 1:
            raise ValueError(f"Several layers have {suffix}: {', '.join(sorted(names))}. Say which: at=NUMBER.")
        if names:
            found[name] = state[names[0]]
    missing = [name for name in _RELEASED.values() if name not in found]
    if missing:
        near = sorted(n for n in state if "scorer" in n or "proj" in n) or sorted(state)
        raise ValueError(f"No {' and no '.join(missing)} in the checkpoint; names in it: {', '.join(near[:20])}.")
    return found
