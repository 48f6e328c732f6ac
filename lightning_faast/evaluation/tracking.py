"""A comparison in Weights & Biases: a group of runs, one a method, and one more with tables and figures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_faast.data.extras import require
from lightning_faast.evaluation.formats import shots_name
from lightning_faast.evaluation.keys import digest_of
from lightning_faast.evaluation.report import entry_figures
from lightning_faast.evaluation.summary import Comparison, Entry

#: Names in W&B, the same for every method, with the figures of an entry that they show. Those of fit are among them.
METRICS = {
    "test/accuracy": "accuracy",
    "test/accuracy_low": "accuracy_low",
    "test/accuracy_high": "accuracy_high",
    "test/mean_class_accuracy": "mean_class_accuracy",
    "test/loss": "loss",
    "test/perplexity": "perplexity",
    "test/bits_per_byte": "bits_per_byte",
    "test/calibration_error": "calibration_error",
    "adaptation/seconds": "seconds",
    "adaptation/seconds_encode": "seconds_encode",
    "adaptation/seconds_fit": "seconds_fit",
    "adaptation/seconds_solve": "seconds_solve",
    "adaptation/examples_encoded": "examples_encoded",
    "adaptation/parameters": "parameters",
    "memory/peak": "peak_memory",
    "memory/bytes_to_predict": "bytes_to_predict",
    "memory/bytes_to_update": "bytes_to_update",
    "prediction/microseconds_1": "microseconds_1",
    "prediction/microseconds_256": "microseconds_256",
    "prediction/tokens_per_second": "tokens_per_second",
    "prediction/first_token_seconds": "first_token_seconds",
}
#: What the metrics are drawn against. Not shots: where all examples are taken, classes have different numbers of them.
STEP = "train_rows"


def log_comparison(
    comparison: Comparison, project: str, directory: Path, entity: str | None = None, group: str | None = None
) -> None:
    """Log a comparison to W&B: a run for each method, and the run ``comparison`` with the table, figures and page.

    Every method logs the same metrics, means over its seeds, once for each number of shots and against
    ``train_rows``, the examples that there were to learn from; ``examples_per_class`` is the same divided by the number
    of classes. The summary holds the figures of most shots, ``status``, and under ``reasons``, by shots, why there is
    no result. ``WANDB_MODE=offline`` needs no account; ``wandb sync`` sends what it wrote to ``DIRECTORY/wandb``.

    Args:
        comparison: The runs.
        project: The W&B project.
        directory: Where :func:`~lightning_faast.evaluation.report.write_report` wrote the comparison. W&B keeps its
            own files there, in ``wandb/``.
        entity: The W&B user or team; W&B's default where nothing is said.
        group: Name of the group; recipe, date and a digest of the records where nothing is said, so that the same
            records come into the same group.

    Raises:
        ImportError: Where wandb is not installed.
        FileNotFoundError: Where the report has not been written; nothing is logged then.

    Example::

        write_report(comparison, Path("comparisons/digits"))
        log_comparison(comparison, "digits", Path("comparisons/digits"))
    """
    wandb = require("wandb", "wandb")
    page, figures = directory / "comparison.html", sorted((directory / "figures").glob("*.png"))
    if not page.is_file() or not figures:
        raise FileNotFoundError(
            f"{directory} holds no comparison.html with figures/*.png. Call write_report(comparison, directory) first."
        )
    rows = {shots: _train_rows(comparison, shots) for shots in comparison.shots}
    num_classes = max(record.num_classes for record in comparison.records)
    common: dict[str, Any] = {
        "project": project,
        "entity": entity,
        "group": group or group_name(comparison),
        "dir": str(directory.resolve()),  # W&B's process may have another working directory
        "reinit": "create_new",  # a run that the caller has open stays open
        # the terminal and the load of this machine are those of logging, not of the methods
        "settings": wandb.Settings(console="off", x_disable_stats=True),
    }

    for method in comparison.methods:
        with wandb.init(name=method, job_type="compare", config=_config(comparison, method), **common) as run:
            run.define_metric(STEP)
            for name in ("examples_per_class", *METRICS):
                run.define_metric(name, step_metric=STEP)
            entries = [entry for entry in comparison.entries if entry.method == method]
            for entry in entries:
                if entry.status == "done":
                    train_rows = rows[entry.shots]
                    steps: dict[str, float] = {STEP: train_rows}
                    if comparison.unit == "shot":
                        steps["examples_per_class"] = train_rows / num_classes
                    run.log(steps | _metrics(entry))
            run.summary.update(_outcome(entries))

    with wandb.init(name="comparison", job_type="report", config=_about(comparison), **common) as run:
        run.log(
            {
                "table": _table(comparison, rows),
                "page": wandb.Html(page.read_text(encoding="utf-8"), inject=False),
                **{f"figures/{figure.stem}": wandb.Image(str(figure)) for figure in figures},
            }
        )


def group_name(comparison: Comparison) -> str:
    """Recipe, date and a digest of the records.

    Example:
        >>> from lightning_faast.evaluation.records import Record
        >>> record = Record("faast", 4, 0, "done", test_rows=100, accuracy=0.9)
        >>> about = {"recipe": "recipes/vit_cifar.yaml", "date": "2025-01-31"}
        >>> group_name(Comparison([record], [None], "faast", about))[:-8]
        'vit_cifar-2025-01-31-'
    """
    recipe = Path(comparison.about.get("recipe", "comparison")).stem
    digest = digest_of({"records": [asdict(record) for record in comparison.records]})[:8]
    return "-".join(part for part in (recipe, comparison.about.get("date"), digest) if part)


def _about(comparison: Comparison) -> dict[str, Any]:
    return {**comparison.about, "reference": comparison.reference}


def _config(comparison: Comparison, method: str) -> dict[str, Any]:
    """What distinguishes the run of a method, and what it shares with the others."""
    records = [record for record in comparison.records if record.method == method]
    shots = [shots for shots in comparison.shots if any(record.shots == shots for record in records)]
    return {
        **_about(comparison),
        "method": method,
        "shots": ["all" if number is None else number for number in shots],
        "seeds": sorted({record.seed for record in records}),
    }


def _train_rows(comparison: Comparison, shots: int | None) -> int:
    """Examples that there were to learn from, for every method alike; 0 where no run ended."""
    return max(record.train_rows for record in comparison.records if record.shots == shots)


def _metrics(entry: Entry) -> dict[str, Any]:
    """What is known of an entry, by its names in W&B."""
    figures = entry_figures(entry)
    return {name: figures[column] for name, column in METRICS.items() if figures[column] is not None}


def _outcome(entries: list[Entry]) -> dict[str, Any]:
    """How the runs of a method ended, and why some have no result."""
    statuses = {entry.status for entry in entries}
    status = next(status for status in ("done", "failed", "refused") if status in statuses)
    reasons = {shots_name(entry.shots): " ".join(entry.reasons) for entry in entries if entry.reasons}
    return {"status": status, **({"reasons": reasons} if reasons else {})}


def _table(comparison: Comparison, train_rows: dict[int | None, int]) -> Any:
    """Every figure of every entry, a line for each method and number of shots."""
    lines = [
        # a column is all numbers or all text
        entry_figures(entry) | {"shots": shots_name(entry.shots), STEP: train_rows[entry.shots]}
        for entry in comparison.entries
    ]
    table = require("wandb", "wandb").Table(columns=list(lines[0]))
    for line in lines:
        table.add_data(*line.values())
    return table
