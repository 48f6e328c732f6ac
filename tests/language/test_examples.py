"""The examples in the docstrings run as printed, and the public names are documented."""

import doctest
import importlib
import pkgutil

import pytest

from lightning_faast import language

MODULES = [language.__name__, *(f"{language.__name__}.{m.name}" for m in pkgutil.iter_modules(language.__path__))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
    assert module.__doc__


def test_public_names():
    for name in language.__all__:
        assert getattr(language, name).__doc__, name
