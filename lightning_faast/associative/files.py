"""Statistics on disk: safetensors, written atomically, G as a packed triangle."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_faast.associative.statistics import SufficientStatistics

_FORMAT = "lightning_faast.statistics.v1"


def save_statistics(statistics: SufficientStatistics, path: str | os.PathLike[str]) -> Path:
    """Write statistics to a safetensors file.

    The file appears whole or not at all: it is written beside its destination, flushed to disk and renamed, so that a
    full disk or a killed process leaves what was there before.

    Args:
        statistics: With at least one row.
        path: The file; its folder is made where missing.

    Returns:
        The path.

    Raises:
        OSError: Where the file cannot be written; what was there before is unchanged.

    Example:
        >>> import tempfile, torch
        >>> from lightning_faast.associative import SufficientStatistics, load_statistics, save_statistics
        >>> statistics = SufficientStatistics(2).update(torch.randn(10, 4), torch.arange(10) % 2)
        >>> path = save_statistics(statistics, tempfile.mkdtemp() + "/digits.safetensors")
        >>> load_statistics(path).rows
        10
    """
    return save_tensors(statistics.state_dict(), path, {"format": _FORMAT})


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str]) -> Path:
    """Write tensors to a safetensors file, whole or not at all; as :func:`save_statistics`."""
    state = {name: t.cpu().contiguous() for name, t in tensors.items()}
    destination = Path(path)
    try:
        with atomic_path(destination) as temporary:
            mode = temporary.stat().st_mode  # as the umask has it; save_file's own can only be read by their owner
            save_file(state, temporary, metadata=metadata)
            temporary.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{destination} could not be written: {error}") from error
    return destination


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a UTF-8 text file, whole or not at all; as :func:`save_statistics`."""
    destination = Path(path)
    with atomic_path(destination) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return destination


@contextmanager
def atomic_path(destination: Path) -> Iterator[Path]:
    """An empty file beside ``destination``, which takes its place when the block ends and is removed if it raises."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}")
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)


def load_statistics(
    path: str | os.PathLike[str], num_classes: int | None = None, device: str = "cpu"
) -> SufficientStatistics:
    """Read statistics written by :func:`save_statistics`.

    Args:
        path: The file.
        num_classes: Where given, the file must agree.
        device: Where the sums are put.

    Raises:
        FileNotFoundError: Where there is no such file.
        ValueError: Where the file is damaged or something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No statistics file at {path}.")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}. Write it again.") from error
    statistics = SufficientStatistics(num_classes)
    statistics.load_state_dict(state)
    return statistics.to(device) if device != "cpu" else statistics
