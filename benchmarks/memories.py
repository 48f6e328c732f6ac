"""Fast weights against memories of the same rows: bytes to go on learning, and time of a prediction."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Row, Section, Settings, Target, interleave, samples
from lightning_faast.associative import KNN, FastWeights, SoftmaxMemory

TITLE = "Memories"
_CLASSES, _WIDTH = 10, 384
_SPEED = Target("at least", 50, "times faster")
_BYTES = Target("at most", 0.05, "of the memory's bytes")


def run(settings: Settings) -> Section:
    """Measure; faiss-cpu (``pip install faiss-cpu``) is the named peer of exact nearest neighbours."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    sizes = (500, 2_000) if settings.quick else (5_000, 50_000)
    section = Section(
        TITLE,
        f"Unit-norm keys of width {_WIDTH}, {_CLASSES} classes. `faiss.IndexFlatL2.search` with k 10 only finds the "
        "neighbours; fast weights answer with probabilities. All with the same number of threads.",
    )
    for rows in sizes:
        keys, labels = _rows(rows)
        fast = FastWeights(_WIDTH, _CLASSES).fit(keys, labels).eval()
        knn, softmax = KNN(_WIDTH, _CLASSES).fit(keys, labels), SoftmaxMemory(_WIDTH, _CLASSES).fit(keys, labels)
        index = faiss.IndexFlatL2(_WIDTH)
        index.add(keys.numpy())
        for name, bytes_ in (("`KNN`", knn.bytes_to_update), ("`SoftmaxMemory`", softmax.bytes_to_update)):
            target = _BYTES if rows == sizes[-1] and not settings.quick else Target()
            ours, theirs = samples([fast.bytes_to_update], "B"), samples([bytes_], "B")
            section.rows.append(Row.compare(f"`FastWeights`, bytes to update, N {rows:,}", ours, name, theirs, target))
        for batch in (1, 256):
            queries, _ = _rows(batch, seed=1)
            found: np.ndarray = queries.numpy()
            calls = 2_000 if batch == 1 else 200
            subjects = {
                "fast": lambda fast=fast, queries=queries, calls=calls: _repeat(fast, queries, calls),
                "faiss": lambda index=index, found=found: index.search(found, 10),
                "knn": lambda knn=knn, queries=queries: knn(queries),
                "softmax": lambda softmax=softmax, queries=queries: softmax(queries),
            }
            with torch.inference_mode():
                measured = interleave(subjects, settings.runs)
            ours = samples([seconds / calls for seconds in measured["fast"]])
            for peer, name in (("faiss", "`faiss.IndexFlatL2`"), ("knn", "`KNN`"), ("softmax", "`SoftmaxMemory`")):
                target = _SPEED if peer == "faiss" and rows == sizes[-1] and not settings.quick else Target()
                what = f"`FastWeights`, a prediction, batch {batch}, N {rows:,}"
                section.rows.append(Row.compare(what, ours, name, samples(measured[peer]), target))
    return section


def _repeat(layer: FastWeights, keys: Tensor, calls: int) -> None:
    for _ in itertools.repeat(None, calls):
        layer(keys)


def _rows(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(_CLASSES, _WIDTH, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(n) % _CLASSES
    keys = centers[labels] + 2 * torch.randn(n, _WIDTH, generator=generator)
    return torch.nn.functional.normalize(keys, dim=-1), labels
