"""The solve at the end of a pass, and sums and solve together, against the paper's float32 pseudoinverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Row, Section, Settings, Target, interleave, samples
from lightning_faast.associative import FastWeights, PaperRule

TITLE = "Solve"
TARGET = Target("at least", 6)
_ALPHA = 0.8


def run(settings: Settings) -> Section:
    """Measure."""
    rows, width, classes = (400, 32, 4) if settings.quick else (20_000, 768, 10)
    rtol = rows**-_ALPHA
    section = Section(
        TITLE,
        f"Float32 keys, N {rows:,}, d {width}, c {classes}, singular values from 1 to 1/spectrum, evenly on a log "
        f"scale. `solve()` is what is left to do when the pass has ended: decomposition, choice of the regularization, "
        f"read-out; with leave-one-out, also the scores of 1,000 keys and the temperature. `fit(keys, labels)` is that "
        f"and the sums, which a pass adds up as it encodes: checks, float64 products, the reservoir. The peer, which "
        f"keeps all keys, has them and its one-hot values ready, and starts when the pass has ended. The ratio is the "
        f"peer's time over ours.",
    )
    for spectrum in (1e2, 1e6):
        keys, labels = keys_and_labels(rows, width, classes, spectrum)
        values = functional.one_hot(labels, classes).float()
        found: dict[str, Tensor] = {}

        def pinv(keys: Tensor = keys, values: Tensor = values, found: dict[str, Tensor] = found) -> None:
            found["pinv"] = (torch.linalg.pinv(keys, rtol=rtol) @ values).T

        ours = {
            "`FastWeights(regularization=PaperRule())`, no leave-one-out": lambda: FastWeights(
                regularization=PaperRule(_ALPHA), reservoir_size=0
            ),
            "`FastWeights(regularization=PaperRule())`, with leave-one-out": lambda: FastWeights(
                regularization=PaperRule(_ALPHA)
            ),
            "`FastWeights()` (GCV, discriminant), no leave-one-out": lambda: FastWeights(reservoir_size=0),
            "`FastWeights()` (GCV, discriminant), with leave-one-out": lambda: FastWeights(),
        }

        def fitting(
            name: str,
            make: Callable[[], FastWeights],
            keys: Tensor = keys,
            labels: Tensor = labels,
            found: dict[str, Tensor] = found,
        ) -> Callable[[], None]:
            def fit() -> None:
                solution = make().fit(keys, labels).solution
                assert solution is not None
                found[name] = solution.weight

            return fit

        def solving(make: Callable[[], FastWeights], keys: Tensor = keys, labels: Tensor = labels) -> Callable[[], Any]:
            model = make()
            model.update(keys, labels)
            return model.solve

        def scale(keys: Tensor = keys) -> None:
            wide = keys.double()
            torch.linalg.eigh(wide.T @ wide)

        subjects: dict[str, Callable[[], Any]] = {"pinv": pinv, "scale": scale}
        subjects |= {f"`solve()`, {name}": solving(make) for name, make in ours.items()}
        subjects |= {f"`fit(keys, labels)`, {name}": fitting(name, make) for name, make in ours.items()}
        measured = interleave(subjects, settings.runs)
        left, singular, right = torch.linalg.svd(keys.double(), full_matrices=False)
        kept = int((singular > rtol * singular[0]).sum())
        exact = ((values.double().T @ left[:, :kept]) / singular[:kept]) @ right[:kept]
        peer = f"float32 `torch.linalg.pinv(K, rtol=N^-{_ALPHA}) @ V`"
        for name in [name for name in subjects if name.startswith("`")]:
            section.rows.append(
                Row.compare(
                    f"{name}, spectrum {spectrum:g}",
                    samples(measured[name]),
                    peer,
                    samples(measured["pinv"]),
                    TARGET,
                )
            )
        errors = {name: _relative_error(found[name], exact) for name in found if "GCV" not in name}
        listed = ", ".join(f"{name if '`' in name else peer} {error:.1e}" for name, error in errors.items())
        section.notes.append(
            f"Spectrum {spectrum:g} ({kept} of {width} singular values kept), relative error of W against a float64 "
            f"SVD: {listed}."
        )
        section.notes.append(
            f"For scale, spectrum {spectrum:g}: a float64 `K^T K` and its `torch.linalg.eigh`, and nothing else, take "
            f"{samples(measured['scale'])}."
        )
    section.notes.append(
        "`FastWeights()` computes another estimator than the pseudoinverse: there is no error to state."
    )
    return section


def keys_and_labels(rows: int, width: int, classes: int, spectrum: float) -> tuple[Tensor, Tensor]:
    """Float32 keys [N, d] of singular values 1 ... 1/spectrum, and balanced labels [N] that depend on them."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(rows, width, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    singular = torch.logspace(0, -torch.tensor(spectrum).log10().item(), width, dtype=torch.float64)
    labels = (left @ torch.randn(width, classes, generator=generator, dtype=torch.float64)).argmax(1)
    return ((left * singular) @ right.T).float(), labels


def _relative_error(weight: Tensor, exact: Tensor) -> float:
    return float((weight.double() - exact).norm() / exact.norm())
