"""FastWeights: an estimator and a layer whose weights are solved in closed form from one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_faast.associative import calibration
from lightning_faast.associative.readout import (
    MASKED_LOGIT,
    Discriminant,
    LeaveOneOutScores,
    LinearMap,
    PairedDiscriminants,
    Readout,
    Regression,
)
from lightning_faast.associative.regularization import (
    GCV,
    Choice,
    LeaveOneOut,
    Regularization,
)
from lightning_faast.associative.reservoir import Reservoir
from lightning_faast.associative.spectrum import Spectrum
from lightning_faast.associative.statistics import SufficientStatistics

#: What values mean: labels or one-hot rows (``classes``), soft labels (``distribution``), 0/1 columns (``multilabel``).
Task = Literal["classes", "distribution", "multilabel", "regression"]


@dataclass(frozen=True)
class Solution:
    """What one solve found. All tensors float64.

    Attributes:
        task: What the values were taken for.
        readout: ``"regression"`` or ``"discriminant"``.
        weight: W [c, d], before temperature and prior (of the embedding where values are class embeddings).
        bias: b [c].
        log_prior: [c].
        temperature: Scores are divided by it to become logits.
        temperature_fitted: False where the sample was too small (fewer than 50 rows), or none is kept; the temperature
            is then 3 for a discriminant and 0.2 for a regression on classes, and 1 elsewhere.
        regularization: The chosen value, whether at its grid's edge, and the path (``grid`` and ``scores``).
        effective_rank: Sum of lambda f(lambda): the rank kept by a truncation, the degrees of freedom of a ridge.
        rank: Eigenvalues above the rounding floor.
        rounding_floor: Eigenvalues of the Gram under it are noise.
        error_bound: Bound on the relative error of W from float64 rounding of the sums.
        below_floor: Whether a truncation threshold fell under the rounding floor, which then decided instead.
        shrinkage: k, by which class means n_c/(n_c + k) are shrunk towards their average (discriminant).
        r_squared: Training R^2 of the regression at this regularization; NaN where the values do not vary.
        leave_one_out_accuracy: Estimate of the test accuracy from the training rows; None without a reservoir,
            without classes, or where the leave-one-out scores do not exist.
        leave_one_out_loss: The same for the mean negative log likelihood.
        seconds: Wall time of the solve.
    """

    task: Task
    readout: str
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    log_prior: Tensor = field(repr=False)
    temperature: float
    temperature_fitted: bool
    regularization: Choice
    effective_rank: float
    rank: int
    rounding_floor: float
    error_bound: float
    below_floor: bool
    shrinkage: float
    r_squared: float
    leave_one_out_accuracy: float | None
    leave_one_out_loss: float | None
    seconds: float


class FastWeights(nn.Module):
    r"""Fast weights: a linear map from keys to values, solved in closed form from one pass over them.

    Args:
        in_features: Width d of the keys; from the first batch where not given.
        out_features: Number of outputs c; from the values where not given.
        regularization: How much to regularize, :class:`GCV` where not given.
        readout: ``"discriminant"``, ``"regression"``, or ``"auto"``: the discriminant for class labels (integers,
            one-hot or multi-hot) under a ridge with a bias, regression for everything else.
        bias: Whether a bias is fitted, by exact centring. :class:`PaperRule` never has one.
        normalize: Whether keys are scaled to unit norm first. The layer is then not linear in its input.
        prior: Class prior of the discriminant: ``"frequency"`` (of the training rows), ``"uniform"``, or
            probabilities [c].
        shrink_means: Whether the discriminant's class means are shrunk by empirical Bayes, which helps rare classes.
        empty_classes: ``"error"``, or ``"mask"``: a class without rows gets probability 0.
        reservoir_size: Rows kept for leave-one-out scores (temperature, accuracy); 0 switches them off.
        class_embeddings: [c, e], the value of each class. Logits are ``scale`` times the cosine between W x and them.
        scale: Scale of the cosines (CLIP's 100).
        zero_shot: Weights P that predict without any example: [c, d] (or [e, d] with class embeddings), or
            ``"identity"`` where keys and class embeddings share a space, as in CLIP.
        prior_count: N0 of the blend y = (1 - r) P x + r W x, r = N/(N + N0).
        seed: Of the reservoir.

    Attributes:
        weight: W, [c, d] ([e, d] with class embeddings): the exact solution, without temperature.
        bias: b, [c].
        temperature: Scalar; logits = (x W^T + b) / temperature + log_prior, so that their softmax is a probability.
        log_prior: [c].
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
    class_embeddings: Tensor | None
    zero_shot: Tensor | None
    blend: Tensor

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
        if prior_count < 0:
            raise ValueError(f"prior_count must not be negative, got {prior_count}.")
        if prior_count > 0 and zero_shot is None:
            raise ValueError("prior_count blends in zero-shot weights: give zero_shot as well.")
        self.regularization = regularization if regularization is not None else GCV()
        self.readout = readout
        self.has_bias = bias and self.regularization.allows_bias and class_embeddings is None
        self.normalize = normalize
        self.prior = prior
        self.shrink_means = shrink_means
        self.empty_classes = empty_classes
        self.scale = scale
        self.prior_count = prior_count
        self._check_readout(class_embeddings)
        if isinstance(self.regularization, LeaveOneOut) and reservoir_size == 0:
            raise ValueError("LeaveOneOut needs a reservoir: give a reservoir_size above 0, or use GCV().")

        if class_embeddings is not None:
            if class_embeddings.ndim != 2:
                raise ValueError(f"class_embeddings must be [c, e], got {tuple(class_embeddings.shape)}.")
            out_features = class_embeddings.shape[0] if out_features is None else out_features
            if out_features != class_embeddings.shape[0]:
                raise ValueError(f"{class_embeddings.shape[0]} class_embeddings for {out_features} out_features.")
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("class_embeddings", None if class_embeddings is None else class_embeddings.clone())
        identity = isinstance(zero_shot, str)
        if identity and (zero_shot != "identity" or class_embeddings is None):
            raise ValueError("zero_shot must be weights [c, d], or 'identity' beside class_embeddings.")
        self.zero_shot_identity = identity
        self.register_buffer("zero_shot", zero_shot.clone() if isinstance(zero_shot, Tensor) else None)
        # Sizes may be unknown yet: buffers of no elements until the first solve or load_state_dict.
        d, c = in_features or 0, out_features or 0
        rows = c if class_embeddings is None else class_embeddings.shape[1]
        self.register_buffer("weight", torch.zeros(rows if d else 0, d))
        self.register_buffer("bias", torch.zeros(rows))
        self.register_buffer("log_prior", torch.zeros(c))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("blend", torch.zeros(()))  # r = N / (N + N0); 0 predicts by the zero-shot weights alone
        # What forward applies: temperature and prior folded into one linear layer, so that a prediction costs no more.
        self.register_buffer("_folded_weight", self.weight.clone(), persistent=False)
        self.register_buffer("_folded_bias", self.bias.clone(), persistent=False)
        self.reservoir_size = reservoir_size
        self.seed = seed
        self.reset()

    def _check_readout(self, class_embeddings: Tensor | None) -> None:
        if self.readout != "discriminant":
            return
        if class_embeddings is not None:
            raise ValueError("class_embeddings are values to regress on: use readout='regression' or 'auto'.")
        if not self.regularization.is_ridge:
            raise ValueError(
                f"readout='discriminant' needs a ridge (GCV, Ridge or LeaveOneOut); "
                f"{type(self.regularization).__name__} truncates: use readout='regression'."
            )
        if not self.has_bias:
            raise ValueError("readout='discriminant' needs a bias: use bias=True, or readout='regression'.")

    # ------------------------------------------------------------------ learning: the one-pass protocol

    def reset(self) -> None:
        """Forget every row seen; the solved weights stay until the next solve."""
        self.statistics = SufficientStatistics(self.out_features, self.in_features)
        self.reservoir = Reservoir(self.reservoir_size, self.seed)
        self.solution: Solution | None = None
        self._stale = False

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
        if keys.ndim == 1:
            raise ValueError(f"keys must be [..., d] with at least one row dimension, got {tuple(keys.shape)}.")
        keys = keys.detach().reshape(-1, keys.shape[-1])
        if self.normalize:
            # An all-zero key has no direction. 0/0 makes it NaN, which the statistics refuse by batch.
            keys = keys / torch.linalg.vector_norm(keys, dim=-1, keepdim=True, dtype=torch.float32).to(keys.dtype)
        values = self._as_values(values.detach(), keys.shape[0])
        weights = None if weights is None else weights.reshape(-1)
        self.statistics.update(keys, values, weights)
        self.reservoir.update(keys, values, weights, positions)
        self._stale = True

    def _as_values(self, values: Tensor, rows: int) -> Tensor:
        """Labels [N] or values [N, c]; labels for a single output become 0/1 values."""
        if values.numel() == rows:
            single = self.out_features == 1 and self.class_embeddings is None
            if single or values.is_floating_point() or values.dtype == torch.bool:
                return values.reshape(rows, 1)
            return values.reshape(rows)
        if rows == 0 or values.numel() % rows:
            raise ValueError(f"{rows} keys but values of shape {tuple(values.shape)}: one label or row of values each.")
        return values.reshape(rows, -1)

    def partial_fit(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> FastWeights:
        """Add rows; :meth:`predict` and its kin solve again when they are next called. Returns itself."""
        self.update(keys, values, weights)
        return self

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
        self.update(keys, values, weights)
        self._solve_from((keys.reshape(-1, keys.shape[-1]), values, weights))
        return self

    def reduce(self, add: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Replace this process's sums and sample by those of all processes.

        Args:
            add: Sums a tensor over processes, out of place.
            gather: Collects a tensor from every process.
        """
        keys = self.reservoir.keys if len(self.reservoir) else None
        device = self.statistics.device or torch.device("cpu")
        kinds = gather(
            torch.tensor(
                [-1 if self.statistics.labels is None else int(self.statistics.labels), self.statistics.rows,
                 -1 if keys is None else _FLOATS.index(keys.dtype)],
                device=device,
            )
        )  # fmt: skip
        seen = [k.tolist() for k in kinds if int(k[0]) >= 0]
        if not seen:
            return
        labels, dtype = bool(seen[0][0]), _FLOATS[max(k[2] for k in seen)]
        if not self.statistics.rows:  # this process saw nothing: shapes come from the layer
            assert self.in_features is not None
            assert self.out_features is not None
            self.statistics.allocate(self.in_features, self.out_features, device)
        merged = self.statistics.mapped(add)
        merged.labels, merged.rows = labels, sum(k[1] for k in seen)
        self.statistics = merged
        d = merged.num_features or 0
        columns = () if labels else (merged.value_sum.shape[0],)
        values_dtype = torch.int64 if labels else torch.float64
        empty = {
            "keys": torch.empty(0, d, dtype=dtype, device=device),
            "values": torch.empty(0, *columns, dtype=values_dtype, device=device),
            "weights": torch.empty(0, dtype=torch.float64, device=device),
        }
        if self.reservoir.size:
            self.reservoir = self.reservoir.gathered(gather, empty)
        self._stale = True

    def solve(self) -> Solution:
        """Solve from the statistics, whatever N was.

        Raises:
            RuntimeError: Where no row was seen.
            ValueError: For an empty class, or values that do not fit the read-out.
        """
        rows = None
        if self.reservoir.complete and self.reservoir.seen == self.statistics.rows:
            rows = (self.reservoir.keys, self.reservoir.values, self.reservoir.weights)
        return self._solve_from(rows, normalized=True)

    @torch.no_grad()
    def _solve_from(self, rows: tuple[Tensor, Tensor, Tensor | None] | None, normalized: bool = False) -> Solution:
        start = time.perf_counter()
        stats = self.statistics
        task = self._task()
        self._refuse_empty_classes(task)
        readout_name = self._readout_for(task)
        spectrum = self._decompose(rows, normalized)

        def read_out(choice: Choice) -> Readout:
            if readout_name == "regression":
                return Regression(spectrum, choice)
            if task == "multilabel":
                return PairedDiscriminants(spectrum, choice, stats.value_sum, self._prior_tensor(task))
            return Discriminant(spectrum, choice, stats.class_counts, self._prior_tensor(task), self.shrink_means)

        sampled = len(self.reservoir) > 0 and self.reservoir.seen == stats.rows
        evaluate = (lambda choice: self._loss(self._held_out(read_out(choice)), task)) if sampled else None
        choice = self.regularization.choose(spectrum, evaluate)
        readout = read_out(choice)
        linear = self._as_embedding(readout.linear())
        if task == "multilabel" and readout_name == "regression":
            linear = LinearMap(linear.weight, linear.bias - _DECISION, linear.log_prior)
        if self.empty_classes == "mask" and readout_name == "regression" and task == "classes":
            masked = torch.where(stats.class_counts > 0, 0.0, MASKED_LOGIT)
            linear = LinearMap(linear.weight, linear.bias, masked.to(linear.bias))
        self._store(linear, stats.count)
        loo = self._held_out(readout) if sampled and task in ("classes", "multilabel") else None
        temperature, fitted, accuracy, loss = self._default_temperature(task, readout_name), None, None, None
        if loo is not None and bool((loo.weights > 0).any()):
            multilabel = task == "multilabel"
            fitted = calibration.fit_temperature(loo, multilabel=multilabel)
            temperature = fitted or temperature
            accuracy = calibration.accuracy(loo, temperature, multilabel=multilabel)
            loss = calibration.log_loss(loo, temperature, multilabel=multilabel)
        self.temperature.fill_(temperature)
        self._fold()
        filtered = choice.filter(spectrum)
        self.solution = Solution(
            task=task,
            readout=readout_name,
            weight=linear.weight,
            bias=linear.bias,
            log_prior=linear.log_prior,
            temperature=temperature,
            temperature_fitted=fitted is not None,
            regularization=choice,
            effective_rank=float((spectrum.eigenvalues * filtered).sum()),
            rank=spectrum.rank,
            rounding_floor=spectrum.floor,
            error_bound=_error_bound(spectrum, choice),
            below_floor=choice.kind == "truncation" and choice.value**2 * spectrum.largest < spectrum.floor,
            shrinkage=readout.shrinkage if isinstance(readout, Discriminant) else 0.0,
            r_squared=_r_squared(spectrum, filtered),
            leave_one_out_accuracy=accuracy,
            leave_one_out_loss=loss,
            seconds=time.perf_counter() - start,
        )
        self._stale = False
        return self.solution

    # ------------------------------------------------------------------ parts of the solve

    def _task(self) -> Task:
        stats = self.statistics
        if not stats.count > 0:
            raise RuntimeError(
                "No rows were seen: there is nothing to solve. Call fit, or update with at least one row."
            )
        if stats.labels:
            return "classes"
        if stats.values_are_binary:
            single = stats.value_sum.shape[0] == 1
            return "classes" if stats.values_are_distributions and not single else "multilabel"
        return "distribution" if stats.values_are_distributions else "regression"

    def _readout_for(self, task: Task) -> str:
        discriminates = task in ("classes", "multilabel")
        if self.readout == "discriminant" and not discriminates:
            raise ValueError(
                f"readout='discriminant' needs class labels, one-hot or multi-hot values; these values are a {task}: "
                "use readout='regression' or 'auto'."
            )
        able = self.regularization.is_ridge and self.has_bias and self.class_embeddings is None
        if self.readout == "auto":
            return "discriminant" if discriminates and able else "regression"
        return self.readout

    def _refuse_empty_classes(self, task: Task) -> None:
        if task == "classes":
            counts = self.statistics.class_counts
            empty = torch.nonzero(counts <= 0).flatten().tolist()
            if len(empty) == len(counts):
                raise RuntimeError("Every row has weight 0: there is nothing to solve.")
        elif task == "multilabel":
            counts = self.statistics.value_sum
            empty = torch.nonzero((counts <= 0) | (counts >= self.statistics.count)).flatten().tolist()
        else:
            return
        if not empty or self.class_embeddings is not None:  # an embedding predicts classes it never saw
            return
        if self.empty_classes == "error":
            shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
            what = "has no row" if task == "classes" else "has only zeros or only ones"
            raise ValueError(
                f"{len(empty)} of {len(counts)} classes {what}: {shown}. Add examples, lower out_features, "
                "or use empty_classes='mask' to give such classes probability 0."
            )
        if not self.has_bias:
            raise ValueError("empty_classes='mask' needs a bias: use bias=True, or add examples of every class.")

    def _decompose(self, rows: tuple[Tensor, Tensor, Tensor | None] | None, normalized: bool) -> Spectrum:
        stats = self.statistics
        if rows is None or 2 * rows[0].shape[0] > rows[0].shape[1]:
            return Spectrum.from_statistics(stats, centered=self.has_bias)
        keys, values, weights = rows
        if self.normalize and not normalized:
            keys = F.normalize(keys.to(torch.float64), dim=-1)
        values = self._as_values(values, keys.shape[0])
        weights = torch.ones(keys.shape[0], dtype=torch.float64) if weights is None else weights.reshape(-1)
        return Spectrum.from_rows(stats, keys, values, weights, centered=self.has_bias)

    def _prior_tensor(self, task: Task) -> Tensor | None:
        device = self.statistics.device
        if isinstance(self.prior, str):
            if self.prior == "frequency":
                return None
            c = self.statistics.value_sum.shape[0]
            if task == "multilabel":
                return torch.full((c,), 0.5, dtype=torch.float64, device=device)
            present = (self.statistics.class_counts > 0).to(torch.float64)
            return present / present.sum()
        prior = torch.as_tensor(self.prior, dtype=torch.float64, device=device)
        c = self.statistics.value_sum.shape[0]
        proper = prior.shape == (c,) and bool((prior >= 0).all()) and bool((prior <= 1).all())
        if not proper or (task == "classes" and abs(float(prior.sum()) - 1) > 1e-4):
            raise ValueError(f"prior must be {c} probabilities that sum to one, got {self.prior}.")
        return prior

    def _as_embedding(self, linear: LinearMap) -> LinearMap:
        """With class embeddings E, values are rows of E: W_E = E^T W, from the very same sums."""
        if self.class_embeddings is None:
            return linear
        embeddings = self.class_embeddings.to(linear.weight)
        zeros = linear.weight.new_zeros(embeddings.shape[1])
        return LinearMap(embeddings.T @ linear.weight, zeros, linear.log_prior)

    def _held_out(self, readout: Readout) -> LeaveOneOutScores:
        """Leave-one-out scores as the whole layer would give them: through class embeddings and zero-shot blend."""
        r = self.reservoir
        loo = readout.leave_one_out(r.keys, r.values, r.weights)
        values = loo.values.argmax(-1) if self._task() == "classes" and loo.values.ndim == 2 else loo.values
        scores = loo.scores
        if self._task() == "multilabel" and isinstance(readout, Regression):
            scores = scores - _DECISION
        if self.class_embeddings is not None:
            scores = scores @ self.class_embeddings.to(scores)
        scores = self._blended(scores, r.keys.to(scores), _blend(self.statistics.count, self.prior_count))
        if self.class_embeddings is not None:
            scores = self._cosines(scores)
        return LeaveOneOutScores(scores, loo.log_prior, values, loo.weights)

    def _default_temperature(self, task: Task, readout_name: str) -> float:
        """What divides the scores where no sample says better: 1 for outputs that are no class scores."""
        if task not in ("classes", "multilabel") or self.class_embeddings is not None:
            return 1.0
        return calibration.DEFAULT_TEMPERATURE[readout_name]

    def _loss(self, loo: LeaveOneOutScores, task: Task) -> float:
        assert isinstance(self.regularization, LeaveOneOut)
        metric = self.regularization.metric
        discriminates = task in ("classes", "multilabel")
        multilabel = task == "multilabel"
        if callable(metric):
            kept = (loo.weights > 0).any(1)
            return float(metric((loo.scores + loo.log_prior)[kept], loo.values[kept]))
        if metric == "squared_error" or not discriminates:
            dense = loo.values if loo.values.ndim == 2 else F.one_hot(loo.values, loo.scores.shape[1])
            return float(calibration.weighted_mean((loo.scores - dense).square(), loo.weights))
        temperature = calibration.fit_temperature(loo, multilabel=multilabel) or 1.0
        if metric == "error":
            return 1 - calibration.accuracy(loo, temperature, multilabel=multilabel)
        return calibration.log_loss(loo, temperature, multilabel=multilabel)

    def _store(self, linear: LinearMap, count: float) -> None:
        stats = self.statistics
        self.in_features = stats.num_features
        if self.out_features is None:
            self.out_features = stats.value_sum.shape[0]
        like = self.weight
        for name, value in (("weight", linear.weight), ("bias", linear.bias), ("log_prior", linear.log_prior)):
            setattr(self, name, value.to(device=like.device, dtype=like.dtype))
        self.blend.fill_(_blend(count, self.prior_count))

    def _fold(self) -> None:
        """Put temperature, prior and zero-shot blend into the one linear layer that forward applies."""
        weight, bias = self.weight, self.bias
        if self.zero_shot is not None and self.class_embeddings is None and len(weight):
            weight = (1 - self.blend) * self.zero_shot + self.blend * weight
            bias = self.blend * bias
        if self.class_embeddings is None:
            weight, bias = weight / self.temperature, bias / self.temperature + self.log_prior
        self._folded_weight, self._folded_bias = weight, bias

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
        return self._folded_weight, self._folded_bias

    def _blended(self, scores: Tensor, keys: Tensor, blend: float | Tensor) -> Tensor:
        if self.zero_shot_identity:
            return (1 - blend) * keys + blend * scores
        if self.zero_shot is not None:
            return (1 - blend) * F.linear(keys, self.zero_shot.to(keys)) + blend * scores
        return scores

    def _cosines(self, embedding: Tensor) -> Tensor:
        assert self.class_embeddings is not None
        directions = F.normalize(self.class_embeddings.to(embedding), dim=-1)
        return self.scale * F.linear(F.normalize(embedding, dim=-1), directions)

    def forward(self, keys: Tensor) -> Tensor:
        """Logits [..., c] of keys [..., d]; outputs themselves where the task is a regression."""
        if not self._folded_weight.shape[1]:
            raise RuntimeError("FastWeights is not fitted: call fit(keys, values), or update(...) and solve().")
        keys = keys.to(self._folded_weight.dtype)
        if self.normalize:
            keys = F.normalize(keys, dim=-1)
        if self.class_embeddings is None:
            return F.linear(keys, self._folded_weight, self._folded_bias)
        embedding = self._blended(F.linear(keys, self._folded_weight), keys, self.blend)
        return self._cosines(embedding) / self.temperature + self.log_prior

    def _solved_task(self) -> Task:
        if self._stale:
            self.solve()
        if self.solution is not None:
            return self.solution.task
        return "multilabel" if self.out_features == 1 else "classes"  # loaded from a state_dict

    @torch.no_grad()
    def predict(self, keys: Tensor) -> Tensor:
        """Labels [N]; 0/1 decisions [N, c] for multi-hot values ([N] for one column); outputs for a regression."""
        task = self._solved_task()
        logits = self(keys)
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
        logits = self(keys)
        return logits.sigmoid() if task == "multilabel" else logits.softmax(-1)

    @torch.no_grad()
    def score(self, keys: Tensor, values: Tensor) -> float:
        """Accuracy (of whole rows for multi-hot values), or R^2 for a regression, as in scikit-learn."""
        task = self._solved_task()
        predicted = self.predict(keys)
        if task in ("classes", "multilabel"):
            if task == "classes" and values.ndim == predicted.ndim + 1:
                values = values.argmax(-1)
            right = predicted == values.to(predicted.device).reshape(predicted.shape)
            return float((right if right.ndim == 1 else right.all(-1)).double().mean())
        values = values.to(predicted.device).reshape(predicted.shape).double()
        residual = (values - predicted).square().sum(0)
        return float((1 - residual / (values - values.mean(0)).square().sum(0)).mean())

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
        for name in ("weight", "bias", "log_prior", "class_embeddings", "zero_shot"):
            loaded, held = state_dict.get(prefix + name), getattr(self, name)
            if loaded is not None and (held is None or held.numel() == 0):
                setattr(
                    self, name, torch.empty_like(loaded, dtype=self.temperature.dtype, device=self.temperature.device)
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.weight.numel():
            self.in_features, self.out_features = self.weight.shape[1], self.log_prior.shape[0]
            self.statistics = SufficientStatistics(self.out_features, self.in_features)
        self._stale = False
        self.solution = None
        self._fold()

    @property
    def bytes_to_predict(self) -> int:
        """Bytes of what a prediction reads."""
        used = (self._folded_weight, self._folded_bias, self.class_embeddings, self.zero_shot)
        return sum(t.numel() * t.element_size() for t in used if t is not None)

    @property
    def bytes_to_update(self) -> int:
        """Bytes of what learning on needs: the sums (G as a packed triangle) and the reservoir."""
        return self.statistics.num_bytes + self.reservoir.num_bytes

    def extra_repr(self) -> str:
        """In the manner of nn.Linear."""
        parts = [f"in_features={self.in_features}, out_features={self.out_features}", f"{self.regularization}"]
        parts += [f"readout={self.readout!r}", f"bias={self.has_bias}"]
        if self.normalize:
            parts.append("normalize=True")
        return ", ".join(parts)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Regression on 0/1 values decides at one half; taken from the bias, a logit above 0 means "more likely 1 than 0".
_DECISION = 0.5


def _blend(count: float, prior_count: float) -> float:
    return count / (count + prior_count)


def _check_option(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {given!r}.")


def _r_squared(spectrum: Spectrum, filtered: Tensor) -> float:
    if spectrum.value_trace <= 0:
        return float("nan")
    explained = spectrum.projected.square().sum(1) / spectrum.eigenvalues
    left = 1 - spectrum.eigenvalues * filtered
    unreachable = 0.0 if spectrum.interpolates else max(0.0, spectrum.value_trace - float(explained.sum()))
    return 1 - (unreachable + float((explained * left.square()).sum())) / spectrum.value_trace


def _error_bound(spectrum: Spectrum, choice: Choice) -> float:
    """Relative error of W that rounding of the sums can cause: floor/smallest kept, and floor/gap where truncated."""
    if not spectrum.rank:
        return 0.0
    eigenvalues = spectrum.eigenvalues
    if choice.kind == "ridge":
        return 2 * spectrum.floor / (float(eigenvalues[-1]) + choice.value)
    kept = int((choice.filter(spectrum) > 0).sum())
    smallest = float(eigenvalues[kept - 1])
    following = float(eigenvalues[kept]) if kept < spectrum.rank else 0.0
    gap = smallest - following
    return 2 * spectrum.floor * (1 / smallest + (1 / gap if gap > 0 else float("inf")))
