"""The examples of the public docstrings run."""

import doctest
import importlib
from pathlib import Path

import pytest

import lightning_faast

PACKAGE = Path(lightning_faast.__file__).parent
MODULES = sorted(
    ".".join(["lightning_faast", *path.relative_to(PACKAGE).with_suffix("").parts])
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8") and path.parent.name != "associative"  # those have their own test
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
