"""What the README prints runs as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["callback", "estimator"])
def test_python_blocks_reach_an_accuracy(tmp_path: Path, block: str) -> None:
    (tmp_path / "block.py").write_text(block)
    run = subprocess.run(
        [sys.executable, "block.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    accuracy = re.search(r"^accuracy (0\.\d+)$", run.stdout, re.MULTILINE)
    assert accuracy is not None, run.stdout
    assert float(accuracy[1]) >= 0.89


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
