"""What a comparison found, in sentences computed from its figures: where the reference is ahead, and where behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_faast.evaluation.formats import (
    decimal,
    duration,
    perplexity,
    points,
    shots_name,
    shots_title,
    size,
    times,
)
from lightning_faast.evaluation.summary import Comparison, Entry, Estimate

_NAMED = 4  # at most as many methods, or comparisons, are named in a sentence
_ALIKE = 0.05  # costs that differ by less are called alike


#: What the figures mean, for whoever reads a report.
NOTES = (
    "Accuracy: mean over seeds with a 95 % interval. With one seed it is Wilson's and covers the choice of test rows; "
    "with several it also covers the choice of seeds, by Student's t, and is wide where there are only two or three.",
    "Difference: accuracy (and loss) less the reference's on the same test rows and seeds. Its 95 % interval is a "
    "paired bootstrap over test rows, given these seeds. Intervals are not corrected for the number of comparisons: of "
    "twenty between equals, one is expected to leave out 0.",
    "ECE: expected calibration error, 15 bins. ECE excess: what of it a perfectly calibrated predictor with the same "
    "confidences would not score on as many rows.",
    "Adaptation: encoding, fitting and solving, as each method alone would need it. Encoded: examples through the "
    "encoder in that time, repeats included.",
    "To predict, to update: bytes that a prediction reads, and that learning on needs, beside the encoder. µs: wall "
    "time of a prediction from a key, a row.",
)
#: The same for running text.
TOKEN_NOTES = (
    "Perplexity: the exponential of the loss, the mean negative log-likelihood of a token in nats. Accuracy: of the "
    "most likely next token. Bits per byte: the loss in bits for each byte of the scored text, which any "
    "tokenizer shares.",
    "Difference: accuracy and loss less the reference's on the same test tokens. The 95 % interval is a paired "
    "bootstrap over windows, whose tokens are drawn together. Intervals are not corrected for the number of "
    "comparisons: of twenty between equals, one is expected to leave out 0.",
    NOTES[2],
    "Adaptation: the forward passes of the model, fitting and solving. Encoded: tokens through the model in that time, "
    "repeats included.",
    "To predict, to update: bytes that a prediction reads, and that learning on needs, beside the model. Tokens/s: "
    "tokens of the test text through the model and its output layer. First token: from a prompt of 64 tokens at most "
    "to the first that is generated.",
)


def notes(comparison: Comparison) -> tuple[str, ...]:
    """What the figures of a comparison mean."""
    return TOKEN_NOTES if comparison.unit == "token" else NOTES


def verdict(difference: Estimate | None) -> str:
    """Of a difference to the reference: ``"ahead"``, ``"behind"``, or ``"level"`` where its interval contains 0.

    ``"unknown"`` where there is no difference. It is the *reference* that is ahead or behind.

    Example:
        >>> verdict(Estimate(-0.02, -0.03, -0.01)), verdict(Estimate(-0.02, -0.05, 0.01))
        ('ahead', 'level')
    """
    if difference is None:
        return "unknown"
    return "ahead" if difference.high < 0 else "behind" if difference.low > 0 else "level"


def findings(comparison: Comparison) -> list[str]:
    """Sentences for the head of a report, the most important first.

    Example:
        >>> from lightning_faast.evaluation.records import Record
        >>> records = [Record(m, None, 0, "done", test_rows=99, accuracy=a) for m, a in (("faast", 0.9), ("knn", 0.8))]
        >>> findings(Comparison(records, [None, None], "faast"))[0]
        'faast has the highest accuracy with all shots.'
    """
    done = [entry for entry in comparison.entries if entry.status == "done"]
    if not any(entry.method == comparison.reference for entry in done):
        return [f"{comparison.reference}, the reference, has no run that ended.", *_unfinished(comparison)]
    others = [entry for entry in done if entry.method != comparison.reference]
    # of running text the accuracy of the next token matters less than its loss
    judged = [] if comparison.unit == "token" else _verdicts(others)
    return [
        *_ranks(comparison, done),
        *judged,
        *_losses(others),
        *_calibration(comparison),
        *_costs(comparison, "seconds", "adapts in", duration),
        *_costs(comparison, "bytes_to_update", "needs for learning on", size),
        *_unfinished(comparison),
    ]


def reasons(comparison: Comparison) -> list[str]:
    """Why runs have no result and methods no difference, each reason once, as ``"lora (4, 16 shots): …"``."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for entry in comparison.entries:
        status = entry.status if entry.status != "done" else "some seeds did not end"
        for reason in entry.reasons:
            found.setdefault((entry.method, status, reason), []).append(shots_name(entry.shots))
        if entry.unpaired:
            kind = "not compared row by row"
            found.setdefault((entry.method, kind, entry.unpaired), []).append(shots_name(entry.shots))
    return [
        f"{method} ({', '.join(shots)} {comparison.unit}s), {status}: {reason}"
        for (method, status, reason), shots in found.items()
    ]


def _ranks(comparison: Comparison, done: Sequence[Entry]) -> list[str]:
    """At which numbers of shots the reference is best; and what is elsewhere."""
    text = comparison.unit == "token"
    best_is, better = ("the lowest perplexity", "Lower") if text else ("the highest accuracy", "More accurate")
    tried, first, beaten = [], [], []
    for shots in comparison.shots:
        own = comparison.entry(comparison.reference, shots)
        rivals = [entry for entry in done if entry.shots == shots and entry.method != comparison.reference]
        if own is None or own.accuracy is None or not rivals:
            continue
        tried.append(shots)
        best = max(rivals, key=comparison.merit)
        if comparison.merit(best) > comparison.merit(own):
            by = f"({perplexity(best.perplexity)}, {perplexity(own.perplexity)} here)" if text else _by(best)
            beaten.append(f"{best.method} at {shots_name(shots)} {by}")
        else:
            first.append(shots_name(shots))
    if not tried:
        return []
    named = f", {_list(first)}" if first else ""
    where = f"at {len(first) or 'none'} of {len(tried)} numbers of {comparison.unit}s{named}"
    if len(tried) == 1:
        where = f"with {shots_title(tried[0], comparison.unit)}"
    verb = "does not have" if len(tried) == 1 and beaten else "has"
    sentence = f"{comparison.reference} {verb} {best_is} {where}."
    return [sentence, f"{better}: {_list(_few(beaten))}."] if beaten else [sentence]


def _by(entry: Entry) -> str:
    if entry.difference is None:
        return "(not compared row by row)"
    level = ", which is level" if verdict(entry.difference) == "level" else ""
    return f"by {points(entry.difference)} points{level}"


def _verdicts(others: Sequence[Entry]) -> list[str]:
    """In how many paired comparisons it is ahead, level and behind; and where behind, by name, the worst first."""
    found = [verdict(entry.difference) for entry in others]
    total = len(found) - found.count("unknown")
    if not total:
        return []
    sentence = (
        f"Of {total} comparisons on the same test rows it is ahead in {found.count('ahead')}, level in "
        f"{found.count('level')} (the 95 % interval contains 0) and behind in {found.count('behind')}"
    )
    behind = [entry for entry in others if verdict(entry.difference) == "behind"]
    if not behind:
        return [f"{sentence}."]
    behind.sort(key=lambda entry: -entry.difference.value if entry.difference else 0.0)
    named = _few([f"{e.method} at {shots_name(e.shots)} by {points(e.difference)} points" for e in behind])
    return [f"{sentence}: {_list(named)}."]


def _losses(others: Sequence[Entry]) -> list[str]:
    # As for accuracy, but for losses less is better.
    flipped = [Estimate(-d.value, -d.high, -d.low) if (d := entry.loss_difference) else None for entry in others]
    found = [verdict(difference) for difference in flipped]
    total = len(found) - found.count("unknown")
    if not total:
        return []
    return [
        f"Its likelihood loss is lower in {found.count('ahead')} of {total}, level in {found.count('level')} and "
        f"higher in {found.count('behind')}."
    ]


def _calibration(comparison: Comparison) -> list[str]:
    """The number of shots at which the reference is furthest from calibrated."""
    own = [entry for entry in comparison.entries if entry.method == comparison.reference]
    known = [(entry.excess_calibration_error, entry) for entry in own if entry.excess_calibration_error is not None]
    if not known:
        return []
    excess, worst = max(known, key=lambda pair: pair[0])
    if excess <= 0:
        return ["Its calibration error is nowhere above what a perfectly calibrated predictor would score."]
    return [
        f"Its calibration error is at most {decimal(excess)} above what a perfectly calibrated predictor would score: "
        f"{decimal(worst.calibration_error)} at {shots_title(worst.shots, comparison.unit)}."
    ]


def _costs(comparison: Comparison, name: str, does: str, unit: Callable[[float], str]) -> list[str]:
    """A cost at the largest number of shots for which the reference has it: who needs more, as much, less."""
    own = [e for e in comparison.entries if e.method == comparison.reference and getattr(e, name)]
    if not own:
        return []
    shots, cost = own[-1].shots, getattr(own[-1], name)
    ratios = [
        (getattr(e, name) / cost, e.method)
        for e in comparison.entries
        if e.shots == shots and e.method != comparison.reference and getattr(e, name) is not None
    ]
    more = sorted((pair for pair in ratios if pair[0] > 1 + _ALIKE), reverse=True)
    alike = [method for ratio, method in ratios if 1 - _ALIKE <= ratio <= 1 + _ALIKE]
    less = sorted(pair for pair in ratios if pair[0] < 1 - _ALIKE)
    named = [f"{method} {times(ratio)} as much" for ratio, method in more[:_NAMED]]
    if len(more) > _NAMED:
        named.append(f"{len(more) - _NAMED} others {times(more[-1][0])} or more")
    parts = [
        ", ".join(named),
        f"as much within {100 * _ALIKE:.0f} %: {_list(alike)}" if alike else "",
        f"less: {_list([f'{method} ({unit(ratio * cost)})' for ratio, method in less])}" if less else "",
    ]
    others = "; ".join(part for part in parts if part)
    return [f"With {shots_title(shots, comparison.unit)} it {does} {unit(cost)}" + (f"; {others}." if others else ".")]


def _unfinished(comparison: Comparison) -> list[str]:
    statuses = [record.status for record in comparison.records]
    failed, refused = statuses.count("failed"), statuses.count("refused")
    if not failed + refused:
        return []
    return [f"Of {len(statuses)} runs {failed} failed and {refused} were refused; the reasons are below."]


def _few(items: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    return [*items[:_NAMED], *([f"{len(items) - _NAMED} more"] if len(items) > _NAMED else [])]


def _list(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else list(items))
