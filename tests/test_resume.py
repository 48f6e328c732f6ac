"""A pass that was killed in its middle goes on where it was, or is refused."""

import signal
from pathlib import Path

import pytest
import torch

from tests.test_distributed import fit, same_sums


@pytest.mark.parametrize(
    ("processes", "head"),
    [
        ("1", ""),
        pytest.param("1", "net.fc", marks=pytest.mark.slow),
        pytest.param("2", "net.fc", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(tmp_path: Path, processes: str, head: str) -> None:
    common = ("--processes", processes, "--loader", "stateful", "--save-statistics", "--head", head)
    killed = fit(tmp_path / "killed", *common, "--die-after", "4")
    assert killed.returncode in (-signal.SIGKILL, 1), killed.stderr[-2000:]
    checkpoint = tmp_path / "killed.half.ckpt"
    torch.load(checkpoint, weights_only=True)
    resumed = fit(tmp_path / "resumed", *common, "--ckpt-path", str(checkpoint))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    whole = fit(tmp_path / "whole", *common)
    assert whole.returncode == 0, whole.stderr[-3000:]
    same_sums(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        ("plain", ("--save-statistics",), "a DataLoader cannot go on there"),
        ("stateful", (), "holds no statistics"),
    ],
)
def test_what_cannot_go_on_is_refused(tmp_path: Path, loader: str, options: tuple[str, ...], message: str) -> None:
    fit(tmp_path / "killed", "--loader", loader, *options, "--die-after", "4")
    run = fit(tmp_path / "resumed", "--loader", loader, *options, "--ckpt-path", str(tmp_path / "killed.half.ckpt"))
    assert run.returncode != 0
    assert message in run.stderr
