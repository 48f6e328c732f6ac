"""Where and in which precision sums are kept."""

import warnings
from functools import cache

import torch

#: Unit round-off of float64, 2^-53: the scale of every rounding bound in this package.
UNIT_ROUNDOFF = 2.0**-53


@cache
def _device_type_has_float64(device_type: str) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=device_type)
    except (TypeError, RuntimeError):
        warnings.warn(
            f"Device type {device_type!r} has no float64: the statistics are accumulated on the CPU.", stacklevel=3
        )
        return False
    return True


def accumulation_device(device: torch.device) -> torch.device:
    """The device on which float64 sums of tensors of ``device`` are kept: itself, or the CPU where it has no float64.

    A float32 Gram matrix loses every digit of an ill-conditioned solve, so there is no float32 fallback.
    """
    return device if _device_type_has_float64(device.type) else torch.device("cpu")
