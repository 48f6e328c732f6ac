"""The whole solve (decomposition, GCV over its grid, read-out) against one ridge by ``torch.linalg.eigh``."""

from __future__ import annotations

import torch

from benchmarks.harness import Row, Section, Settings, Target, interleave, samples
from lightning_faast.associative import FastWeights

TITLE = "Regularization path"
TARGET = Target("at most", 1.2)
_CLASSES = 10


def run(settings: Settings) -> Section:
    """Measure."""
    widths = (64,) if settings.quick else (384, 768, 1280)
    section = Section(
        TITLE,
        f"From sums already there, c {_CLASSES}, N 4 d, no reservoir. Ours: `solve()`, all of it: centring, "
        "decomposition, GCV over the whole grid, read-out, figures of the solution. The peer is handed the centred "
        "float64 Gram matrix and a ridge: `torch.linalg.eigh`, then `U ((U^T C) / (lambda + mu))`.",
    )
    for width in widths:
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(4 * width, width, generator=generator)
        labels = torch.arange(len(keys)) % _CLASSES
        keys[:, :_CLASSES] += 2 * torch.nn.functional.one_hot(labels, _CLASSES)
        models = {
            "regression": FastWeights(readout="regression", reservoir_size=0).partial_fit(keys, labels),
            "discriminant": FastWeights(readout="discriminant", reservoir_size=0).partial_fit(keys, labels),
        }
        centred = keys.double() - keys.double().mean(0)
        gram, cross = centred.T @ centred, centred.T @ torch.nn.functional.one_hot(labels, _CLASSES).double()

        def ridge(gram: torch.Tensor = gram, cross: torch.Tensor = cross) -> torch.Tensor:
            eigenvalues, basis = torch.linalg.eigh(gram)
            return basis @ ((basis.T @ cross) / (eigenvalues + 1.0)[:, None])

        subjects = {"ridge": ridge} | {name: model.solve for name, model in models.items()}
        measured = interleave(subjects, settings.runs)
        for name, model in models.items():
            assert model.solution is not None
            grid = model.solution.regularization.grid
            assert grid is not None
            section.rows.append(
                Row.compare(
                    f"`solve()`, {name}, d {width}, {len(grid)} ridges",
                    samples(measured[name]),
                    "one ridge by `torch.linalg.eigh`",
                    samples(measured["ridge"]),
                    TARGET,
                )
            )
    return section
