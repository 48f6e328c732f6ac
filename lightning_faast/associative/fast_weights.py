"""FastWeights: an estimator and a layer whose weights are solved in closed form from one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_faast.associative.batches import rows_of_values
from lightning_faast.associative.learner import Learner
from lightning_faast.associative.processes import reduced
from lightning_faast.associative.regularization import Automatic, LeaveOneOut, Regularization
from lightning_faast.associative.reservoir import Reservoir
from lightning_faast.associative.solution import Solution, Task
from lightning_faast.associative.solver import Rows, Solver
from lightning_faast.associative.statistics import SufficientStatistics

#: Buffers whose sizes an unfitted layer takes from what it loads.
_SIZED = (
    "weight",
    "bias",
    "log_prior",
    "correction_weight",
    "correction_bias",
    "class_embeddings",
    "zero_shot",
)
#: Tasks by their number in the ``task`` buffer; 0 is none yet.
_TASKS = ("", *get_args(Task))


class FastWeights(Learner):
    r"""Fast weights: a linear map from keys to values, solved in closed form from one pass over them.

    Args:
        in_features: Width d of the keys; from the first batch where not given.
        out_features: Number of outputs c; from the values where not given.
        regularization: How much to regularize, :class:`Automatic` where not given.
        readout: ``"discriminant"``, ``"regression"``, or ``"auto"``: the discriminant for class labels (integers,
            one-hot or multi-hot) under a ridge with a bias, regression for everything else.
        bias: Whether a bias is fitted, by exact centring. :class:`PaperRule` never has one.
        normalize: Whether keys are scaled to unit norm first. The layer is then not linear in its input.
        prior: Class prior of the discriminant: ``"frequency"`` (of the training rows), ``"uniform"``, or
            probabilities [c].
        shrink_means: Whether the discriminant's class means are shrunk by empirical Bayes, which helps rare classes.
        correct: Whether the discriminant's logits get a correction from the sample's leave-one-out scores, which
            closes the distance to logistic regression.
        empty_classes: ``"error"``, or ``"mask"``: a class without rows gets probability 0.
        reservoir_size: Rows kept of more than twice as many, for leave-one-out scores (ridge, temperature, correction,
            accuracy); fewer rows are all kept, and 0 switches this off.
        class_embeddings: [c, e], the value of each class. Logits are ``scale`` times the cosine between W x and them.
        scale: Scale of the cosines (CLIP's 100).
        zero_shot: Weights P that predict without any example: [c, d] (or [e, d] with class embeddings), or
            ``"identity"`` where keys and class embeddings share a space, as in CLIP.
        prior_count: N0 of the blend y = (1 - r) P x + r W x, r = N/(N + N0).
        seed: Of the reservoir.

    Attributes:
        weight: W, [c, d] ([e, d] with class embeddings): the exact solution, without temperature.
        bias: b, [c].
        temperature: Scalar; logits = (x W^T + b) / temperature + log_prior + (x B^T + b'), so that their softmax is a
            probability.
        log_prior: [c].
        correction_weight: B, in the shape of W: what the sample adds; zeros where nothing.
        correction_bias: b', [c].
        solution: :class:`Solution` of the last solve in this process, else None.

    Shape:
        - Input: [..., d], any floating dtype.
        - Output: [..., c].

    Example:
        >>> import torch
        >>> from lightning_faast import FastWeights
        >>> keys = torch.randn(300, 16)
        >>> labels = (keys[:, 0] > 0).long() + 2 * (keys[:, 1] > 0).long()
        >>> model = FastWeights().fit(keys[:200], labels[:200])
        >>> model.predict_proba(keys[200:]).shape
        torch.Size([100, 4])
        >>> model.score(keys[200:], labels[200:]) > 0.8
        True

    References:
        FAAST, arXiv 2605.04651; Hastie, Buja and Tibshirani, Penalized Discriminant Analysis, 1995.
    """

    weight: Tensor
    bias: Tensor
    temperature: Tensor
    log_prior: Tensor
    correction_weight: Tensor
    correction_bias: Tensor
    class_embeddings: Tensor | None
    zero_shot: Tensor | None
    blend: Tensor
    task: Tensor

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        regularization: Regularization | None = None,
        readout: Literal["auto", "regression", "discriminant"] = "auto",
        bias: bool = True,
        normalize: bool = False,
        prior: Literal["frequency", "uniform"] | list[float] | Tensor = "frequency",
        shrink_means: bool = True,
        correct: bool = True,
        empty_classes: Literal["error", "mask"] = "error",
        reservoir_size: int = 1000,
        class_embeddings: Tensor | None = None,
        scale: float = 100.0,
        zero_shot: Tensor | Literal["identity"] | None = None,
        prior_count: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if regularization is not None and not isinstance(regularization, Regularization):
            raise TypeError(
                f"regularization must be a Regularization such as GCV() or Ridge(1.0), got {regularization!r}. "
                "Widths are given by name: FastWeights(in_features=..., out_features=...)."
            )
        _check_option("readout", readout, ("auto", "regression", "discriminant"))
        _check_option("empty_classes", empty_classes, ("error", "mask"))
        if isinstance(prior, str):
            _check_option("prior", prior, ("frequency", "uniform"))
        if not prior_count >= 0:
            raise ValueError(f"prior_count must not be negative, got {prior_count}.")
        if prior_count > 0 and zero_shot is None:
            raise ValueError("prior_count blends in zero-shot weights: give zero_shot as well.")
        self.regularization = regularization if regularization is not None else Automatic()
        self.readout = readout
        self.has_bias = bias and self.regularization.allows_bias and class_embeddings is None
        self.normalize = normalize
        self.prior = prior
        self.shrink_means = shrink_means
        self.correct = correct
        self.empty_classes = empty_classes
        self.scale = scale
        self.prior_count = prior_count
        self.reservoir_size = reservoir_size
        self.seed = seed
        self._check_readout(class_embeddings)
        if isinstance(self.regularization, LeaveOneOut) and reservoir_size == 0:
            raise ValueError("LeaveOneOut needs a reservoir: give a reservoir_size above 0, or use GCV().")
        if class_embeddings is not None:
            if class_embeddings.ndim != 2:
                raise ValueError(f"class_embeddings must be [c, e], got {tuple(class_embeddings.shape)}.")
            out_features = _agreed("out_features", out_features, class_embeddings.shape[0])
        if isinstance(zero_shot, str):
            if zero_shot != "identity" or class_embeddings is None:
                raise ValueError("zero_shot must be weights [c, d], or 'identity' beside class_embeddings.")
            zero_shot = torch.eye(class_embeddings.shape[1], dtype=class_embeddings.dtype)
        if zero_shot is not None:
            if zero_shot.ndim != 2:
                raise ValueError(f"zero_shot must be a matrix, got {tuple(zero_shot.shape)}.")
            in_features = _agreed("in_features", in_features, zero_shot.shape[1])
            if class_embeddings is None:
                out_features = _agreed("out_features", out_features, zero_shot.shape[0])
            else:
                _agreed("the width of class_embeddings", class_embeddings.shape[1], zero_shot.shape[0])
        self.in_features = in_features
        self.out_features = out_features
        self._declared = (out_features, in_features)  # what is inferred later is forgotten by reset
        self.reset()
        self._register(class_embeddings, zero_shot)

    def _register(self, class_embeddings: Tensor | None, zero_shot: Tensor | None) -> None:
        self.register_buffer("class_embeddings", None if class_embeddings is None else class_embeddings.clone())
        self.register_buffer("zero_shot", None if zero_shot is None else zero_shot.clone())
        # Sizes may be unknown yet: buffers of no elements until the first solve or load_state_dict.
        d, c = self.in_features or 0, self.out_features or 0
        rows = c if class_embeddings is None else class_embeddings.shape[1]
        self.register_buffer("weight", torch.zeros(rows if d else 0, d))
        self.register_buffer("bias", torch.zeros(rows))
        self.register_buffer("correction_weight", torch.zeros_like(self.weight))
        self.register_buffer("correction_bias", torch.zeros_like(self.bias))
        self.register_buffer("log_prior", torch.zeros(c))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("blend", torch.zeros(()))  # r = N / (N + N0); 0 predicts by the zero-shot weights alone
        self.register_buffer("task", torch.zeros((), dtype=torch.int8))  # an index into _TASKS
        self.fold()

    def _apply(self, *args: Any, **kwargs: Any) -> FastWeights:
        super()._apply(*args, **kwargs)  # another device or dtype: .to(), .half(), a Trainer
        self.fold()
        return self

    def _check_readout(self, class_embeddings: Tensor | None) -> None:
        if self.readout != "discriminant":
            return
        if class_embeddings is not None:
            raise ValueError("class_embeddings are values to regress on: use readout='regression' or 'auto'.")
        if not self.regularization.is_ridge:
            raise ValueError(
                f"readout='discriminant' needs a ridge (Automatic, GCV, Ridge or LeaveOneOut); "
                f"{type(self.regularization).__name__} truncates: use readout='regression'."
            )
        if not self.has_bias:
            raise ValueError("readout='discriminant' needs a bias: use bias=True, or readout='regression'.")

    # ------------------------------------------------------------------ learning: the one-pass protocol

    def reset(self) -> None:
        """Forget every row seen, and sizes that were not declared; the solved weights stay until the next solve."""
        self.statistics = SufficientStatistics(*self._declared)
        self.reservoir = Reservoir(self.reservoir_size, self.seed)
        self.solution: Solution | None = None
        self._stale = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, keys: Tensor, values: Tensor, weights: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Add rows to the statistics and the reservoir; the weights change at the next :meth:`solve`.

        Args:
            keys: [..., d], any floating dtype.
            values: Labels [...], or values [..., c].
            weights: Optional, one non-negative weight a row [...].
            positions: Optional int64 [rows] on the CPU: places of these rows in the whole stream, where several
                processes each see a part.
        """
        self._learn(self._as_rows(keys, values, weights), positions)

    def _learn(self, rows: tuple[Tensor, Tensor, Tensor | None], positions: Tensor | None = None) -> None:
        self.statistics.update(*rows)
        self.reservoir.update(*rows, positions)
        self._stale = True

    def _as_rows(self, keys: Tensor, values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys [N, d] as they are summed, labels [N] (0/1 values [N, 1] for a single output) or values [N, c]."""
        for name, given in (("keys", keys), ("values", values)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}: use torch.as_tensor.")
        if keys.ndim < 2 or not keys.is_floating_point():
            raise ValueError(f"keys must be floating point of shape [..., d], got {keys.dtype} {tuple(keys.shape)}.")
        values = rows_of_values(values.detach(), keys.shape[:-1])
        integer = not (values.is_floating_point() or values.dtype == torch.bool)
        single = self.out_features == 1 and self.class_embeddings is None
        if single and values.ndim == 1:
            values = values[:, None]
        elif not single and values.ndim == 2 and values.shape[1] == 1 and integer:
            values = values[:, 0]
        if weights is not None:
            if weights.shape != keys.shape[:-1]:
                raise ValueError(f"weights must be {tuple(keys.shape[:-1])}, one a row, got {tuple(weights.shape)}.")
            weights = weights.detach().reshape(-1)
        keys = keys.detach().reshape(-1, keys.shape[-1])
        if keys.element_size() == 1:  # float8 has hardly any operation
            keys = keys.to(torch.float32)
        if self.normalize:
            # An all-zero key has no direction. 0/0 makes it NaN, which the statistics refuse by batch.
            keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
            keys = keys / torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
        return keys, values, weights

    @property
    def rows(self) -> int:
        """Rows in the statistics."""
        return self.statistics.rows

    def partial_fit(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> FastWeights:
        """Add rows; :meth:`predict` and its kin solve again when they are next called. Returns itself."""
        self.update(keys, values, weights)
        return self

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> FastWeights:
        """Forget, add rows and solve, by the dual form where N is well under d.

        Args:
            keys: [N, d].
            values: Labels [N] or values [N, c].
            weights: Optional [N].

        Returns:
            Itself.
        """
        self.reset()
        keys, values, weights = self._as_rows(keys, values, weights)
        self._learn((keys, values, weights))
        if weights is None:
            weights = torch.ones(len(keys), dtype=torch.float64)
        self._solve((keys, values, weights))
        return self

    def reduce(self, add: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Replace this process's sums and sample by those of all processes.

        Args:
            add: Sums a tensor over processes, out of place.
            gather: Collects a tensor from every process.

        Raises:
            ValueError: On every process, where one holds bad rows, or rows of another width or kind.
        """
        self.statistics, self.reservoir = reduced(self.statistics, self.reservoir, add, gather, self.weight.device)
        self._stale = self.statistics.rows > 0

    def solve(self) -> Solution:
        """Solve from the statistics, whatever N was.

        Raises:
            RuntimeError: Where no row was seen.
            ValueError: For an empty class, or values that do not fit the read-out.
        """
        rows = None
        if self.reservoir.complete and self.reservoir.seen == self.statistics.rows:
            rows = (self.reservoir.keys, self.reservoir.values, self.reservoir.weights)
        return self._solve(rows)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _solve(self, rows: Rows | None) -> Solution:
        stats, embeddings = self.statistics, self.class_embeddings
        blend = stats.count / (stats.count + self.prior_count) if stats.count > 0 else 0.0

        def outputs(scores: Tensor, keys: Tensor) -> Tensor:
            if embeddings is not None:
                scores = scores @ embeddings.to(scores)
            if self.zero_shot is not None:
                scores = (1 - blend) * F.linear(keys, self.zero_shot.to(keys)) + blend * scores
            return scores if embeddings is None else self._cosines(scores)

        solution = Solver(
            stats,
            self.reservoir,
            self.regularization,
            self.readout,
            self.has_bias,
            self.prior,
            self.shrink_means,
            self.correct,
            self.empty_classes,
            embeds=embeddings is not None,
            outputs=outputs,
        ).solve(rows)
        if embeddings is not None:  # values are rows of E: W_E = E^T W, from the very same sums
            weight = embeddings.to(solution.weight).T @ solution.weight
            solution = replace(solution, weight=weight, bias=weight.new_zeros(len(weight)))
        self._store(solution, blend)
        return solution

    def _store(self, solution: Solution, blend: float) -> None:
        self.in_features, self.out_features = self.statistics.num_features, len(solution.log_prior)
        new = {"weight": solution.weight, "bias": solution.bias, "log_prior": solution.log_prior}
        for name in ("weight", "bias"):
            correction = solution.correction
            new[f"correction_{name}"] = getattr(correction, name) if correction else torch.zeros_like(new[name])
        numbers = {"temperature": solution.temperature, "blend": blend, "task": _TASKS.index(solution.task)}
        for name in (*new, *numbers):  # new tensors: what was read from the old ones keeps its values
            held = getattr(self, name)
            like = self.weight if name in new else held
            value = torch.as_tensor(new.get(name, numbers.get(name)))
            setattr(self, name, value.to(device=held.device, dtype=like.dtype).contiguous())
        self.solution = solution
        self._stale = False
        self.fold()

    def fold(self) -> None:
        """Put temperature, prior, correction and zero-shot blend into the one linear layer that forward applies.

        Done by itself after a solve, ``load_state_dict`` and ``to``; whoever writes into the buffers calls it. The
        result is kept as plain attributes, which are read faster: a prediction costs what an nn.Linear's does.
        """
        weight, bias = self.weight, self.bias
        if self.zero_shot is not None:
            weight = (1 - self.blend) * self.zero_shot.to(weight) + self.blend * weight
            bias = self.blend * bias
        if self.class_embeddings is None:
            weight = weight / self.temperature + self.correction_weight
            bias = bias / self.temperature + self.log_prior + self.correction_bias
        self._folded = (weight, bias)
        self._is_linear = bool(weight.shape[1]) and not self.normalize and self.class_embeddings is None

    # ------------------------------------------------------------------ predicting

    def linear(self) -> tuple[Tensor, Tensor]:
        """Weight [c, d] and bias [c] of the one linear layer that gives the same logits.

        Raises:
            RuntimeError: Where the layer is not linear in its input (unit-norm keys, class embeddings).
        """
        if self.normalize or self.class_embeddings is not None:
            raise RuntimeError(
                "normalize=True and class_embeddings are not linear in the key: keep the FastWeights head."
            )
        return self._folded

    def _cosines(self, embedding: Tensor) -> Tensor:
        assert self.class_embeddings is not None
        directions = F.normalize(self.class_embeddings.to(embedding), dim=-1)
        return self.scale * F.linear(F.normalize(embedding, dim=-1), directions)

    def forward(self, keys: Tensor) -> Tensor:
        """Logits [..., c] of keys [..., d]; outputs themselves where the task is a regression."""
        weight, bias = self._folded
        if keys.dtype != weight.dtype:
            keys = keys.to(weight.dtype)
        if self._is_linear:
            return F.linear(keys, weight, bias)
        if not weight.shape[1]:
            raise RuntimeError("FastWeights is not fitted: call fit(keys, values), or update(...) and solve().")
        if self.normalize:
            keys = F.normalize(keys, dim=-1)
        outputs = F.linear(keys, weight, bias)
        if self.class_embeddings is None:
            return outputs
        return self._cosines(outputs) / self.temperature + self.log_prior

    def _solved_task(self) -> Task:
        if self._stale:
            self.solve()
        if int(self.task):
            return get_args(Task)[int(self.task) - 1]
        if self.zero_shot is None:
            raise RuntimeError("FastWeights is not fitted: call fit(keys, values), or load a fitted state_dict.")
        return "multilabel" if self.out_features == 1 else "classes"

    def _checked(self, keys: Tensor) -> Tensor:
        if not isinstance(keys, Tensor):
            raise TypeError(f"keys must be a torch.Tensor, got {type(keys).__name__}: use torch.as_tensor.")
        if keys.ndim == 0 or keys.shape[-1] != self.in_features:
            raise ValueError(f"keys must be [..., {self.in_features}], as in the fit, got {tuple(keys.shape)}.")
        return keys

    @torch.no_grad()
    def predict(self, keys: Tensor) -> Tensor:
        """Labels [N]; 0/1 decisions [N, c] for multi-hot values ([N] for one column); outputs for a regression."""
        task = self._solved_task()
        logits = self(self._checked(keys))
        if task == "classes":
            return logits.argmax(-1)
        if task == "multilabel":
            return (logits > 0).long().squeeze(-1) if logits.shape[-1] == 1 else (logits > 0).long()
        return logits

    @torch.no_grad()
    def predict_proba(self, keys: Tensor) -> Tensor:
        """Probabilities [N, c]: of classes, or of a one in each column for multi-hot values.

        Raises:
            RuntimeError: For a regression, whose outputs are no probabilities.
        """
        task = self._solved_task()
        if task in ("regression", "distribution"):
            raise RuntimeError(f"predict_proba needs class labels; this was fitted to a {task}. Use predict(keys).")
        logits = self(self._checked(keys))
        return logits.sigmoid() if task == "multilabel" else logits.softmax(-1)

    @torch.no_grad()
    def score(self, keys: Tensor, values: Tensor) -> float:
        """Accuracy (of whole rows for multi-hot values), or R^2 for a regression, as in scikit-learn."""
        task = self._solved_task()
        predicted = self.predict(keys)
        if task == "classes" and values.ndim == predicted.ndim + 1:
            values = values[..., 0] if values.shape[-1] == 1 else values.argmax(-1)
        if values.numel() != predicted.numel() or not values.numel():
            raise ValueError(f"{tuple(values.shape)} values for {tuple(predicted.shape)} predictions.")
        values = values.to(predicted.device).reshape(predicted.shape)
        if task in ("classes", "multilabel"):
            right = predicted == values
            wide = task == "multilabel" and self.out_features != 1
            return float((right.all(-1) if wide else right).double().mean())
        columns = predicted.shape[-1]
        values, predicted = values.reshape(-1, columns).double(), predicted.reshape(-1, columns).double()
        residual = (values - predicted).square().sum(0)
        total = (values - values.mean(0)).square().sum(0)
        constant = torch.where(residual > 0, 0.0, 1.0).to(total)  # scikit-learn's convention
        return float(torch.where(total > 0, 1 - residual / total, constant).mean())

    # ------------------------------------------------------------------ state

    def learned_state(self) -> dict[str, Tensor]:
        """Statistics and reservoir, flat: what is needed to go on learning (not part of ``state_dict``)."""
        parts = {"statistics": self.statistics.state_dict(), "reservoir": self.reservoir.state_dict()}
        return {f"{part}.{name}": t for part, state in parts.items() for name, t in state.items()}

    def load_learned_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`learned_state`."""
        for part in ("statistics", "reservoir"):
            prefix = f"{part}."
            getattr(self, part).load_state_dict(
                {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
            )
        self._stale = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # An unfitted layer takes the sizes of what it loads; a sized one keeps nn.Module's own check.
        errors = args[-1]
        for name in _SIZED:
            loaded, held = state_dict.get(prefix + name), getattr(self, name)
            if loaded is not None and (held is None or held.numel() == 0):
                like = self.temperature
                setattr(self, name, torch.empty_like(loaded, dtype=like.dtype, device=like.device))
        loaded, width = state_dict.get(prefix + "weight"), self.in_features
        if loaded is not None and loaded.numel() and width not in (None, loaded.shape[1]):
            errors.append(f"size mismatch for {prefix}weight: keys of width {loaded.shape[1]}, expected {width}.")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if errors:
            return
        if self.weight.numel():
            self.in_features, self.out_features = self.weight.shape[1], self.log_prior.shape[0]
        self.statistics = SufficientStatistics(self.out_features, self.in_features)
        self.reservoir = Reservoir(self.reservoir_size, self.seed)
        self._stale = False
        self.solution = None
        self.fold()

    @property
    def bytes_to_predict(self) -> int:
        """Bytes of what a prediction reads."""
        used = (*self._folded, self.class_embeddings)
        return sum(t.numel() * t.element_size() for t in used if t is not None)

    @property
    def bytes_to_update(self) -> int:
        """Bytes of what learning on needs: the sums (G as a packed triangle) and the reservoir."""
        return self.statistics.num_bytes + self.reservoir.num_bytes

    @property
    def num_solved(self) -> int:
        """Numbers in W and b."""
        return self.weight.numel() + self.bias.numel() * self.has_bias

    def figures(self) -> dict[str, float]:
        """Figures of the last solve by the names under which they are logged."""
        solution = self._last_solution()
        choice = solution.regularization
        named = {
            "effective_rank": solution.effective_rank,
            "ridge" if choice.kind == "ridge" else "tolerance": choice.value,
            "at_edge": choice.at_edge,
            "temperature": solution.temperature,
            "r_squared": solution.r_squared,
            "rounding_bound": solution.error_bound,
            "leave_one_out_accuracy": solution.leave_one_out_accuracy,
            "leave_one_out_loss": solution.leave_one_out_loss,
        }
        return {name: float(value) for name, value in named.items() if value is not None}

    def summary(self) -> str:
        """Read-out, regularization, effective rank and leave-one-out accuracy."""
        solution = self._last_solution()
        accuracy = solution.leave_one_out_accuracy
        return (
            f"{solution.readout}, {solution.regularization}, effective rank {solution.effective_rank:.0f}; "
            f"leave-one-out accuracy {'n/a' if accuracy is None else f'{accuracy:.3f}'}"
        )

    def _last_solution(self) -> Solution:
        if self.solution is None:
            raise RuntimeError("FastWeights was not solved in this process: call fit(keys, values) or solve().")
        return self.solution

    def extra_repr(self) -> str:
        """In the manner of nn.Linear."""
        parts = [f"in_features={self.in_features}, out_features={self.out_features}", f"{self.regularization}"]
        parts += [f"readout={self.readout!r}", f"bias={self.has_bias}"]
        if self.normalize:
            parts.append("normalize=True")
        return ", ".join(parts)


def _agreed(name: str, given: int | None, found: int) -> int:
    if given not in (None, found):
        raise ValueError(f"{name} is {given}, but class_embeddings or zero_shot have {found}.")
    return found


def _check_option(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {given!r}.")
