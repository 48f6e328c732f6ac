"""Where this package keeps what it would otherwise compute again."""

import os
from pathlib import Path

#: Environment variable that says where.
CACHE_VARIABLE = "LIGHTNING_FAAST_CACHE"


def cache_directory(kind: str) -> Path:
    """The folder for one kind of things: ``$LIGHTNING_FAAST_CACHE/KIND``, or ``~/.cache/lightning_faast/KIND``."""
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root) if root else Path.home() / ".cache" / "lightning_faast") / kind
