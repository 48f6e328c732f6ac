"""A user's script, started as real processes by tests/test_distributed.py and tests/test_resume.py.

python -m tests.scripts.fit --out FILE [--processes 2] [--rows 101] [--sampler weighted] ...
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_faast import FaastCallback, FastWeights
from lightning_faast.associative import save_statistics
from tests.projects import examples, plain


class SaveHalfway(pl.Callback):
    """Writes a checkpoint after some batches of the pass, and dies there as a machine that loses power does."""

    def __init__(self, path: str, batches: int) -> None:
        self.path, self.batches = path, batches

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == self.batches:
            trainer.save_checkpoint(self.path)
            trainer.strategy.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(zip(*examples(), strict=True))


def train_loader(kind: str, rows: int) -> DataLoader:
    data = TensorDataset(*examples(rows))
    if kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(data, batch_size=8)
    if kind == "iterable":
        return DataLoader(Stream(), batch_size=8)
    samplers = {
        "weighted": lambda: torch.utils.data.WeightedRandomSampler(torch.ones(rows), rows),
        "subset": lambda: torch.utils.data.SubsetRandomSampler(range(rows)),
        "seeded-subset": lambda: torch.utils.data.SubsetRandomSampler(
            range(rows), generator=torch.Generator().manual_seed(3)
        ),
    }
    sampler = samplers[kind]() if kind in samplers else None
    return DataLoader(data, batch_size=8, sampler=sampler, shuffle=kind == "shuffled")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rows", type=int, default=101)
    parser.add_argument("--loader", default="plain")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--save-statistics", action="store_true")
    parser.add_argument("--head", default="net.fc", help="empty: the callback finds it")
    parser.add_argument("--fast-weights", action="store_true")
    parser.add_argument("--die-after", type=int)
    parser.add_argument("--ckpt-path")
    args = parser.parse_args()

    torch.set_num_threads(1)
    pl.seed_everything(5)
    module = plain(pl)()
    if args.fast_weights:
        module.net["fc"] = FastWeights(16, 3, normalize=True)
    if int(os.environ.get("LOCAL_RANK", 0)):  # a project that initializes ranks differently: rank 0's weights must win
        torch.nn.init.normal_(module.net["body"][0].weight)
    callback = FaastCallback(head=args.head or None, epochs=args.epochs, save_statistics=args.save_statistics)
    callbacks: list[Any] = [callback]
    if args.die_after:
        callbacks.append(SaveHalfway(str(args.out.with_suffix(".half.ckpt")), args.die_after))
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="64-true",  # a float32 encoder rounds a row differently in another batch
        devices=args.processes,
        strategy="ddp" if args.processes > 1 else "auto",
        callbacks=callbacks,
        default_root_dir=args.out.parent,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    val = DataLoader(TensorDataset(*examples(60, seed=1)), batch_size=8)
    trainer.fit(module, train_loader(args.loader, args.rows), val, ckpt_path=args.ckpt_path)
    assert callback.learner is not None
    torch.save(
        {
            "weight": module.net["fc"].weight.data,
            "logits": module.eval()(examples(20)[0].double()),
            "val_acc": trainer.callback_metrics["val_acc"],
            **callback.metrics,
        },
        args.out.with_suffix(f".rank{trainer.global_rank}.pt"),
    )
    if trainer.is_global_zero:
        save_statistics(callback.learner.statistics, args.out)
        torch.save(callback.learner.reservoir.state_dict(), args.out.with_suffix(".reservoir.pt"))


if __name__ == "__main__":
    main()
