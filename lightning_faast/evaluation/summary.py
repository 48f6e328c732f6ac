"""What a comparison's records say together: means over seeds, their intervals, and differences on the same rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_faast.data.extras import require
from lightning_faast.evaluation.records import Record, Rows, load_record, load_rows

CALIBRATION_BINS = 15
#: Figures of a record that are averaged over seeds as they are; each is a field of :class:`Entry` too.
AVERAGED = (
    "mean_class_accuracy",
    "loss",
    "seconds",
    "seconds_encode",
    "seconds_fit",
    "seconds_solve",
    "examples_encoded",
    "peak_memory",
    "bytes_to_predict",
    "bytes_to_update",
    "microseconds_1",
    "microseconds_256",
    "parameters",
    "perplexity",
    "bits_per_byte",
    "tokens_per_second",
    "first_token_seconds",
)
_LEVEL = 0.95
_RESAMPLES = 5000
_SIMULATIONS = 200


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """Test rows whose confidences lie in one of the 15 bins: their mean confidence, accuracy and number."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class RegularizationPath:
    """How the regularization was chosen: a score (lower is better) for each value, above zero and ascending.

    Values that could not be scored are left out.
    """

    kind: str
    grid: tuple[float, ...]
    scores: tuple[float, ...]
    chosen: float

    @property
    def chosen_score(self) -> float:
        """The score at the choice, between two values of the grid by a straight line over the logarithm."""
        return float(np.interp(math.log(self.chosen), np.log(self.grid), self.scores))


@dataclass(frozen=True)
class Entry:
    """One method at one number of shots, over its seeds.

    Figures are None where no seed measured them; ``AVERAGED`` ones are means over the seeds that ended.

    Attributes:
        method: Its name.
        shots: Examples a class; None for all.
        status: ``"done"`` where any seed ended, else ``"failed"`` or ``"refused"``.
        seeds: Those that ended.
        reasons: Why the others did not, each reason once.
        test_rows: Rows of the test set.
        accuracy: Mean over seeds. Its interval covers the choice of test rows and, from two seeds on, of seeds; see
            :func:`accuracy_estimate`.
        accuracy_by_seed: In the order of ``seeds``.
        calibration_error: Mean over seeds of the expected calibration error, 15 bins.
        calibrated_error: What a perfectly calibrated predictor with the same confidences scores on as many rows.
        difference: Accuracy less the reference's on the same test rows, over the seeds that both have. Its interval
            covers the choice of test rows, with these seeds; ``differences_by_seed`` shows how they agree.
        differences_by_seed: The same for each of these seeds.
        mcnemar_p: McNemar's exact p value, where a single seed is compared.
        loss_difference: Likelihood loss less the reference's, as ``difference``.
        unpaired: Why there is no difference to the reference; None where there is one, and for the reference.
        bins: Reliability, all seeds together; bins without rows are left out.
        path: How the first seed's regularization was chosen.
    """

    method: str
    shots: int | None
    status: str
    seeds: tuple[int, ...] = ()
    reasons: tuple[str, ...] = ()
    test_rows: int = 0
    accuracy: Estimate | None = None
    accuracy_by_seed: tuple[float, ...] = ()
    calibration_error: float | None = None
    calibrated_error: float | None = None
    difference: Estimate | None = None
    differences_by_seed: tuple[float, ...] = ()
    mcnemar_p: float | None = None
    loss_difference: Estimate | None = None
    unpaired: str | None = None
    bins: tuple[Bin, ...] = ()
    path: RegularizationPath | None = None
    mean_class_accuracy: float | None = None
    loss: float | None = None
    seconds: float | None = None
    seconds_encode: float | None = None
    seconds_fit: float | None = None
    seconds_solve: float | None = None
    examples_encoded: float | None = None
    peak_memory: float | None = None
    bytes_to_predict: float | None = None
    bytes_to_update: float | None = None
    microseconds_1: float | None = None
    microseconds_256: float | None = None
    parameters: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    first_token_seconds: float | None = None

    @property
    def excess_calibration_error(self) -> float | None:
        """Calibration error above what perfect calibration would score; near 0 (or below) where well calibrated."""
        if self.calibration_error is None or self.calibrated_error is None:
            return None
        return self.calibration_error - self.calibrated_error


@dataclass(frozen=True)
class Comparison:
    """Runs of several methods on the same test rows, one of them the reference.

    Methods keep the order in which the records name them.

    Attributes:
        records: One a run.
        rows: For each record, what it said of each test row; None where that was not kept.
        reference: The method that the others are compared with.
        about: What a reader needs to know, in this order; ``"title"``, else ``"recipe"``, heads the report.

    Raises:
        ValueError: Where records, rows and reference do not fit together.

    Example:
        >>> from lightning_faast.evaluation.records import Record
        >>> records = [
        ...     Record("faast", 4, 0, "done", test_rows=100, accuracy=0.9),
        ...     Record("lora", 4, 0, "refused", reason="The encoder has no attention."),
        ... ]
        >>> comparison = Comparison(records, [None, None], "faast", {"title": "Digits"})
        >>> [(entry.method, entry.status) for entry in comparison.entries]
        [('faast', 'done'), ('lora', 'refused')]
        >>> accuracy = comparison.entries[0].accuracy
        >>> f"{accuracy.low:.3f} {accuracy.high:.3f}"  # Wilson
        '0.826 0.945'
    """

    records: Sequence[Record]
    rows: Sequence[Rows | None]
    reference: str
    about: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.records) != len(self.rows):
            raise ValueError(f"{len(self.records)} records with rows of {len(self.rows)}: expected one for each.")
        if not self.records:
            raise ValueError("There is no record to report. Run the comparison first.")
        seen = set()
        for record, rows in zip(self.records, self.rows, strict=True):
            key = (record.method, record.shots, record.seed)
            if key in seen:
                raise ValueError(f"Two records of {_run(record)}: delete the one that is not wanted.")
            seen.add(key)
            _check(record, rows)

    @classmethod
    def load(cls, directory: Path, reference: str, about: dict[str, str]) -> Comparison:
        """Read every record in a folder; methods come in alphabetical order, the reference first.

        Raises:
            ValueError: Where a file is damaged or no record.
        """
        loaded = [(load_record(path), load_rows(path)) for path in sorted(directory.glob("*.json"))]
        loaded.sort(key=lambda run: (run[0].method != reference, run[0].method, _last(run[0].shots), run[0].seed))
        return cls([record for record, _ in loaded], [rows for _, rows in loaded], reference, about)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names, each once."""
        return tuple(dict.fromkeys(record.method for record in self.records))

    @property
    def others(self) -> tuple[str, ...]:
        """Every method but the reference."""
        return tuple(method for method in self.methods if method != self.reference)

    @property
    def shots(self) -> tuple[int | None, ...]:
        """Numbers of shots, ascending, None (all) last."""
        return tuple(sorted({record.shots for record in self.records}, key=_last))

    @property
    def unit(self) -> str:
        """What a shot is: ``"shot"`` for labelled examples, ``"token"`` for running text."""
        return next((record.unit for record in self.records if record.status == "done"), self.records[0].unit)

    @property
    def title(self) -> str:
        """What heads the report."""
        return self.about.get("title") or self.about.get("recipe") or "Comparison of methods"

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """One for each method and number of shots that has records, by shots and then by method."""
        return summarize(self)

    def ranked(self, shots: int | None) -> list[Entry]:
        """The entries of a number of shots: the reference, then the best, last those without a result."""
        entries = [entry for entry in self.entries if entry.shots == shots]
        return sorted(entries, key=lambda e: (e.method != self.reference, -self.merit(e)))

    def merit(self, entry: Entry) -> float:
        """By what entries are ranked, more is better: accuracy, or of running text the log-likelihood of a token."""
        if self.unit == "token":
            return -math.inf if entry.loss is None else -entry.loss
        return entry.accuracy.value if entry.accuracy else -math.inf

    def entry(self, method: str, shots: int | None) -> Entry | None:
        """The entry of a method at a number of shots; None where nothing was run."""
        return next((entry for entry in self.entries if (entry.method, entry.shots) == (method, shots)), None)


def summarize(comparison: Comparison) -> tuple[Entry, ...]:
    """Means, intervals and paired differences of a comparison.

    Every paired interval is a percentile bootstrap (``scipy.stats.bootstrap``, 5,000 resamples, seed 0) of the mean
    over test rows of d_i, the difference of row i averaged over the seeds that both methods have. All methods share
    the resamples, so that the same rows are drawn for each. Rows that belong together (the tokens of a window) are
    drawn together.
    """
    runs: dict[tuple[str, int | None], list[_Run]] = {}
    for record, rows in zip(comparison.records, comparison.rows, strict=True):
        runs.setdefault((record.method, record.shots), []).append((record, rows))
    keys = [(m, shots) for shots in comparison.shots for m in comparison.methods if (m, shots) in runs]
    means = {key: _mean_entry(runs[key]) for key in keys}

    pairs: dict[tuple[str, int | None], _Pair] = {}
    unpaired: dict[tuple[str, int | None], str] = {}
    for method, shots in keys:
        if method == comparison.reference or not means[method, shots]["seeds"]:
            continue
        try:
            pairs[method, shots] = _pair(runs[method, shots], runs.get((comparison.reference, shots), []))
        except _UnpairedError as error:
            unpaired[method, shots] = str(error)
    paired = dict(zip(pairs, _paired_estimates(list(pairs.values())), strict=True))
    return tuple(
        Entry(**means[key], **paired.get(key, {}), unpaired=unpaired.get(key))  # type: ignore[arg-type]
        for key in keys
    )


# ---------------------------------------------------------------------- one method at a time

_Run = tuple[Record, "Rows | None"]


def _mean_entry(runs: Sequence[_Run]) -> dict[str, object]:
    """What an entry says without the reference."""
    method, shots = runs[0][0].method, runs[0][0].shots
    done = sorted((run for run in runs if run[0].status == "done"), key=lambda run: run[0].seed)
    statuses = {record.status for record, _ in runs}
    found: dict[str, object] = {
        "method": method,
        "shots": shots,
        "status": next(status for status in ("done", "failed", "refused") if status in statuses),
        "seeds": tuple(record.seed for record, _ in done),
        "reasons": tuple(dict.fromkeys(r.reason or "No reason was given." for r, _ in runs if r.status != "done")),
    }
    if not done:
        return found
    accuracies = [float(record.accuracy) for record, _ in done if record.accuracy is not None]
    test_rows = min(record.test_rows for record, _ in done)
    with_rows = [rows for _, rows in done if rows is not None]
    stated = [record.calibration_error for record, _ in done]
    found |= {name: _mean(getattr(record, name) for record, _ in done) for name in AVERAGED}
    found |= {
        "test_rows": test_rows,
        "accuracy": accuracy_estimate(accuracies, test_rows),
        "accuracy_by_seed": tuple(accuracies),
        "calibration_error": _mean([calibration_error(rows) for rows in with_rows] or stated),
        "calibrated_error": _mean(calibrated_error(rows) for rows in with_rows),
        "bins": reliability(with_rows),
        "path": next((p for p in (_path(record) for record, _ in done) if p is not None), None),
    }
    return found


def accuracy_estimate(by_seed: Sequence[float], test_rows: int) -> Estimate:
    """Mean accuracy over seeds and its 95 % interval.

    With one seed, Wilson's interval: it covers the choice of test rows, and says nothing about other seeds. With
    several, it covers both. To each side, Wilson's distance w of the mean and the seeds' t(.975, S-1) s / sqrt(S) are
    independent errors and add as squares (the method of variance estimates recovery, Zou and Donner 2008):

        mean - sqrt(w_low^2 + t^2 s^2 / S),   mean + sqrt(w_high^2 + t^2 s^2 / S)

    clipped to [0, 1]. It errs on the wide side, the more so with two seeds, which hardly tell how far seeds vary.

    Args:
        by_seed: Accuracy of each seed.
        test_rows: Rows that each was measured on.

    Example:
        >>> estimate = accuracy_estimate([0.90, 0.92, 0.91], 1000)
        >>> f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
        '0.910 [0.879, 0.940]'
    """
    wilson = require("statsmodels.stats.proportion", "compare").proportion_confint
    mean = float(np.mean(by_seed))
    low, high = wilson(mean * test_rows, test_rows, alpha=1 - _LEVEL, method="wilson")
    if len(by_seed) > 1:
        quantile = require("scipy.stats", "compare").t.ppf((1 + _LEVEL) / 2, len(by_seed) - 1)
        seeds = quantile * float(np.std(by_seed, ddof=1)) / math.sqrt(len(by_seed))
        low, high = mean - math.hypot(mean - low, seeds), mean + math.hypot(high - mean, seeds)
    return Estimate(mean, max(0.0, float(low)), min(1.0, float(high)))


def calibration_error(rows: Rows) -> float:
    """Expected calibration error of the predicted class, 15 bins, as torchmetrics defines it for many classes."""
    from torchmetrics.functional.classification import binary_calibration_error

    # The confidence of the prediction, and whether it was right, are a binary problem: the same bins, the same sum.
    correct = (rows.predicted == rows.label).long()
    return float(binary_calibration_error(rows.confidence.double().clamp(0, 1), correct, n_bins=CALIBRATION_BINS))


def calibrated_error(rows: Rows) -> float:
    """Calibration error that a perfectly calibrated predictor with these confidences is expected to score.

    Its predictions are right with exactly the probability that it states, yet on finitely many rows the error is above
    zero. Mean of 200 simulations (seed 0) of correct_i ~ Bernoulli(confidence_i).

    Example:
        >>> confidence = torch.full((400,), 0.8)
        >>> label = torch.zeros(400, dtype=torch.long)
        >>> round(calibrated_error(Rows(label, label, confidence, confidence.log())), 2)  # sqrt(2/pi * .8 * .2 / 400)
        0.02
    """
    confidence, order, starts = _binned(rows.confidence)
    confidence = confidence[order]
    generator = np.random.default_rng(0)
    total = 0.0
    for _ in range(_SIMULATIONS):
        gaps = (generator.random(len(confidence), dtype=np.float32) < confidence) - confidence
        total += float(np.abs(np.add.reduceat(gaps, starts)).sum())
    return total / _SIMULATIONS / len(confidence)


def reliability(rows: Sequence[Rows]) -> tuple[Bin, ...]:
    """Mean confidence and accuracy in each of the 15 bins that has rows, several runs taken together."""
    if not rows:
        return ()
    confidence, order, starts = _binned(torch.cat([r.confidence for r in rows]))
    correct = torch.cat([r.predicted == r.label for r in rows]).double().numpy()
    counts = np.diff([*starts, len(order)])
    return tuple(
        Bin(float(c), float(a), int(n))
        for c, a, n in zip(
            np.add.reduceat(confidence[order], starts) / counts,
            np.add.reduceat(correct[order], starts) / counts,
            counts,
            strict=True,
        )
    )


def _binned(confidence: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidences [n], the order that sorts them by bin [n], and where each bin that has rows starts [bins].

    As in torchmetrics, a bin holds its left edge, and a confidence of exactly 1 has a bin of its own.
    """
    values = confidence.double().clamp(0, 1)
    edges = torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=torch.float64)
    bins = torch.bucketize(values, edges, right=True)
    order = torch.argsort(bins, stable=True)
    _, counts = torch.unique_consecutive(bins[order], return_counts=True)
    return values.numpy(), order.numpy(), (counts.cumsum(0) - counts).numpy()


# ---------------------------------------------------------------------- against the reference


class _UnpairedError(Exception):
    """Two methods cannot be compared row by row; its text says why."""


@dataclass(frozen=True)
class _Pair:
    """Differences of each test row.

    Attributes:
        correct: Of being right, float64 [seeds, n].
        loss: Of negative log likelihoods, float64 [seeds, n].
        single: Being right, method and reference, float64 [2, n], where there is one seed and rows are independent.
        block: Which rows are drawn together, int64 [n]; None where each is drawn by itself.
    """

    correct: np.ndarray
    loss: np.ndarray
    single: np.ndarray | None
    block: np.ndarray | None


def _pair(runs: Sequence[_Run], reference: Sequence[_Run]) -> _Pair:
    """Differences on the rows and seeds that both have.

    Raises:
        _UnpairedError: Where there are none, or the test rows are not the same.
    """
    mine = {record.seed: rows for record, rows in runs if record.status == "done"}
    theirs = {record.seed: rows for record, rows in reference if record.status == "done"}
    seeds = sorted(mine.keys() & theirs.keys())
    if not theirs:
        raise _UnpairedError("The reference has no run that ended with as many shots.")
    if not seeds:
        raise _UnpairedError(f"No seed in common: {sorted(mine)} here, {sorted(theirs)} of the reference.")
    pairs = []
    for seed in seeds:
        a, b = mine[seed], theirs[seed]
        if a is None or b is None:
            raise _UnpairedError("What was predicted for each test row was not kept.")
        if len(a.label) != len(b.label):
            raise _UnpairedError(f"Other test rows: {len(a.label):,} here, {len(b.label):,} of the reference.")
        if not torch.equal(a.label, b.label):
            count = int((a.label != b.label).sum())
            raise _UnpairedError(f"Other test rows: {count:,} of {len(a.label):,} labels are not the reference's.")
        pairs.append((a, b))
    if any(not torch.equal(a.label, pairs[0][0].label) for a, _ in pairs):
        raise _UnpairedError("The seeds were measured on different test rows.")
    correct = np.stack([[(r.predicted == r.label).double().numpy() for r in pair] for pair in pairs])
    loss = np.stack([[-r.log_likelihood.double().numpy() for r in pair] for pair in pairs])
    with np.errstate(invalid="ignore"):  # infinite losses: the difference is told apart later
        differences = loss[:, 0] - loss[:, 1]
    blocks = pairs[0][0].block
    block = None if blocks is None or len(blocks.unique()) < 2 else blocks.numpy()  # one alone cannot be resampled
    single = correct[0] if len(pairs) == 1 and block is None else None
    return _Pair(correct[:, 0] - correct[:, 1], differences, single, block)


def _paired_estimates(pairs: Sequence[_Pair]) -> list[dict[str, object]]:
    """For each pair, the entry's fields of differences."""
    found: list[dict[str, object]] = []
    columns = []
    for pair in pairs:
        finite = bool(np.isfinite(pair.loss).all())  # a memory may give the right class no probability at all
        loss = pair.loss.mean(0) if finite else np.zeros_like(pair.loss[0])
        columns += [_Column.of(values, pair.block) for values in (pair.correct.mean(0), loss)]
        p = None
        if pair.single is not None:
            a, b = pair.single.astype(bool)
            table = [[int((a & b).sum()), int((a & ~b).sum())], [int((~a & b).sum()), int((~a & ~b).sum())]]
            p = float(require("statsmodels.stats.contingency_tables", "compare").mcnemar(table, exact=True).pvalue)
        found.append({"differences_by_seed": tuple(pair.correct.mean(1).tolist()), "mcnemar_p": p, "finite": finite})
    estimates = _bootstrap(columns)
    for i, fields in enumerate(found):
        fields["difference"] = estimates[2 * i]
        fields["loss_difference"] = estimates[2 * i + 1] if fields.pop("finite") else None
    return found


@dataclass(frozen=True)
class _Column:
    """A figure of every test row, summed over the rows that are drawn together.

    Attributes:
        sums: float64 [n].
        sizes: How many rows each is the sum of, float64 [n].
    """

    sums: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, block: np.ndarray | None) -> _Column:
        if block is None:
            return cls(values, np.ones(len(values)))
        _, places = np.unique(block, return_inverse=True)
        return cls(np.bincount(places, values), np.bincount(places).astype(float))


def _bootstrap(columns: Sequence[_Column]) -> list[Estimate]:
    """The mean of each column over rows with its percentile interval; columns of one length share the resamples."""
    found: dict[int, Estimate] = {}
    for n in {len(column.sums) for column in columns}:
        places = [i for i, column in enumerate(columns) if len(column.sums) == n]
        sums = np.stack([columns[i].sums for i in places], axis=1)
        sizes = np.stack([columns[i].sizes for i in places], axis=1)

        def means(
            draws: np.ndarray, axis: int, n: int = n, sums: np.ndarray = sums, sizes: np.ndarray = sizes
        ) -> np.ndarray:
            # How often each row was drawn, times the rows: one product for all columns.
            counts = np.stack([np.bincount(draw, minlength=n) for draw in draws.reshape(-1, n)]).astype(float)
            return np.moveaxis((counts @ sums / (counts @ sizes)).reshape(*draws.shape[:-1], -1), -1, 0)

        interval = (
            require("scipy.stats", "compare")
            .bootstrap(
                (np.arange(n),),
                means,
                n_resamples=_RESAMPLES,
                batch=250,
                confidence_level=_LEVEL,
                method="percentile",
                rng=np.random.default_rng(0),
            )
            .confidence_interval
        )
        whole = sums.sum(0) / sizes.sum(0)
        for i, mean, low, high in zip(places, whole, interval.low, interval.high, strict=True):
            found[i] = Estimate(float(mean), float(low), float(high))
    return [found[i] for i in range(len(columns))]


# ---------------------------------------------------------------------- checks and small parts


def _check(record: Record, rows: Rows | None) -> None:
    """Raise ValueError where a record, or its rows, cannot be reported."""
    if record.status not in ("done", "failed", "refused"):
        raise ValueError(f"{_run(record)} has status {record.status!r}; expected done, failed or refused.")
    if record.status != "done":
        return
    if record.accuracy is None or not 0 <= record.accuracy <= 1 or record.test_rows < 2:
        raise ValueError(
            f"{_run(record)} is done with accuracy {record.accuracy} on {record.test_rows} test rows; expected an "
            "accuracy from 0 to 1 on two rows or more. Run it again."
        )
    if rows is None:
        return
    if not len(rows.label) == len(rows.predicted) == len(rows.confidence) == len(rows.log_likelihood):
        raise ValueError(f"The columns of {_run(record)}'s rows have different lengths. Run it again.")
    right = float((rows.predicted == rows.label).double().mean())
    if len(rows.label) != record.test_rows or abs(right - record.accuracy) > 1e-4:
        raise ValueError(
            f"{_run(record)} says accuracy {record.accuracy:.4f} on {record.test_rows} test rows, its file of rows "
            f"{right:.4f} on {len(rows.label)}: one of the two files is of another run. Delete both and run it again."
        )
    if not bool(((rows.confidence >= 0) & (rows.confidence <= 1 + 1e-4)).all()):
        raise ValueError(f"{_run(record)} has confidences that are not from 0 to 1. Run it again.")
    if bool(rows.log_likelihood.isnan().any()):
        raise ValueError(f"{_run(record)} has log likelihoods that are no number. Run it again.")


def _path(record: Record) -> RegularizationPath | None:
    """The regularization's path, where the record has one."""
    if "path" not in record.details:
        return None
    path = record.details["path"]
    try:
        grid, scores = tuple(map(float, path["grid"])), tuple(map(float, path["scores"]))
        chosen = float(path["chosen"])
        if len(grid) != len(scores) or not grid:
            raise ValueError(f"{len(grid)} values and {len(scores)} scores")
        if not all(math.isfinite(value) and value > 0 for value in (*grid, chosen)):
            raise ValueError("not all values are above zero")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{_run(record)} has a regularization path that cannot be read ({error}); expected kind, grid (values "
            "above zero), as many scores, and chosen. Run it again."
        ) from error
    scored = sorted((value, score) for value, score in zip(grid, scores, strict=True) if math.isfinite(score))
    if not scored:
        return None
    return RegularizationPath(str(path["kind"]), tuple(v for v, _ in scored), tuple(s for _, s in scored), chosen)


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of those that are known; None where none is."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _run(record: Record) -> str:
    return f"{record.method} with {'all' if record.shots is None else record.shots} shots and seed {record.seed}"


def _last(shots: int | None) -> float:
    """Sorts None after every number."""
    return math.inf if shots is None else shots
