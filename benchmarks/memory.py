"""How much the peak memory of a pass grows with the number of rows, against storing the keys."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import Row, Samples, Section, Settings, Target, in_turn, samples
from lightning_faast.associative import FastWeights, save_statistics

TITLE = "Memory"
TARGET = Target("at most", 0.05, "of storing the keys")
_CLASSES = 10
_BATCH = 256


def run(settings: Settings) -> Section:
    """Measure."""
    width, small, large = (64, 1_500, 21_500) if settings.quick else (768, 5_000, 50_000)
    runs = 1 if settings.quick else settings.runs
    stored_bytes = 4 * (large - small) * width

    def peaks(mode: str, rows: int) -> list[float]:
        command = [sys.executable, "-m", "benchmarks.memory", mode, str(rows), str(width)]
        root = Path(__file__).resolve().parents[1]
        printed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
        return [float(word) for word in printed.split()]

    measured = in_turn(
        {f"{mode} {rows}": partial(peaks, mode, rows) for rows in (small, large) for mode in ("learn", "store")}, runs
    )
    peak = {
        f"{what} {rows}": samples([run[index] for run in measured[f"{mode} {rows}"]], "B")
        for rows in (small, large)
        for what, mode, index in (("pass", "learn", 0), ("solve", "learn", 1), ("store", "store", 0))
    }

    def growth(what: str) -> Samples:
        pairs = zip(peak[f"{what} {small}"].values, peak[f"{what} {large}"].values, strict=True)
        return samples([after - before for before, after in pairs], "B")

    section = Section(
        TITLE,
        f"Peak resident memory, growth from N {small:,} to N {large:,}: synthetic float32 keys made batch by batch "
        f"({_BATCH} rows), d {width}, c {_CLASSES}, every N in a fresh process, reservoir of 1,000 keys on. "
        "Storing the keys is 4 N d bytes.",
    )
    arithmetic = samples([float(stored_bytes)] * runs, "B")
    for mode, what in (("pass", "`update` over all batches"), ("solve", "`update` over all batches, then `solve()`")):
        section.rows.append(
            Row.compare(what, growth(mode), f"keys stored: 4 · {large - small:,} · {width} bytes", arithmetic, TARGET)
        )
    section.rows.append(
        Row.compare(
            "`update` over all batches, against measured memory",
            growth("pass"),
            "the same batches kept in a list, measured",
            growth("store"),
            TARGET,
        )
    )
    section.notes = [
        f"Peaks of the whole process, torch included: N {small:,} {peak[f'pass {small}']} (with the solve "
        f"{peak[f'solve {small}']}), N {large:,} {peak[f'pass {large}']} ({peak[f'solve {large}']}), keys kept, N "
        f"{large:,}: {peak[f'store {large}']}.",
        "Peaks with the solve, run by run, MB: "
        + "; ".join(
            f"N {rows:,}: {', '.join(f'{value / 1e6:.0f}' for value in peak[f'solve {rows}'].values)}"
            for rows in (small, large)
        )
        + ".",
        _bytes(width, small),
    ]
    return section


def _bytes(width: int, rows: int) -> str:
    """What must be kept, to predict and to go on learning."""
    with tempfile.TemporaryDirectory() as folder:
        model = _learn(rows, width)
        model.solve()
        size = save_statistics(model.statistics, Path(folder, "sums.safetensors")).stat().st_size
    parts = {
        "to predict": model.bytes_to_predict,
        "to update, sums alone (G as a packed triangle)": model.statistics.num_bytes,
        "the file of `save_statistics`": size,
        "to update, with the reservoir of 1,000 keys": model.bytes_to_update,
    }
    listed = ", ".join(f"{what} {number:,}" for what, number in parts.items())
    return f"Bytes, d {width}, c {_CLASSES}: {listed}; the same for every N. G in full would be {8 * width**2:,}."


def _batches(rows: int, width: int) -> list[tuple[int, int]]:
    return [(first, min(_BATCH, rows - first)) for first in range(0, rows, _BATCH)]


def _learn(rows: int, width: int) -> FastWeights:
    generator = torch.Generator().manual_seed(0)
    model = FastWeights(width, _CLASSES)
    for first, count in _batches(rows, width):
        keys = torch.randn(count, width, generator=generator)
        model.update(keys, torch.arange(first, first + count) % _CLASSES)
    return model


def _peak_bytes() -> int:
    """Peak resident memory of this process.

    Linux hands ``ru_maxrss`` down to a child across fork and exec: after a parent that was larger, it says nothing of
    the child. The high-water mark of the address space itself starts anew.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _main() -> None:
    parser = argparse.ArgumentParser(description="Print the peak memory of a pass, then of its solve.")
    parser.add_argument("mode", choices=["learn", "store"])
    parser.add_argument("rows", type=int)
    parser.add_argument("width", type=int)
    arguments = parser.parse_args()
    if arguments.mode == "store":
        generator = torch.Generator().manual_seed(0)
        kept = [
            torch.randn(count, arguments.width, generator=generator)
            for _, count in _batches(arguments.rows, arguments.width)
        ]
        assert sum(map(len, kept)) == arguments.rows
    else:
        model = _learn(arguments.rows, arguments.width)
        print(_peak_bytes())
        model.solve()
    print(_peak_bytes())


if __name__ == "__main__":
    _main()
