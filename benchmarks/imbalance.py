"""Long-tailed classes: ``python -m benchmarks.imbalance --recipe RECIPE [--OPTION=VALUE ...]`` prints a table."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from torch import Tensor

from lightning_faast.associative import FastWeights, LogisticRegression, NearestClassMean
from lightning_faast.evaluation.compare import encoded, progress_display
from lightning_faast.evaluation.frozen import Bench
from lightning_faast.evaluation.keys import KeyStore
from lightning_faast.evaluation.methods import resolve

METHODS = {
    "faast, uniform prior": lambda: FastWeights(prior="uniform"),
    "faast, frequencies": FastWeights,
    "logistic regression, balanced": lambda: LogisticRegression(class_weight="balanced"),
    "logistic regression": LogisticRegression,
    "nearest class mean": NearestClassMean,
}


def long_tail(labels: Tensor, most: int, fewest: int, seed: int, *, ascending: bool) -> Tensor:
    """Rows [N] of a set whose classes shrink geometrically, from ``most`` rows to ``fewest``, or grow."""
    classes = int(labels.max()) + 1
    counts = torch.logspace(0, 1, classes, base=fewest / most).mul(most).round().long()
    counts = counts.flip(0) if ascending else counts
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, count in enumerate(counts.tolist()):
        rows = torch.nonzero(labels == label).flatten()
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(chosen)


def mean_class_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Mean over the classes of the accuracy on each."""
    right = (predicted == labels).double()
    counts = torch.bincount(labels)
    return float((torch.bincount(labels, right) / counts).mean())


def main() -> None:
    """Encode (or find the stored keys), fit every method on long tails of both orders, print Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imbalance", description=__doc__)
    parser.add_argument("--recipe", default="recipes/effnet_cifar.yaml", help="data and encoder (default: %(default)s)")
    parser.add_argument("--most", type=int, default=500, help="rows of the largest class (default: %(default)s)")
    parser.add_argument("--fewest", type=int, default=5, help="rows of the smallest class (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="choices of rows (default: %(default)s)")
    given, options = parser.parse_known_args()
    bench, store = Bench.from_config(resolve(["--config", given.recipe, *options])), KeyStore()
    with progress_display(Console(stderr=True)) as progress:
        train, test = (encoded(bench, stage, store, progress) for stage in ("train", "test"))
    keys, queries = train.take(torch.arange(train.rows)), test.take(torch.arange(test.rows))
    print("| mean class accuracy | most to fewest | fewest to most |\n| --- | --- | --- |")
    for name, make in METHODS.items():
        cells = []
        for ascending in (False, True):
            found = []
            for seed in range(given.seeds):
                rows = long_tail(train.labels, given.most, given.fewest, seed, ascending=ascending)
                head = make().fit(keys[rows], train.labels[rows])
                found.append(mean_class_accuracy(head.predict(queries), test.labels))
            cells.append(f"{sum(found) / len(found):.3f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
