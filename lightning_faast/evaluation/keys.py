"""Keys of frozen encoders, encoded once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_faast.associative.files import atomic_path
from lightning_faast.cache import cache_directory
from lightning_faast.evaluation.measure import PeakMemory

_FORMAT = "lightning_faast.keys.v1"
_BLOCK = 4096  # rows read at a time


@dataclass(frozen=True)
class Keys:
    """Keys of one split, on disk.

    Attributes:
        path: The file.
        offset: Where the keys start in it, in bytes.
        rows: N.
        width: d.
        labels: [N] int64.
        seconds: Wall time of the encoding: encoder and the data loading that fed it.
        peak_memory: Bytes by which the encoding raised what the process (on CUDA: the device) holds; None where
            unknown.
    """

    path: Path
    offset: int
    rows: int
    width: int
    labels: Tensor
    seconds: float
    peak_memory: int | None

    def take(self, indices: Tensor) -> Tensor:
        """Keys [n, d] float32 of rows [n] int64, copied: nothing of the file stays in memory beside them."""
        mapped = np.memmap(self.path, np.float32, "r", offset=self.offset, shape=(self.rows, self.width))
        return torch.from_numpy(mapped[indices.numpy()])

    def blocks(self, indices: Tensor, rows: int = _BLOCK) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and labels of rows [n] int64, so many at a time."""
        for chosen in indices.split(rows):
            yield self.take(chosen), self.labels[chosen]


@dataclass(frozen=True)
class Entry:
    """A file of the store.

    Attributes:
        path: The file.
        description: What determines the keys.
        rows: N.
        width: d.
        num_bytes: Size of the file.
    """

    path: Path
    description: dict[str, Any]
    rows: int
    width: int
    num_bytes: int


class KeyStore:
    """Keys on disk, found by what determines them.

    A file's name is a hash of its description (encoder weights, transform, data fingerprint, precision; rows are in the
    order of the split), so that keys of anything else are never found. A file appears whole or not at all, and its
    content is compared with its digest when it is opened.

    Args:
        directory: Where files are kept; ``$LIGHTNING_FAAST_CACHE/keys``, or ``~/.cache/lightning_faast/keys``, where
            not given.

    Example:
        >>> import tempfile, torch
        >>> from lightning_faast.evaluation.keys import KeyStore
        >>> store = KeyStore(tempfile.mkdtemp())
        >>> batches = [(torch.randn(4, 8), torch.zeros(4)), (torch.randn(2, 8), torch.ones(2))]
        >>> made = store.get_or_encode({"encoder": "random"}, rows=6, batches=lambda: batches)
        >>> made.take(torch.tensor([5, 0])).shape, store.get({"encoder": "random"}).labels.tolist()
        (torch.Size([2, 8]), [0, 0, 0, 0, 1, 1])
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.directory = cache_directory("keys") if directory is None else Path(directory)

    def path(self, description: Mapping[str, Any]) -> Path:
        """The file of these keys, whether it is there or not."""
        return self.directory / f"{digest_of(description)}.safetensors"

    def get(self, description: Mapping[str, Any]) -> Keys | None:
        """The keys of this description, or None where they have not been encoded.

        Raises:
            ValueError: Where the file is damaged.
        """
        path = self.path(description)
        return _open(path) if path.is_file() else None

    def get_or_encode(
        self,
        description: Mapping[str, Any],
        rows: int,
        batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    ) -> Keys:
        """The keys of this description, encoded and kept where they are not there yet.

        Args:
            description: What determines the keys; anything that JSON can hold.
            rows: N.
            batches: Yields keys [B, d] and labels [B], N rows in all.

        Raises:
            ValueError: Where there are not N rows, or a key is not finite; nothing is kept then.
            OSError: Where the file cannot be written.
        """
        found = self.get(description)
        if found is None:
            _write(self.path(description), description, rows, batches())
            found = self.get(description)
            assert found is not None
        return found

    def entries(self) -> list[Entry]:
        """What is kept, the newest first."""
        files = sorted(self.directory.glob("*.safetensors"), key=lambda path: -path.stat().st_mtime)
        return [_entry(path) for path in files]

    def clear(self) -> int:
        """Remove all files, those of killed processes too. Returns how many bytes became free."""
        freed = 0
        for path in (*self.directory.glob("*.safetensors"), *self.directory.glob(".*.safetensors.*")):
            freed += path.stat().st_size
            path.unlink()
        return freed


def digest_of(description: Mapping[str, Any]) -> str:
    """32 hexadecimal digits of what JSON can hold, and of functions by name, whatever the order of names."""
    text = json.dumps(description, sort_keys=True, default=_name)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _name(value: Any) -> str:
    """A name that is the same in every process, which an object's address is not.

    Raises:
        TypeError: For what has none.
    """
    if isinstance(value, Path):
        return str(value)
    if not hasattr(value, "__qualname__"):
        raise TypeError(f"{value!r} has no name that lasts: give it as text, a number, or the path of a class.")
    return f"{value.__module__}.{value.__qualname__}"


def fingerprint(encoder: nn.Module) -> str:
    """32 hexadecimal digits of what an encoder computes: its class, plain attributes, structure and weights.

    Args:
        encoder: Any module. Versions of torch and of the library that defines the class are part of it.
    """
    state = hashlib.sha256()
    plain = {name: value for name, value in vars(encoder).items() if not name.startswith("_") and _is_plain(value)}
    plain.pop("training", None)
    modules = {type(module).__module__.partition(".")[0] for module in encoder.modules()} - {"__main__"}
    about = (type(encoder).__qualname__, plain, repr(encoder), {name: _version(name) for name in sorted(modules)})
    state.update(repr(about).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return state.hexdigest()[:32]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for part in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return isinstance(value, str | int | float | bool | None)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# ---------------------------------------------------------------------- files


def _write(path: Path, description: Mapping[str, Any], rows: int, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write batches as they come: no more than one is in memory."""
    peak = PeakMemory()
    start = time.perf_counter()
    with atomic_path(path) as temporary:
        writer: _Writer | None = None
        for keys, labels in batches:
            if writer is None:
                writer = _Writer(temporary, description, rows, keys.shape[1])
            writer.add(keys, labels)
        if writer is None:
            raise ValueError("There are no rows to encode.")
        writer.close(time.perf_counter() - start, peak.growth())


class _Writer:
    """A safetensors file of known size: labels, costs and digest in front, then the keys as they come."""

    def __init__(self, path: Path, description: Mapping[str, Any], rows: int, width: int) -> None:
        self.labels = np.zeros(rows, np.int64)
        self.shape = (rows, width)
        self.rows = 0
        self.digest = hashlib.blake2b(digest_size=32)
        self.file = open(path, "r+b")  # noqa: SIM115 - closed with the last row
        tensors = {"labels": ("I64", [rows], 8 * rows), "costs": ("F64", [2], 16), "digest": ("U8", [32], 32)}
        tensors["keys"] = ("F32", [rows, width], 4 * rows * width)
        metadata = {"format": _FORMAT, "description": json.dumps(description, default=_name)}
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, (dtype, shape, size) in tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the tensors start on a multiple of 8 bytes
        self.file.write(struct.pack("<Q", len(text)) + text)
        self.front = self.file.tell()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.file.fileno(), 0, self.front + end)  # a full disk fails now, not after hours
        self.file.seek(self.front + end - 4 * rows * width)

    def add(self, keys: Tensor, labels: Tensor) -> None:
        rows, width = self.shape
        end = self.rows + len(keys)
        if end > rows:
            raise ValueError(f"There are more rows than the {rows} that were announced.")
        if keys.ndim != 2 or keys.shape[1] != width or len(labels) != len(keys):
            raise ValueError(
                f"keys must be [B, {width}] with one label each, got {tuple(keys.shape)} and {tuple(labels.shape)}."
            )
        block = np.ascontiguousarray(keys.detach().float().cpu().numpy())
        if not np.isfinite(block).all():
            raise ValueError(
                f"The encoder gave NaN or infinite keys for rows {self.rows} to {end - 1}. Look at these examples and "
                "at the encoder's precision (--trainer.precision)."
            )
        self.file.write(block.data)
        self.digest.update(block.data)
        self.labels[self.rows : end] = labels.cpu().numpy()
        self.rows = end

    def close(self, seconds: float, peak_memory: int | None) -> None:
        if self.rows != len(self.labels):
            raise ValueError(f"{len(self.labels)} rows were announced, and {self.rows} came.")
        self.digest.update(self.labels.data)
        self.file.seek(self.front)
        self.file.write(self.labels.data)
        self.file.write(struct.pack("<2d", seconds, np.nan if peak_memory is None else peak_memory))
        self.file.write(self.digest.digest())
        self.file.close()


def _digest(keys: np.ndarray, labels: np.ndarray) -> bytes:
    state = hashlib.blake2b(digest_size=32)
    for begin in range(0, len(keys), _BLOCK):
        state.update(np.ascontiguousarray(keys[begin : begin + _BLOCK]).data)
    state.update(np.ascontiguousarray(labels).data)
    return state.digest()


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                raise ValueError(f"{path} holds no keys. Remove it.")
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it; the keys will be encoded again.") from error


def _open(path: Path) -> Keys:
    with _reading(path) as file:
        labels, costs, digest = (file.get_tensor(name) for name in ("labels", "costs", "digest"))
        rows, width = file.get_slice("keys").get_shape()
    offset = path.stat().st_size - 4 * rows * width  # the keys are the file's last tensor
    keys = np.memmap(path, np.float32, "r", offset=offset, shape=(rows, width))
    if _digest(keys, labels.numpy()) != digest.numpy().tobytes():
        raise ValueError(f"{path} is damaged: its content has changed. Remove it; the keys will be encoded again.")
    seconds, peak = costs.tolist()
    return Keys(path, offset, rows, width, labels, seconds, None if np.isnan(peak) else int(peak))


def _entry(path: Path) -> Entry:
    with _reading(path) as file:
        rows, width = file.get_slice("keys").get_shape()
        description = json.loads(file.metadata()["description"])
    return Entry(path, description, rows, width, path.stat().st_size)
