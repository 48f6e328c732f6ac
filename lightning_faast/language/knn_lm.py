"""KNNLM: a language model interpolated with nearest neighbors among the tokens it has read."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_faast.associative.bank import Bank
from lightning_faast.data.extras import require
from lightning_faast.language.candidates import as_values, perplexity
from lightning_faast.language.latest import LatestTokens, Rows
from lightning_faast.language.learner import HiddenLearner
from lightning_faast.language.nearest import nearest
from lightning_faast.language.output import OutputLayer

#: Temperatures tried where none is given, in terms of the mean squared distance of held-out states to their neighbors.
_TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_STORED = {"float32": torch.float32, "float16": torch.float16}
#: One token in so many is held out, at most.
_SHARE = 5
#: Logits whose log-sum-exp is taken at a time, at most.
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True)
class KNNSolution:
    """What the choice found.

    Attributes:
        interpolation: Share of the neighbors' vote; 0 where no share made the held-out tokens likelier.
        temperature: By which squared distances are divided.
        loss_before: Mean negative log-likelihood of the held-out tokens without neighbors, nats; None where both
            numbers were given.
        loss_after: The same with them.
        choice_seconds: Time of the choice, the search of the held-out tokens' neighbors included.
        solve_seconds: All of the solve.
    """

    interpolation: float
    temperature: float
    loss_before: float | None
    loss_after: float | None
    choice_seconds: float
    solve_seconds: float


class KNNLM(HiddenLearner):
    r"""p(y) = (1 - l) p_LM(y) + l p_kNN(y), as Khandelwal et al. (2020).

    The datastore holds the final hidden state of every token read as a key and the token after it as its value.
    With squared Euclidean distances D of the k nearest keys (exact, by faiss),

    .. math:: p_{kNN}(y) \propto \sum_{i \le k,\, y_i = y} \exp(-D_i / t) .

    l and t are chosen by the loss on the latest tokens (:class:`~lightning_faast.language.latest.LatestTokens`), a
    fifth of all at most, which then enter the datastore too. It is kept on the CPU whatever device the model is on,
    and searched there.

    :meth:`forward` gives hidden states, as any layer before the output layer; what neighbors say is added to the logits
    by :meth:`adjusted`.

    Args:
        output: The model's output layer.
        base: A layer of fast weights beneath, whose hidden states give p_LM; it learns the same tokens but those held
            out here, until newer ones come. Keys of the datastore are the model's own final states.
        k: Neighbors.
        temperature: t, or several to choose from; where not given, multiples of the mean squared distance.
        interpolation: l, or several to choose from.
        max_rows: Tokens kept at most, a uniform sample of those seen; all where None.
        dtype: In which keys are stored, ``"float32"`` or ``"float16"``.
        held_out_tokens: Tokens held out at most; none are where nothing is to be chosen.
        seed: Another seed keeps other tokens.

    Attributes:
        solution: :class:`KNNSolution` of the last solve in this process, else None.

    Raises:
        ImportError: Where faiss is not installed.
        ValueError: For a model that bounds its logits.

    Example:
        >>> import torch
        >>> from lightning_faast.language import KNNLM, OutputLayer
        >>> hidden, tokens = torch.randn(8, 40, 16), torch.randint(50, (8, 40))
        >>> layer = KNNLM(OutputLayer(torch.nn.Linear(16, 50)), k=4, temperature=1.0, interpolation=0.5)
        >>> layer = layer.fit(hidden, tokens)
        >>> bool((layer.predict(hidden[:, :-1]) == tokens[:, 1:]).all())
        True
    """

    def __init__(
        self,
        output: OutputLayer,
        base: HiddenLearner | None = None,
        *,
        k: int = 64,
        temperature: float | Sequence[float] | None = None,
        interpolation: float | Sequence[float] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        max_rows: int | None = None,
        dtype: str = "float32",
        held_out_tokens: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__(output)
        require("faiss", "language")
        if output.softcap is not None:
            raise ValueError(
                f"The model bounds its logits by {output.softcap}; behind that, nothing given as logits can make a "
                "mixture of probabilities. Neighbors need a model without final_logit_softcapping."
            )
        self.temperatures = None if temperature is None else as_values(temperature)
        self.interpolations = as_values(interpolation)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        if self.temperatures is not None and not all(t > 0 for t in self.temperatures):
            raise ValueError(f"temperature must be above 0, got {temperature}.")
        if not self.interpolations or not all(0 < v < 1 for v in self.interpolations):
            raise ValueError(f"interpolation must be between 0 and 1, got {interpolation}.")
        if dtype not in _STORED:
            raise ValueError(f"dtype must be one of {', '.join(_STORED)}, got {dtype!r}.")
        chosen = self.temperatures is None or len(self.temperatures) > 1 or len(self.interpolations) > 1
        if chosen and held_out_tokens < 1:
            raise ValueError(
                "held_out_tokens must be at least 1 where temperature or interpolation are to be chosen; or give one "
                "number for each."
            )
        self.base = base
        self.in_features = output.width if base is None else base.in_features
        self.k, self.max_rows, self.dtype, self.seed = k, max_rows, _STORED[dtype], seed
        self.held_out_tokens = held_out_tokens if chosen else 0
        self.forget()
        self.reset()

    # ------------------------------------------------------------------ learning

    def reset(self) -> None:
        """Forget every token seen; what was solved stays until the next :meth:`solve`."""
        self._bank = Bank(self.output.vocabulary, self.output.width, self.max_rows, self.seed)
        self._held = LatestTokens(self.held_out_tokens)
        if self.base is not None:
            self.base.reset()
        self.solution: KNNSolution | None = None

    def forget(self) -> None:
        """Predict without neighbors, and without what the layer beneath has learned."""
        self.interpolation, self.temperature = 0.0, 1.0
        # The tokens held out are a table of their own: joining the two would copy the whole datastore.
        self._parts = [self._empty(), self._empty()]
        if self.base is not None:
            self.base.forget()

    def _empty(self) -> tuple[Tensor, Tensor]:
        return torch.empty(0, self.output.width, dtype=self.dtype), torch.empty(0, dtype=torch.int64)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, keys: Tensor, values: Tensor, weights: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Take in tokens; neighbors are looked for among them after the next :meth:`solve`.

        Args:
            keys: Hidden states [B, T, k], or rows [N, k].
            values: Labels [B, T] (predicted from the state before; -100 is left out), or the tokens of the rows [N].
            weights: Not taken: a datastore remembers tokens as they are.
            positions: Of no account.

        Raises:
            ValueError: For NaN or infinite states, tokens out of the vocabulary, shapes that do not fit, and weights.
        """
        if weights is not None:
            raise ValueError("KNNLM remembers tokens as they are and takes no weights.")
        self._check_width(keys)
        values = values.cpu()  # the datastore is there, and so are the pairs selected
        pairs, _ = self._pairs(keys, values, None)
        tokens = self._checked_tokens(pairs.targets)
        rows = pairs.keys(keys) if keys.ndim == 3 else keys
        if not bool(rows.isfinite().all()):
            raise ValueError(f"keys hold NaN or infinite values, keys {tuple(keys.shape)}. Nothing was taken in.")
        self._refuse_overflow(rows)
        self._take(self._held.push(rows, tokens, torch.ones(len(tokens))))

    def _take(self, leaving: Rows | None) -> None:
        """Keep rows for good that were held out, and have the layer beneath learn them."""
        if leaving is None:
            return
        keys, tokens, _ = leaving
        self._bank.update(self._stored(keys), tokens)
        if self.base is not None:
            self.base.update(keys, tokens)

    def _stored(self, rows: Tensor) -> Tensor:
        """Final states [N, d] as they are kept, of keys [N, k]."""
        return self._final(rows).to("cpu", self.dtype)

    def _refuse_overflow(self, rows: Tensor) -> None:
        final = self._final(rows)
        if self.dtype == torch.float16 and bool((final.abs() > torch.finfo(torch.float16).max).any()):
            raise ValueError(
                f"A hidden state holds {float(final.abs().max()):g}, beyond float16: use dtype='float32' for the store."
            )

    def _final(self, keys: Tensor) -> Tensor:
        return keys[..., -self.output.width :]

    def merge(self, other: KNNLM) -> None:
        """Take in what another layer of the same model has seen; its held-out tokens enter the datastore here."""
        if (self.base is None) != (other.base is None):
            raise ValueError("One of these layers has a layer beneath, and the other has none.")
        if self.base is not None:
            self.base.merge(other.base)  # type: ignore[operator]
        if len(other._bank):
            self._bank.update(*other._bank.joined())
        if other._held.size:
            keys, tokens, _ = other._held.rows()
            self._bank.update(self._stored(keys), tokens)

    def subtract(self, other: KNNLM) -> None:
        """Refused: which of the tokens stored another layer has seen is not known."""
        raise ValueError("A datastore cannot subtract: tokens are stored one by one. Learn anew without them.")

    def reduce(self, add: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Replace what this process has seen by what all have seen; as :meth:`Learner.reduce`."""
        device = self.output.device

        def gather_here(t: Tensor) -> list[Tensor]:  # tensors travel on the model's device, and are kept on the CPU
            return [part.cpu() for part in gather(t.to(device))]

        processes = len(gather(torch.zeros((), device=device)))
        self._take(self._held.released(self.held_out_tokens // processes))
        self._bank.reduce(gather_here, torch.device("cpu"))
        like = torch.empty(0, self.in_features or 0, dtype=self.output.module.weight.dtype, device=device)
        self._held.gather(gather, like)
        if self.base is not None:
            self.base.reduce(add, gather)

    @property
    def rows(self) -> int:
        """Tokens seen since the last :meth:`reset`, held-out ones included."""
        return self._bank.seen + self._held.size

    # ------------------------------------------------------------------ solving

    @torch.inference_mode(False)
    @torch.no_grad()
    def solve(self) -> KNNSolution:
        """Choose the temperature and the interpolation, and publish the datastore.

        Raises:
            RuntimeError: Where no token was seen, or there is something to choose and no token to choose by.
        """
        self._take(self._held.released(self.rows // _SHARE))
        if not len(self._bank):
            raise RuntimeError("No next-token pair was seen: call learn(...) or update(keys, labels) before solving.")
        started = time.perf_counter()
        store = self._bank.joined()
        if self.base is not None:
            self.base.solve()
        before = after = None
        choosing = time.perf_counter()
        if not self.held_out_tokens:
            assert self.temperatures is not None
            chosen = self.interpolations[0], self.temperatures[0]
            held = self._empty()
        elif not self._held.size:
            raise RuntimeError(
                "Too few tokens were seen to hold one out, by which temperature and interpolation are chosen: learn "
                "more, or give one number for each."
            )
        else:
            keys, tokens, _ = self._held.rows()
            chosen, before, after = self._choose(keys, tokens, store)
            held = self._stored(keys), tokens.cpu()
        choice_seconds = time.perf_counter() - choosing
        self.interpolation, self.temperature = chosen
        self._parts = [store, held]
        seconds = time.perf_counter() - started
        self.solution = KNNSolution(self.interpolation, self.temperature, before, after, choice_seconds, seconds)
        return self.solution

    def _choose(
        self, keys: Tensor, tokens: Tensor, store: tuple[Tensor, Tensor]
    ) -> tuple[tuple[float, float], float, float]:
        """Interpolation and temperature of lowest loss on held-out rows, the loss without neighbors, and with."""
        tokens = tokens.cpu()
        losses = self.output.loss(self(keys), tokens, token_bias=self._beneath)
        log_model = -losses.to("cpu", torch.float64)[:, None]
        distances, found = nearest(self._final(keys), [store], self.k)
        distances, agrees = distances.to(torch.float64), found == tokens[:, None]
        temperatures = self.temperatures
        if temperatures is None:
            mean = float(distances.mean().clamp_min(torch.finfo(torch.float32).tiny))
            temperatures = tuple(mean * factor for factor in _TEMPERATURES)
        shares = torch.tensor(self.interpolations, dtype=torch.float64)
        before = best = -float(log_model.mean())
        chosen = 0.0, temperatures[0]
        for temperature in temperatures:
            log_votes = ((-distances / temperature).softmax(1) * agrees).sum(1, keepdim=True).log()
            losses = -torch.logaddexp(log_model + (1 - shares).log(), log_votes + shares.log()).mean(0)
            lowest, at = losses.min(0)
            if float(lowest) < best:
                best, chosen = float(lowest), (self.interpolations[int(at)], temperature)
        return chosen, before, best

    # ------------------------------------------------------------------ predicting

    @property
    def changes_logits(self) -> bool:
        """Always."""
        return True

    @property
    def _beneath(self) -> Tensor | None:
        return None if self.base is None else self.base.token_bias

    def forward(self, keys: Tensor) -> Tensor:
        """Hidden states [..., d] of keys [..., k], from the layer beneath where there is one; the vote is no part."""
        self._check_width(keys)
        return keys if self.base is None else self.base(keys)

    def adjusted(self, logits: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
        """Logits whose softmax is the mixture, of the logits of hidden states.

        Softmax does not see a constant, so the logits of all but the neighbors' tokens stay what they are.

        Args:
            logits: [..., V], before ``scale``; changed in place where no gradient is wanted.
            keys: [..., k].
            scale: By which logits are multiplied afterwards.
        """
        if self.base is not None:
            logits = self.base.adjusted(logits, keys, scale)
        if self.interpolation == 0 or not logits.numel():
            return logits
        tokens, votes = self._votes(keys)
        tokens, votes = tokens.to(logits.device), votes.to(logits.device)
        wide = torch.promote_types(logits.dtype, torch.float32)
        here = logits.gather(-1, tokens).to(wide) * scale
        odds = self.interpolation / (1 - self.interpolation)
        voted = (votes.to(wide) * odds).log() + _log_sum_exp(logits, scale)[..., None]
        new = (torch.logaddexp(here, voted) / scale).to(logits.dtype)
        return logits.scatter(-1, tokens, new) if logits.requires_grad else logits.scatter_(-1, tokens, new)

    @torch.compiler.disable
    @torch.no_grad()
    def _votes(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [..., k] of the neighbors and p_kNN [..., k] of each; a token that comes twice has it at both."""
        rows = self._final(keys)
        distances, tokens = nearest(rows.reshape(-1, rows.shape[-1]), self._parts, self.k)
        tokens, order = tokens.sort(1)
        votes = (-distances / self.temperature).softmax(1).gather(1, order)
        group = torch.zeros_like(tokens)
        group[:, 1:] = (tokens[:, 1:] != tokens[:, :-1]).cumsum(1)
        votes = torch.zeros_like(votes).scatter_add_(1, group, votes).gather(1, group)
        shape = (*rows.shape[:-1], tokens.shape[1])
        return tokens.view(shape), votes.view(shape)

    @torch.no_grad()
    def loss(self, keys: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood [N] in nats of targets [N] after keys [N, k]; never holds [N, V]."""
        lm = -self.output.loss(self(keys), targets, token_bias=self._beneath)
        if self.interpolation == 0:
            return -lm
        tokens, votes = self._votes(keys)
        agrees = tokens == targets.cpu()[:, None]
        vote = votes.masked_fill(~agrees, 0).amax(1).to(lm)
        share = torch.tensor(self.interpolation, dtype=lm.dtype, device=lm.device)
        return -torch.logaddexp(lm + (1 - share).log(), vote.log() + share.log())

    @torch.no_grad()
    def predict(self, keys: Tensor) -> Tensor:
        """The most likely next tokens [...] of keys [..., k]."""
        return self.adjusted(self.output.logits(self(keys)), keys).argmax(-1)

    @torch.no_grad()
    def predict_proba(self, keys: Tensor) -> Tensor:
        """Probabilities [..., V] of the next token, of keys [..., k]."""
        return self.adjusted(self.output.logits(self(keys)), keys).softmax(-1)

    # ------------------------------------------------------------------ state

    #: The datastore is no buffer: it stays on the CPU and in its dtype wherever the model is moved.
    _names = ("keys", "tokens", "held_keys", "held_tokens", "mixture")
    #: Entries of the state_dict that have a row for every token.
    row_tensors = frozenset(_names[:4])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        mixture = torch.tensor([self.interpolation, self.temperature], dtype=torch.float64)
        values = (*self._parts[0], *self._parts[1], mixture)
        destination.update({prefix + name: t for name, t in zip(self._names, values, strict=True)})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *args: Any
    ) -> None:
        given = {name: state_dict.pop(prefix + name, None) for name in self._names}
        absent = [prefix + name for name, t in given.items() if t is None]
        missing.extend(absent)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)
        if not absent:
            keys, tokens, held_keys, held_tokens, mixture = (given[name].detach().cpu() for name in self._names)
            if keys.shape[1:] != (self.output.width,) or keys.dtype != self.dtype:
                args[1].append(
                    f"keys are {keys.dtype} {tuple(keys.shape)}, expected {self.dtype} [N, {self.output.width}]"
                )
                return
            self._parts = [(keys, tokens), (held_keys, held_tokens)]
            self.interpolation, self.temperature = mixture.tolist()

    def learned_state(self) -> dict[str, Tensor]:
        """The tokens seen, flat: what is needed to go on learning."""
        parts = {"bank": self._bank.state_dict(), "held_out": self._held.state_dict()}
        if self.base is not None:
            parts["base"] = self.base.learned_state()
        # Copies: what was published shares its memory with the bank, and a file holds no tensor twice.
        return {f"{part}.{name}": t.clone() for part, state in parts.items() for name, t in state.items()}

    def load_learned_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`learned_state`."""
        parts: dict[str, dict[str, Tensor]] = {"bank": {}, "held_out": {}, "base": {}}
        for name, t in state.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = t
        if not parts["held_out"] or (self.base is None) != (not parts["base"]):
            raise ValueError(f"Not a state of this KNNLM (base={type(self.base).__name__}): it holds {sorted(state)}.")
        self._bank.load_state_dict(parts["bank"])
        self._held.load_state_dict(parts["held_out"])
        if self.base is not None:
            self.base.load_learned_state(parts["base"])

    # ------------------------------------------------------------------ reporting

    @property
    def stored_rows(self) -> int:
        """Tokens among which neighbors are looked for."""
        return sum(len(tokens) for _, tokens in self._parts)

    @property
    def bytes_to_predict(self) -> int:
        """Bytes of the datastore, and of what the layer beneath reads."""
        own = sum(t.numel() * t.element_size() for part in self._parts for t in part)
        return own + (0 if self.base is None else self.base.bytes_to_predict)

    @property
    def bytes_to_update(self) -> int:
        """Bytes of the tokens kept, and of what the layer beneath needs to learn on."""
        own = self._bank.num_bytes + self._held.num_bytes
        return own + (0 if self.base is None else self.base.bytes_to_update)

    @property
    def num_solved(self) -> int:
        """0, or the numbers that the layer beneath solved: a datastore only remembers."""
        return 0 if self.base is None else self.base.num_solved

    def figures(self) -> dict[str, float]:
        """Figures of the last solve by the names under which they are logged; perplexities are of held-out tokens."""
        solution = self._last_solution()
        found = {
            "tokens": self.rows,
            "stored_rows": self.stored_rows,
            "interpolation": solution.interpolation,
            "temperature": solution.temperature,
        }
        if solution.loss_before is not None and solution.loss_after is not None:
            found["perplexity_before"] = perplexity(solution.loss_before)
            found["perplexity_after"] = perplexity(solution.loss_after)
        found |= {"choice_seconds": solution.choice_seconds, "solve_seconds": solution.solve_seconds}
        return {name: float(value) for name, value in found.items()}

    def summary(self) -> str:
        """Neighbors, tokens stored, and what was chosen."""
        solution = self._last_solution()
        beneath = "" if self.base is None else f" over {self.base.summary()}"
        return (
            f"{self.k} nearest neighbors of {self.stored_rows:,} tokens, interpolation {solution.interpolation:g}, "
            f"temperature {solution.temperature:.3g}{beneath}"
        )

    def _last_solution(self) -> KNNSolution:
        if self.solution is None:
            raise RuntimeError("The layer was not solved in this process: call solve().")
        return self.solution

    def extra_repr(self) -> str:
        """In the manner of nn.Linear."""
        return f"in_features={self.in_features}, k={self.k}, max_rows={self.max_rows}, dtype={self.dtype}"


def _log_sum_exp(logits: Tensor, scale: float) -> Tensor:
    """log-sum-exp [...] of scaled logits [..., V], at least float32; in blocks of rows."""
    rows = logits.reshape(-1, logits.shape[-1])
    wide = torch.promote_types(logits.dtype, torch.float32)
    blocks = rows.split(max(1, _BLOCK_ELEMENTS // rows.shape[1]))
    return torch.cat([(scale * block.to(wide)).logsumexp(1) for block in blocks]).view(logits.shape[:-1])
