"""Optional libraries, imported when first needed."""

from importlib import import_module
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import a module of an optional dependency.

    Args:
        module: Dotted name of the module.
        extra: The extra of this package that installs it.

    Raises:
        ImportError: Where it is not installed; the message holds the line that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # installed, but something that it needs is not
        raise ImportError(
            f"This needs {module.split('.')[0]}, which is not installed. Install it with: "
            f'pip install "lightning-faast[{extra}]"'
        ) from error
