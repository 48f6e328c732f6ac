"""The examples of the public docstrings run."""

import doctest
import importlib
from pathlib import Path

import pytest

PUBLIC = [
    "lightning_faast.callback",
    "lightning_faast.module",
    "lightning_faast.encoders.vision",
    "lightning_faast.data.images",
    "lightning_faast.data.digits",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
