"""What the README prints runs as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.language.projects import save_model, text

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def printed_by(block: str, folder: Path) -> str:
    (folder / "block.py").write_text(block)
    run = subprocess.run(
        [sys.executable, "block.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("block", [block for block in BLOCKS if "accuracy" in block], ids=["callback", "estimator"])
def test_python_blocks_reach_an_accuracy(tmp_path: Path, block: str) -> None:
    out = printed_by(block, tmp_path)
    accuracy = re.search(r"^accuracy (0\.\d+)$", out, re.MULTILINE)
    assert accuracy is not None, out
    assert float(accuracy[1]) >= 0.89


def test_a_language_model_learns_a_text(tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if "FastWeightLM" in block)
    assert "accuracy" not in block
    assert len([line for line in block.splitlines() if line]) <= 10
    save_model(tmp_path / "model")
    (tmp_path / "my_text.txt").write_text(text(120), encoding="utf-8")
    block = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "model").replace(", 512)", ", 48)")
    out = printed_by(block.replace("In the beginning", "the cat"), tmp_path)
    before, after = re.search(r"held-out perplexity ([0-9.]+) to ([0-9.]+)", out).groups()
    assert float(after) < float(before)
    assert out.splitlines()[-1].startswith("the cat")


def test_exactly_two_commands_set_up_everything() -> None:
    whole = [c.strip() for c in COMMANDS if "python3 -m venv" in c]
    assert len(whole) == 2
    assert all("\n" not in c for c in whole)
    assert whole[0].endswith("-m lightning_faast fit --config recipes/quickstart.yaml")
    assert whole[1].endswith("-m pytest")


def test_every_file_that_is_named_exists() -> None:
    names = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"--config (\S+\.yaml)", README)
    assert len(names) > 6
    assert [name for name in names if not (ROOT / name).is_file()] == []
