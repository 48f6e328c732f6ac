"""Every row exactly once, over several processes, without touching anyone's sampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, RandomSampler, SubsetRandomSampler
from torch.utils.data.distributed import DistributedSampler


class RowCounter:
    """Tells which rows of this process's batches are in the data set, and where.

    A DistributedSampler gives local row j of rank r the position j R + r, and repeats rows at the end so that all
    ranks have equally many; rows at a position of len(dataset) or more are such repetitions and are dropped.

    Args:
        world_size: R.
        rank: r.
        length: Rows of the data set, over all processes; None where a single process reads whatever comes.
    """

    def __init__(self, world_size: int = 1, rank: int = 0, length: int | None = None) -> None:
        self.world_size = world_size
        self.rank = rank
        self.length = length
        self.local_rows = 0

    @classmethod
    def for_loader(cls, loader: Any, world_size: int, rank: int) -> RowCounter:
        """A counter for a DataLoader.

        Raises:
            ValueError: Where several processes read it in a way that cannot be counted.
        """
        length = _length(loader)
        if world_size == 1:
            return cls(length=length)
        dataset = getattr(loader, "dataset", None)
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"The training data are an IterableDataset ({type(dataset).__name__}), which {world_size} processes do "
                "not share out: rows would be counted several times. Use one process, or a map-style data set."
            )
        sampler: Any = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        if not _shares_out(sampler):
            raise ValueError(
                f"The training sampler is a {type(sampler).__name__}: with {world_size} processes its rows cannot be "
                "counted exactly once. Use torch's DistributedSampler (Lightning adds it by itself to a plain or "
                "shuffled loader), a sampler with a seeded generator, or one process."
            )
        return cls(world_size, rank, len(sampler.dataset))

    def start_epoch(self) -> None:
        """Begin again at the first row."""
        self.local_rows = 0

    def positions(self, rows: int) -> Tensor:
        """Positions [rows] int64 of the next rows of this process; repetitions are at ``length`` or above."""
        local = torch.arange(self.local_rows, self.local_rows + rows)
        self.local_rows += rows
        return local * self.world_size + self.rank

    def keep(self, positions: Tensor) -> Tensor | None:
        """Mask [rows] of the rows to count, or None for all of them."""
        if self.world_size == 1 or self.length is None or int(positions[-1]) < self.length:
            return None
        return positions < self.length


def _shares_out(sampler: Any) -> bool:
    """Whether positions are known: torch's DistributedSampler, or Lightning's wrapper over a seeded random sampler."""
    if not isinstance(sampler, DistributedSampler):
        return False
    if type(sampler) is DistributedSampler:
        return True
    if type(sampler).__name__ != "DistributedSamplerWrapper":
        return False
    wrapped: Any = getattr(sampler.dataset, "_sampler", None)  # without a seed, each process would draw its own order
    replaced = getattr(wrapped, "replacement", False)
    return type(wrapped) in (RandomSampler, SubsetRandomSampler) and not replaced and wrapped.generator is not None


def _length(loader: Any) -> int | None:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return None


def check_strategy(strategy: Any) -> bool:
    """Whether the strategy runs several processes that each hold the whole module (DDP).

    Raises:
        ValueError: For strategies that shard or otherwise hold the head where it cannot be written.
    """
    names = [c.__name__ for c in type(strategy).__mro__]
    if "DeepSpeedStrategy" not in names:
        if "SingleDeviceStrategy" in names:
            return False
        if "DDPStrategy" in names:
            return True
    raise ValueError(
        f"FaastCallback does not support {type(strategy).__name__}: it may shard the head or change how steps run. "
        "Use strategy='auto' or 'ddp'; the pass needs no gradients, so a model that fits for inference fits."
    )


def broadcast_module(module: nn.Module) -> None:
    """Give every process rank 0's parameters and buffers, which DDP's wrapper does where there is one."""
    for tensor in [*module.parameters(), *module.buffers()]:
        torch.distributed.broadcast(tensor.data, src=0)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum over processes, out of place."""
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def gather_from_processes(tensor: Tensor) -> list[Tensor]:
    """The tensor of every process, in order of rank; all of one shape and dtype."""
    gathered = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, tensor.contiguous())
    return gathered
