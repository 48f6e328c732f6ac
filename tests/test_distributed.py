"""Two real processes (gloo) count every row exactly once, as one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_faast.associative import load_statistics
from lightning_faast.distributed import RowCounter
from tests.conftest import ROOT


def fit(out: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.scripts.fit", "--out", str(out), *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def same_sums(a: Path, b: Path) -> None:
    one, two = load_statistics(a), load_statistics(b)
    assert one.rows == two.rows
    assert one.count == two.count
    for name in ("gram", "cross", "key_sum", "value_sum"):
        left, right = getattr(one, name), getattr(two, name)
        assert float((left - right).norm() / left.norm()) < 1e-13, name


@pytest.mark.parametrize(
    ("loader", "rows", "epochs"),
    [
        ("plain", 101, 1),
        ("shuffled", 101, 2),
        pytest.param("seeded-subset", 37, 1, marks=pytest.mark.slow),
        pytest.param("plain", 3, 1, marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(tmp_path: Path, loader: str, rows: int, epochs: int) -> None:
    for processes in ("1", "2"):
        # One process reads the subset in order: the same rows, whatever the order.
        kind = "plain" if processes == "1" else loader
        run = fit(
            tmp_path / processes, "--processes", processes, "--rows", str(rows), "--loader", kind,
            "--epochs", str(epochs),
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
    assert load_statistics(tmp_path / "2").rows == rows * epochs
    same_sums(tmp_path / "1", tmp_path / "2")
    ranks = [torch.load(tmp_path / f"2.rank{r}.pt") for r in (0, 1)]
    assert torch.equal(ranks[0]["weight"], ranks[1]["weight"])
    assert ranks[0]["faast/rows"] == rows * epochs
    single = torch.load(tmp_path / "1.rank0.pt")
    if loader == "plain":  # the same rows at the same positions: the same reservoir, so the same temperature
        torch.testing.assert_close(ranks[0]["weight"], single["weight"], rtol=1e-5, atol=1e-6)
        assert ranks[0]["faast/temperature"] == pytest.approx(single["faast/temperature"], rel=1e-6)
        held = [torch.load(tmp_path / f"{p}.reservoir.pt") for p in ("1", "2")]
        assert held[0]["priorities"].sort().values.tolist() == held[1]["priorities"].sort().values.tolist()


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ("weighted", "sampler is a DistributedSamplerWrapper"),
        pytest.param("subset", "sampler is a DistributedSamplerWrapper", marks=pytest.mark.slow),
        ("iterable", "IterableDataset (Stream)"),
    ],
)
def test_samplers_that_cannot_be_counted_are_refused(tmp_path: Path, loader: str, message: str) -> None:
    run = fit(tmp_path / "out", "--processes", "2", "--loader", loader)
    assert run.returncode != 0
    assert message in run.stderr


@pytest.mark.slow
def test_a_fast_weights_head_predicts_the_same_on_every_process(tmp_path: Path) -> None:
    run = fit(tmp_path / "out", "--processes", "2", "--fast-weights")
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"out.rank{r}.pt") for r in (0, 1)]
    assert torch.equal(ranks[0]["logits"], ranks[1]["logits"])
    assert ranks[0]["val_acc"] > 0.6


def test_positions_of_a_distributed_sampler() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(11))
    seen: list[int] = []
    for rank in range(3):
        sampler = torch.utils.data.DistributedSampler(data, num_replicas=3, rank=rank, shuffle=False)
        counter = RowCounter.for_loader(torch.utils.data.DataLoader(data, batch_size=2, sampler=sampler), 3, rank)
        for batch in torch.tensor(list(sampler)).split(2):
            positions = counter.positions(len(batch))
            kept = counter.keep(positions)
            seen += (batch if kept is None else batch[kept]).tolist()
    assert sorted(seen) == list(range(11))


def test_a_loader_without_a_length_is_counted_by_one_process() -> None:
    counter = RowCounter.for_loader(iter([]), 1, 0)
    assert counter.length is None
    assert counter.keep(counter.positions(4)) is None
