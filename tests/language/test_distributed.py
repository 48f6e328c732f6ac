"""Two real processes (gloo) learn every token exactly once, as one process does."""

import os
import subprocess
import sys

import torch

from tests.conftest import ROOT
from tests.language.projects import save_model, text


def test_two_processes_equal_one(tmp_path):
    folder = save_model(tmp_path / "model")
    file = tmp_path / "text.txt"
    file.write_text(text(60), encoding="utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "LIGHTNING_FAAST_CACHE": str(tmp_path),
    }
    for processes in ("1", "2"):  # 13 windows: the sampler gives the second process one of the first's again
        out = str(tmp_path / f"out{processes}")
        command = [sys.executable, "-m", "tests.language.fit", "--model", str(folder), "--text", str(file)]
        run = subprocess.run(
            [*command, "--out", out, "--processes", processes],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
    one, *two = (torch.load(tmp_path / name) for name in ("out1.rank0.pt", "out2.rank0.pt", "out2.rank1.pt"))
    for rank in two:
        assert rank["faast/rows"] == one["faast/rows"] == 13 * 31
        torch.testing.assert_close(rank["weight"], one["weight"], rtol=1e-4, atol=1e-6)
    assert torch.equal(two[0]["weight"], two[1]["weight"])
