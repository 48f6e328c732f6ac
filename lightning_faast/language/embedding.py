"""EmbeddingFastWeights: the paper's output layer, solved exactly from streamed sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_faast.associative.faults import FaultLog
from lightning_faast.associative.processes import reduced
from lightning_faast.associative.regularization import Choice, PaperRule, Regularization
from lightning_faast.associative.reservoir import Reservoir
from lightning_faast.associative.spectrum import Spectrum
from lightning_faast.associative.statistics import SufficientStatistics
from lightning_faast.language.learner import HiddenLearner
from lightning_faast.language.output import OutputLayer


@dataclass(frozen=True)
class MapSolution:
    """What the solve of a map found.

    Attributes:
        weight: W [e, d], float64.
        count: Rows that it was solved from.
        effective_rank: Directions kept, or degrees of freedom of a ridge; None where W is a mean of several solutions.
        regularization: What was chosen; None likewise.
    """

    weight: Tensor
    count: float
    effective_rank: float | None = None
    regularization: Choice | None = None


class MixingLearner(HiddenLearner):
    r"""hidden' = (1 - m) h + m W h, m the ``mix``; before the first solve hidden' = h.

    Args:
        output: The model's output layer.
        embeddings: The model's input embeddings; the value of a token is its row.
        mix: m; 0.9 in the paper, which trains its models for it.

    Attributes:
        mixed: (1 - m) I + m W, [d, d].
        solution: :class:`MapSolution` of the last solve in this process, else None.
    """

    mixed: Tensor

    def __init__(self, output: OutputLayer, embeddings: nn.Module, mix: float) -> None:
        super().__init__(output)
        if not 0 < mix <= 1:
            raise ValueError(f"mix must be above 0 and at most 1, got {mix}.")
        table: Any = embeddings
        width = int(table.weight.shape[1])
        if width != output.width:
            raise ValueError(
                f"Input embeddings have width {width} and the output layer {output.width}: the next token's embedding "
                "cannot take the place of a hidden state. Use mode='residual'."
            )
        # Not a submodule: the embeddings are the model's, and no part of what was learned.
        self._embed: Callable[[Tensor], Tensor] = embeddings.forward
        self.mix = mix
        self.in_features = width
        self.solution: MapSolution | None = None
        dtype = torch.promote_types(output.module.weight.dtype, torch.float32)
        self.register_buffer("mixed", torch.eye(width, dtype=dtype, device=output.device))

    def _rows(self, keys: Tensor, values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys [N, d], tokens [N] and weights [N] of the pairs of a batch."""
        self._check_width(keys)
        pairs, row_weights = self._pairs(keys, values, weights)
        rows = pairs.keys(keys) if keys.ndim == 3 else keys
        tokens = self._checked_tokens(pairs.targets).to(rows.device)
        return rows, tokens, None if row_weights is None else row_weights.to(rows.device)

    def _values(self, tokens: Tensor) -> Tensor:
        return self._embed(tokens.clamp(0, self.output.vocabulary - 1)).detach()

    def _store_solution(self, solution: MapSolution) -> MapSolution:
        identity = torch.eye(self.output.width, dtype=torch.float64, device=solution.weight.device)
        mixed = (1 - self.mix) * identity + self.mix * solution.weight
        self.mixed = mixed.to(device=self.mixed.device, dtype=self.mixed.dtype)
        self.solution = solution
        return solution

    def forget(self) -> None:
        """Give hidden states back as they come."""
        self.mixed = torch.eye(len(self.mixed), dtype=self.mixed.dtype, device=self.mixed.device)

    def forward(self, keys: Tensor) -> Tensor:
        """Hidden states (1 - m) h + m W h [..., d] of hidden states h [..., d], in their dtype."""
        self._check_width(keys)
        dtype = torch.promote_types(keys.dtype, torch.float32)
        return F.linear(keys.to(dtype), self.mixed.to(dtype)).to(keys.dtype)

    @property
    def bytes_to_predict(self) -> int:
        """Bytes of the matrix."""
        return self.mixed.numel() * self.mixed.element_size()

    @property
    def num_solved(self) -> int:
        """Numbers in W."""
        return self.mixed.numel()

    def figures(self) -> dict[str, float]:
        """Figures of the last solve by the names under which they are logged."""
        return map_figures(self._last_solution())

    def _last_solution(self) -> MapSolution:
        if self.solution is None:
            raise RuntimeError("The layer was not solved in this process: call solve().")
        return self.solution


class EmbeddingFastWeights(MixingLearner):
    r"""The paper's output layer from exact sums: hidden' = (1 - m) h + m W h, W h the next token's embedding regressed.

    It assumes a model whose slow weights were trained for it; any other model it ruins. For those there is
    :class:`ResidualFastWeights`.

    Args:
        output: The model's output layer.
        embeddings: The model's input embeddings.
        mix: m.
        regularization: Of W; the paper's rule (truncation at n^-0.8) where not given.

    Example:
        >>> import torch
        >>> from lightning_faast.language import EmbeddingFastWeights, OutputLayer
        >>> table = torch.nn.Embedding(50, 16)
        >>> layer = EmbeddingFastWeights(OutputLayer(torch.nn.Linear(16, 50)), table)
        >>> tokens = torch.randint(50, (4, 30))
        >>> layer.fit(table(tokens).detach(), tokens)(torch.randn(2, 16)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        output: OutputLayer,
        embeddings: nn.Module,
        *,
        mix: float = 0.9,
        regularization: Regularization | None = None,
    ) -> None:
        super().__init__(output, embeddings, mix)
        self.regularization = regularization if regularization is not None else PaperRule()
        self.reset()

    def reset(self) -> None:
        """Forget every token seen; what was solved stays until the next :meth:`solve`."""
        self._sums = SufficientStatistics(self.output.width, self.output.width)
        self._faults = FaultLog(self.output.vocabulary)
        self.solution = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, keys: Tensor, values: Tensor, weights: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Take in tokens; W changes at the next :meth:`solve`.

        Args:
            keys: Hidden states [B, T, d], or rows [N, d].
            values: Labels [B, T] (predicted from the state before; -100 is left out), or the tokens of the rows [N].
            weights: Optional, one non-negative weight for each label.
            positions: Of no account: sums know no order.

        Raises:
            ValueError: As :meth:`ResidualFastWeights.update`.
        """
        rows, tokens, row_weights = self._rows(keys, values, weights)
        if len(rows):
            self._faults.check(rows, tokens)
            self._sums.update(rows, self._values(tokens), row_weights)

    def merge(self, other: EmbeddingFastWeights) -> None:
        """Take in what another layer of the same model has seen."""
        self._sums = self._sums + other._sums

    def subtract(self, other: EmbeddingFastWeights) -> None:
        """Forget what another layer of the same model has seen, all of which this one has seen too."""
        self._sums = self._sums - other._sums

    def reduce(self, add: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Replace what this process has seen by what all have seen; as :meth:`Learner.reduce`."""
        self._sums, _ = reduced(self._sums, Reservoir(0, 0), add, gather, self.output.device)

    @property
    def rows(self) -> int:
        """Tokens seen since the last :meth:`reset`."""
        return self._sums.rows

    @torch.inference_mode(False)
    @torch.no_grad()
    def solve(self) -> MapSolution:
        """Set W.

        Raises:
            RuntimeError: Where no token was seen.
        """
        self._faults.verify()
        if not self.rows:
            raise RuntimeError("No next-token pair was seen: call learn(...) or update(keys, labels) before solving.")
        spectrum = Spectrum.from_statistics(self._sums, centered=False)
        choice = self.regularization.choose(spectrum)
        kept = choice.filter(spectrum)
        weight = (spectrum.basis @ (kept[:, None] * spectrum.projected)).T
        rank = float((spectrum.eigenvalues * kept).sum())
        return self._store_solution(MapSolution(weight, self._sums.count, rank, choice))

    def learned_state(self) -> dict[str, Tensor]:
        """The sums, flat: what is needed to go on learning."""
        return {f"sums.{name}": t for name, t in self._sums.state_dict().items()}

    def load_learned_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`learned_state`."""
        sums = SufficientStatistics(self.output.width, self.output.width)
        sums.load_state_dict({name.removeprefix("sums."): t for name, t in state.items()})
        self._sums = sums.to(self.output.device)

    @property
    def bytes_to_update(self) -> int:
        """Bytes of the sums (packed)."""
        return self._sums.num_bytes

    def summary(self) -> str:
        """Regularization and effective rank."""
        return f"embedding, {map_summary(self._last_solution())}"

    def extra_repr(self) -> str:
        """In the manner of nn.Linear."""
        return f"in_features={self.in_features}, mix={self.mix}, {self.regularization}"


def map_figures(solution: MapSolution) -> dict[str, float]:
    """Figures of a map by the names under which they are logged."""
    found = {"tokens": float(solution.count)}
    if solution.effective_rank is not None:
        found["effective_rank"] = solution.effective_rank
    if solution.regularization is not None:
        kind = "ridge" if solution.regularization.kind == "ridge" else "tolerance"
        found[kind] = float(solution.regularization.value)
    return found


def map_summary(solution: MapSolution) -> str:
    """A map in a phrase."""
    if solution.regularization is None or solution.effective_rank is None:
        return f"mean of the solutions of chunks, {solution.count:,.0f} tokens"
    return f"{solution.regularization}, effective rank {solution.effective_rank:.0f}"
