"""The examples in the docstrings run as printed, and the public names are those of the package."""

import doctest
import importlib
import pkgutil

import pytest

from lightning_faast import associative

MODULES = [
    associative.__name__,
    *(f"{associative.__name__}.{m.name}" for m in pkgutil.iter_modules(associative.__path__)),
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
    assert module.__doc__


def test_public_names():
    public = {"FastWeights", "SufficientStatistics", "GCV", "Ridge", "Truncation", "PaperRule", "LeaveOneOut"}
    assert public <= set(associative.__all__)
    for name in associative.__all__:
        assert getattr(associative, name).__doc__, name
