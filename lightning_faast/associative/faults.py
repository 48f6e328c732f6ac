"""Bad rows: refused at once, noted where that would mean waiting for a device, and told to all processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_faast.associative.batches import faults_of, refuse

#: Classes are inferred from labels up to here; a label beyond it is more likely an identifier, or a mistake.
MAX_INFERRED_CLASSES = 2**18
#: On devices where reading a flag means waiting for the device, bad rows are looked for once in so many batches.
_CHECK_EVERY = 64


class FaultLog:
    """Checks the batches of one stream of keys and labels.

    Args:
        num_classes: Labels must lie in ``[0, num_classes)``; below 2^18 where None.
    """

    def __init__(self, num_classes: int | None = None) -> None:
        self.num_classes = MAX_INFERRED_CLASSES if num_classes is None else num_classes
        self._batches = 0
        self._noted: list[Tensor] = []

    def check(self, keys: Tensor, labels: Tensor) -> None:
        """Check one batch: keys [N, d] and labels [N].

        Raises:
            ValueError: For NaN or infinite keys and labels out of range, on the CPU; elsewhere every 64 batches.
        """
        faults = faults_of(keys, labels.to(keys.device), None, self.num_classes)
        if keys.device.type == "cpu":
            refuse(faults, self._batches, self.num_classes)
        else:
            self._noted.append(faults)
        self._batches += 1
        if len(self._noted) == _CHECK_EVERY:
            self.verify()

    def verify(self) -> None:
        """Raise for bad batches that were noted but not yet reported.

        Raises:
            ValueError: Naming the first bad batch; the rows cannot be used.
        """
        if not self._noted:
            return
        table = torch.stack(self._noted).cpu()
        first = self._batches - len(self._noted)
        for batch, faults in enumerate(table, first):
            refuse(faults, batch, self.num_classes)
        self._noted.clear()


def told_to_all(
    faults: FaultLog, numbers: list[int], gather: Callable[[Tensor], list[Tensor]], device: torch.device
) -> Tensor:
    """What every process says of itself, [processes, numbers] int64 on the CPU.

    Args:
        faults: Of this process's stream.
        numbers: What this process says.
        gather: Collects a tensor of one shape and dtype from every process.
        device: Of the communication.

    Raises:
        ValueError: On every process, where one has bad rows, so that none waits for the others.
    """
    bad = None
    try:
        faults.verify()
    except ValueError as error:
        bad = error
    table = torch.stack(gather(torch.tensor([int(bad is not None), *numbers], device=device))).cpu()
    if bad is not None:
        raise bad
    if bool(table[:, 0].any()):
        raise ValueError("Another process saw bad rows (NaN, or a label out of range); it names the batch.")
    return table[:, 1:]


def agreed_width(widths: Tensor) -> int:
    """The one width of the keys of all processes that saw rows.

    Raises:
        ValueError: Where they differ.
    """
    distinct = widths.unique().tolist()
    if len(distinct) > 1:
        raise ValueError(f"Processes hold keys of different widths: {', '.join(map(str, distinct))}.")
    return int(distinct[0])
