"""ResidualFastWeights: one natural-gradient step of a map before the output layer, from three sums."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_faast.associative.faults import FaultLog
from lightning_faast.language.candidates import Candidate, Candidates, as_values, perplexity
from lightning_faast.language.latest import LatestTokens, Rows
from lightning_faast.language.learner import HiddenLearner
from lightning_faast.language.output import BLOCK_ELEMENTS, OutputLayer
from lightning_faast.language.sums import ResidualSums
from lightning_faast.language.token_store import TokenStore

#: Key ridges of a further pass, in terms of the last: the closer to the data, the more they must hold back.
_GROWTH = (1.0, 10.0, 100.0)
#: One token in so many may be held out.
_SHARE = 5


@dataclass(frozen=True)
class ResidualSolution:
    """What the solve found.

    Attributes:
        steps: The step of each pass that was taken; empty where none made the held-out tokens likelier.
        loss_before: Mean negative log-likelihood of the held-out tokens under the model itself, nats; None without any.
        loss_after: The same after the steps, from the other tokens alone.
        choice_seconds: Time that the choice of the candidates took.
        solve_seconds: All of the solve, the choice included.
    """

    steps: tuple[Candidate, ...]
    loss_before: float | None
    loss_after: float | None
    choice_seconds: float
    solve_seconds: float


class ResidualFastWeights(HiddenLearner):
    r"""hidden' = h + A k(h) + a, and a bias for every token, from one pass over hidden states and their next tokens.

    The gradient of a token's log-likelihood by its hidden state is :math:`r = e_y - \sum_v p(v \mid h)\, e_v`, with e
    the rows of the output layer. From the sums :math:`G = \sum k k^\top`, :math:`C = \sum k r^\top` and
    :math:`F = \frac1n \sum r r^\top`, all float64,

    .. math:: A = s\, (F + f \lambda_F I)^{-1} C^\top (G + g \lambda_G I)^{-1}

    is one natural-gradient step with the empirical Fisher information factorized as in K-FAC (Martens and Grosse,
    2015); :math:`\lambda` are the largest eigenvalues. How often a token comes has little to do with the direction of
    its embedding. So with ``token_bias`` every token gets

    .. math:: b_v = \log \frac{n_v + c}{\sum p(v \mid h) + c}

    of its count and of the count that the model expected, and the sums are centred, so that A is about what differs
    between places; :math:`a = -A \bar k`. The sums know no order, add and subtract. s, f and g are chosen by the loss
    on the latest tokens (:class:`~lightning_faast.language.latest.LatestTokens`), a fifth of all at most, which stay
    out of the sums until newer ones come and are counted in the solution.

    Args:
        output: The model's output layer.
        key_widths: Widths of further hidden states that come before h in the keys (of earlier layers).
        normalize: Whether k(h) is h at unit norm; with ``key_widths`` each part always is.
        step: s, or several to choose from.
        key_ridge: g, or several to choose from.
        value_ridge: f, or several to choose from.
        token_bias: Whether tokens get a bias.
        smoothing: c.
        passes: Steps; from the second on, r is taken at the point reached, on the stored tokens, with the same keys.
        held_out_tokens: Latest tokens held out at most; none are where nothing is to be chosen.
        store: Folder for the hidden states that further passes need; None keeps them in memory.
        store_bytes: Hidden states kept for further passes, at most. Tokens beyond count in the first pass only.
        block_elements: Logits held at a time, at most.

    Attributes:
        weight: A, [d, k].
        offset: a, [d].
        token_bias: b, [V], or None.
        solution: :class:`ResidualSolution` of the last solve in this process, else None.

    Example:
        >>> import torch
        >>> from lightning_faast.language import OutputLayer, ResidualFastWeights
        >>> output = OutputLayer(torch.nn.Linear(16, 50, bias=False))
        >>> hidden = torch.randn(8, 40, 16)
        >>> tokens = output.logits(hidden.roll(1, 1)).argmax(-1)  # the model is right, and not sure enough
        >>> layer = ResidualFastWeights(output).fit(hidden, tokens)
        >>> layer(hidden).shape, layer.solution.loss_after < layer.solution.loss_before
        (torch.Size([8, 40, 16]), True)
    """

    weight: Tensor
    offset: Tensor

    def __init__(
        self,
        output: OutputLayer,
        *,
        key_widths: Sequence[int] = (),
        normalize: bool = False,
        step: float | Sequence[float] = (1.0, 0.5, 0.25),
        key_ridge: float | Sequence[float] = (1e-2, 3e-3, 1e-3, 3e-2),
        value_ridge: float | Sequence[float] = (0.3, 0.1, 1.0),
        token_bias: bool = True,
        smoothing: float = 3.0,
        passes: int = 1,
        held_out_tokens: int = 1536,
        store: str | os.PathLike[str] | None = None,
        store_bytes: int = 2**30,
        block_elements: int = BLOCK_ELEMENTS,
    ) -> None:
        super().__init__(output)
        for name, number in (("passes", passes), ("block_elements", block_elements)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        if not smoothing > 0:
            raise ValueError(f"smoothing must be above 0, got {smoothing}.")
        if store is not None and passes == 1:
            raise ValueError("store keeps hidden states for further passes: give passes=2 or more with it.")
        self.widths = (*key_widths, output.width)
        self.in_features = sum(self.widths)
        self.normalize = normalize or len(self.widths) > 1
        self.candidates = Candidates(as_values(step), as_values(key_ridge), as_values(value_ridge))
        if self.candidates.number and held_out_tokens < 1:
            raise ValueError(
                "held_out_tokens must be at least 1 where step, key_ridge or value_ridge are to be chosen; or give "
                "one number for each."
            )
        self.passes = passes
        self.held_out_tokens = held_out_tokens if self.candidates.number else 0
        self.block_elements = block_elements
        self._store = TokenStore(store_bytes, store) if passes > 1 else None
        self.reset()
        dtype = torch.promote_types(output.module.weight.dtype, torch.float32)
        self.smoothing = smoothing
        self.register_buffer("weight", torch.zeros(output.width, self.in_features, dtype=dtype, device=output.device))
        self.register_buffer("offset", torch.zeros(output.width, dtype=dtype, device=output.device))
        bias = torch.zeros(output.vocabulary, dtype=dtype, device=output.device) if token_bias else None
        self.register_buffer("token_bias", bias)

    # ------------------------------------------------------------------ learning

    def reset(self) -> None:
        """Forget every token seen; what was solved stays until the next :meth:`solve`."""
        self._sums = self._no_sums()
        self._held = LatestTokens(self.held_out_tokens)
        self._faults = FaultLog(self.output.vocabulary)
        if self._store is not None:
            self._store.clear()
        self.solution: ResidualSolution | None = None
        self._steps: tuple[Candidate, ...] = ()  # of the last solve, also after loading

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, keys: Tensor, values: Tensor, weights: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Take in tokens, under the model itself; A changes at the next :meth:`solve`.

        Args:
            keys: Hidden states [B, T, k], or rows [N, k].
            values: Labels [B, T] (predicted from the state before; -100 is left out), or the tokens of the rows [N].
            weights: Optional, one non-negative weight for each label.
            positions: Of no account: sums know no order.

        Raises:
            ValueError: For NaN or infinite states, tokens out of the vocabulary, and shapes that do not fit. On the
                CPU nothing of the bad batch has been taken in; elsewhere the next :meth:`solve` says so, or every 64th
                batch.
        """
        self._check_width(keys)
        pairs, row_weights = self._pairs(keys, values, weights)
        rows = pairs.keys(keys) if keys.ndim == 3 else keys
        targets = self._checked_tokens(pairs.targets)
        if row_weights is None:
            row_weights = torch.ones(len(targets))
        row_weights = row_weights.to(device=rows.device, dtype=torch.float32)
        targets = targets.to(rows.device)
        if len(rows):
            self._faults.check(rows, targets)
            leaving = self._held.push(rows, targets.clamp(0, self.output.vocabulary - 1), row_weights)
            if leaving is not None:
                self._add(self._sums, *leaving)
                if self._store is not None:
                    self._store.add(*leaving)

    def _no_sums(self) -> ResidualSums:
        return ResidualSums(self.in_features + self.output.width, self.output.vocabulary)

    def _add(self, sums: ResidualSums, keys: Tensor, targets: Tensor, weights: Tensor, at: Point | None = None) -> None:
        """Add rows to sums, with r, probabilities and loss at a point, or under the model itself."""
        features, hidden = self._features(keys), self._hidden(keys)
        bias = None
        if at is not None:
            hidden, bias = at.moved(hidden, features), at.bias
        gradient, loss, expected = self.output.gradient(hidden, targets, self.block_elements, bias, weights)
        both = torch.cat([features.to(gradient), gradient], 1)
        sums.update(both, loss, targets.to(gradient.device), weights.to(gradient.device), expected)

    def forget(self) -> None:
        """Set A, a and b to zero."""
        self._publish(self._origin())

    def merge(self, other: ResidualFastWeights) -> None:
        """Take in what another layer of the same model has seen.

        Its held-out tokens are added to the sums here, unless this layer holds none.
        """
        self._check_like(other)
        theirs = other._sums
        if other._held.size:
            if self._held.size:
                theirs = theirs + other._sums_of(other._held.rows())
            else:
                self._held.load_state_dict(other._held.state_dict())
        if other._store is not None and self._store is not None:
            for part in other._store:
                self._store.add(*part)
        self._sums = self._sums + theirs

    def subtract(self, other: ResidualFastWeights) -> None:
        """Forget what another layer of the same model has seen, all of which this one has seen too.

        Tokens held out here go into the sums first, and are forgotten as tokens: the step and the ridges of the last
        solve are used from then on, the most cautious candidates where there was none.

        Raises:
            ValueError: Where the other has seen more, or where tokens are stored for further passes.
        """
        self._check_like(other)
        if self._store is not None:
            raise ValueError("With passes above 1 tokens are stored one by one; they cannot be subtracted. Learn anew.")
        whole, theirs = self._everything(), other._everything()
        self._sums = whole - theirs
        self._held = LatestTokens(0)

    def _check_like(self, other: ResidualFastWeights) -> None:
        mine, theirs = ((s.widths, s.normalize, s.passes > 1) for s in (self, other))
        if mine != theirs:
            raise ValueError(f"These layers have other keys (widths, normalized, several passes): {mine} and {theirs}.")

    def _everything(self) -> ResidualSums:
        return self._sums + self._sums_of(self._held.rows()) if self._held.size else self._sums

    def _sums_of(self, rows: Rows, at: Point | None = None) -> ResidualSums:
        sums = self._no_sums()
        self._add(sums, *rows, at=at)
        return sums

    def reduce(self, add: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Replace what this process has seen by what all have seen.

        Args:
            add: Sums a tensor over processes, out of place.
            gather: Collects a tensor of one shape and dtype from every process.

        Raises:
            ValueError: On every process, where one holds bad rows; with several passes, whose tokens are not shared.
        """
        device = self.output.device
        processes = len(gather(torch.zeros((), device=device)))
        if self._store is not None and processes > 1:
            raise ValueError("passes above 1 need all tokens in one process: use one device, or passes=1.")
        surplus = self._held.released(self.held_out_tokens // processes)
        if surplus is not None:
            self._add(self._sums, *surplus)
        self._sums = self._sums.reduced(add, gather, device)
        like = torch.empty(0, self.in_features, dtype=self.output.module.weight.dtype, device=device)
        self._held.gather(gather, like)

    @property
    def rows(self) -> int:
        """Tokens seen since the last :meth:`reset`, held-out ones included."""
        return self._sums.rows + self._held.size

    # ------------------------------------------------------------------ solving

    @torch.inference_mode(False)
    @torch.no_grad()
    def solve(self) -> ResidualSolution:
        """Choose the candidates and set A, a and b.

        Raises:
            RuntimeError: Where no token was seen.
        """
        self._faults.verify()
        if not self.rows:
            raise RuntimeError("No next-token pair was seen: call learn(...) or update(keys, labels) before solving.")
        started = time.perf_counter()
        choice_seconds = 0.0
        last = self._steps
        older, held = self._to_choose_on()
        # From the tokens outside the held-out slice, on which the choices are made, and from all.
        point = result = self._origin()
        candidates, steps = self.candidates, []
        before = after = None
        for number in range(self.passes):
            at = point if number else None
            sums = self._sums if at is None else self._sums_at(at)
            if older is not None:
                sums = sums + self._sums_of(older, at)
            held_sums = None
            if held is not None:
                held_sums = self._sums_of(held, at)
                now = held_sums.loss
                before, after = (now, now) if number == 0 else (before, now)
            if held is None or not sums.rows:
                chosen = last[number] if number < len(last) else candidates.cautious
            else:
                choosing = time.perf_counter()
                curvature, base = self._curvature(sums), point
                chosen, loss = candidates.best(lambda c: self._loss(held, base + curvature.step(c)))  # noqa: B023
                choice_seconds += time.perf_counter() - choosing
                if after is None or not loss < after:
                    break
                after = loss
            steps.append(chosen)
            whole = sums if held_sums is None else sums + held_sums
            result = point + self._curvature(whole).step(chosen)
            if number + 1 < self.passes:
                point = result if held_sums is None or not sums.rows else point + curvature.step(chosen)
                candidates = self._further(candidates, chosen)
        self._publish(result)
        self._steps = tuple(steps)
        self.solution = ResidualSolution(self._steps, before, after, choice_seconds, time.perf_counter() - started)
        return self.solution

    def _to_choose_on(self) -> tuple[Rows | None, Rows | None]:
        """Of the tokens held out those that are too many to choose on, and the others."""
        if not self._held.size:
            return None, None
        older, latest = self._held.parted(self.rows // _SHARE)
        return (older if len(older[1]) else None), (latest if len(latest[1]) else None)

    def _origin(self) -> Point:
        bias = None if self.token_bias is None else torch.zeros_like(self.token_bias, dtype=torch.float64)
        return Point(torch.zeros_like(self.weight, dtype=torch.float64), self.offset.double() * 0, bias)

    def _publish(self, point: Point) -> None:
        self.weight, self.offset = point.weight.to(self.weight), point.offset.to(self.offset)
        if self.token_bias is not None and point.bias is not None:
            self.token_bias = point.bias.to(self.token_bias)

    def _curvature(self, sums: ResidualSums) -> Curvature:
        return Curvature(sums, self.in_features, None if self.token_bias is None else self.smoothing)

    def _further(self, candidates: Candidates, chosen: Candidate) -> Candidates:
        """What the next pass chooses from."""
        ridges: tuple[float, ...] = (chosen.key_ridge,)
        if len(candidates.key_ridge) > 1:
            ridges = tuple(chosen.key_ridge * growth for growth in _GROWTH)
        return replace(candidates, key_ridge=ridges, value_ridge=(chosen.value_ridge,))

    def _sums_at(self, point: Point) -> ResidualSums:
        assert self._store is not None
        sums = self._no_sums()
        for part in self._store:
            self._add(sums, *part, at=point)
        return sums

    def _loss(self, rows: Rows, at: Point) -> float:
        """Mean loss of rows at a point, nats a token."""
        keys, targets, weights = rows
        hidden = at.moved(self._hidden(keys), self._features(keys))
        loss = self.output.loss(hidden, targets, self.block_elements, at.bias).to(torch.float64)
        weights = weights.to(loss)
        return float((loss * weights).sum() / weights.sum())

    # ------------------------------------------------------------------ predicting

    def forward(self, keys: Tensor) -> Tensor:
        """Hidden states h + A k(h) + a [..., d] of keys [..., k], in their dtype; h itself before the first solve."""
        self._check_width(keys)
        features = self._features(keys)
        hidden = self._hidden(keys)
        return Point(self.weight, self.offset, None).moved(hidden, features).to(hidden.dtype)

    def _hidden(self, keys: Tensor) -> Tensor:
        return keys[..., -self.output.width :]

    def _features(self, keys: Tensor) -> Tensor:
        """k(h), at least float32."""
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        if not self.normalize:
            return keys
        return torch.cat([F.normalize(part, dim=-1) for part in keys.split(self.widths, dim=-1)], -1)

    # ------------------------------------------------------------------ state

    def learned_state(self) -> dict[str, Tensor]:
        """Sums, held-out and stored tokens, flat: what is needed to go on learning."""
        self._faults.verify()
        parts = {"sums": self._sums.state_dict(), "held_out": self._held.state_dict()}
        if self._store is not None:
            parts["store"] = self._store.state_dict()
        parts["solution"] = {"steps": torch.tensor([astuple(s) for s in self._steps], dtype=torch.float64)}
        return {f"{part}.{name}": t for part, state in parts.items() for name, t in state.items()}

    def load_learned_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`learned_state`."""
        parts: dict[str, dict[str, Tensor]] = {"sums": {}, "held_out": {}, "store": {}, "solution": {}}
        for name, t in state.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = t.to(self.output.device) if t.ndim else t
        if not parts["sums"] or not parts["held_out"] or (self._store is not None and not parts["store"]):
            raise ValueError(f"Not a state of ResidualFastWeights(passes={self.passes}): it holds {sorted(state)}.")
        sums = self._no_sums()
        sums.load_state_dict(parts["sums"])
        self._sums = sums
        self._held.load_state_dict(parts["held_out"])
        self._steps = tuple(Candidate(*row) for row in parts["solution"]["steps"].tolist())
        if self._store is not None:
            self._store.load_state_dict(parts["store"])

    # ------------------------------------------------------------------ reporting

    @property
    def bytes_to_predict(self) -> int:
        """Bytes of A, a and b."""
        return sum(t.numel() * t.element_size() for t in self._solved)

    @property
    def bytes_to_update(self) -> int:
        """Bytes of the sums (packed), of the held-out and of the stored tokens."""
        store = 0 if self._store is None else self._store.num_bytes
        return self._sums.num_bytes + self._held.num_bytes + store

    @property
    def num_solved(self) -> int:
        """Numbers in A, a and b."""
        return sum(t.numel() for t in self._solved)

    @property
    def _solved(self) -> list[Tensor]:
        return [self.weight, *(() if self.token_bias is None else (self.offset, self.token_bias))]

    def figures(self) -> dict[str, float]:
        """Figures of the last solve by the names under which they are logged; perplexities are of held-out tokens."""
        solution = self._last_solution()
        found: dict[str, float] = {
            "tokens": self.rows,
            "held_out_tokens": self._held.size,
            "passes": len(solution.steps),
        }
        if self._store is not None:
            found["stored_tokens"] = self._store.tokens
        if solution.steps:
            step = solution.steps[-1]
            found |= {"step": step.step, "key_ridge": step.key_ridge, "value_ridge": step.value_ridge}
        if solution.loss_before is not None and solution.loss_after is not None:
            found["perplexity_before"] = perplexity(solution.loss_before)
            found["perplexity_after"] = perplexity(solution.loss_after)
        found |= {"choice_seconds": solution.choice_seconds, "solve_seconds": solution.solve_seconds}
        return {name: float(value) for name, value in found.items()}

    def summary(self) -> str:
        """The steps, and the perplexity of the held-out tokens before and after."""
        solution = self._last_solution()
        steps = "; ".join(map(str, solution.steps)) or "no step made the held-out tokens likelier"
        if solution.loss_before is None or solution.loss_after is None:
            return f"residual, {steps}"
        before, after = perplexity(solution.loss_before), perplexity(solution.loss_after)
        return f"residual, {steps}; held-out perplexity {before:.2f} to {after:.2f}"

    def _last_solution(self) -> ResidualSolution:
        if self.solution is None:
            raise RuntimeError("The layer was not solved in this process: call solve().")
        return self.solution

    def extra_repr(self) -> str:
        """In the manner of nn.Linear."""
        return f"in_features={self.in_features}, normalize={self.normalize}, passes={self.passes}"


@dataclass(frozen=True, eq=False)
class Point:
    """Where the model is: A [d, k], a [d] and b [V] (None without a bias for tokens)."""

    weight: Tensor
    offset: Tensor
    bias: Tensor | None

    def moved(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Hidden states [..., d] moved by what their features [..., k] say, in the features' dtype."""
        return hidden.to(features) + F.linear(features, self.weight.to(features), self.offset.to(features))

    def __add__(self, other: Point) -> Point:
        bias = None if self.bias is None or other.bias is None else self.bias + other.bias
        return Point(self.weight + other.weight, self.offset + other.offset, bias)


class Curvature:
    """The sums in the bases in which both factors of the Fisher information are diagonal.

    Args:
        sums: Of keys and gradients.
        width: Of keys.
        smoothing: Of the bias for tokens; None for no bias, and sums that are not centred.
    """

    def __init__(self, sums: ResidualSums, width: int, smoothing: float | None) -> None:
        statistics = sums.statistics
        gram, count = statistics.gram, statistics.count
        self.mean = torch.zeros_like(gram[0, :width])
        self.bias = None
        if smoothing is not None:
            mean = statistics.key_sum / count
            gram = gram - count * torch.outer(mean, mean)
            self.mean = mean[:width]
            self.bias = ((sums.observed + smoothing) / (sums.expected + smoothing)).log()
        self.key_values, self.key_basis = torch.linalg.eigh(gram[:width, :width])
        self.gradient_values, self.gradient_basis = torch.linalg.eigh(gram[width:, width:] / count)
        self.mixed = self.gradient_basis.T @ gram[width:, :width] @ self.key_basis

    def step(self, candidate: Candidate) -> Point:
        """The step A = s (F + f I)^-1 C^T (G + g I)^-1, a = -A times the mean key, and b; float64."""
        left = _damped(self.gradient_values, candidate.value_ridge)
        right = _damped(self.key_values, candidate.key_ridge)
        scaled = self.mixed / (left[:, None] * right)
        weight = candidate.step * (self.gradient_basis @ scaled @ self.key_basis.T)
        return Point(weight, -weight @ self.mean, self.bias)


def _damped(values: Tensor, ridge: float) -> Tensor:
    """Eigenvalues plus a ridge relative to the largest; where all are zero, so is what is divided."""
    largest = values[-1].where(values[-1] > 0, 1.0)
    return values.clamp_min(0) + ridge * largest
