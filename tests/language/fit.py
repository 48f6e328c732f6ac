"""A fit of a language model, started as real processes by test_distributed.py.

python -m tests.language.fit --model DIR --text FILE --out FILE --processes 2
"""

import argparse
import os
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_faast import FaastCallback
from lightning_faast.data import LanguageDataModule
from lightning_faast.language import LanguageModule


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # without a choice among candidates: the held-out slice differs with the processes, and so would the choice
    options = {"step": 1.0, "key_ridge": 1e-3, "value_ridge": 0.1}
    module = LanguageModule(args.model, fast_weights=options)
    data = LanguageDataModule(args.text, test_split=None, window=32, limit_tokens=32 * 13, batch_size=2)
    callback = FaastCallback()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=args.processes,
        strategy="ddp" if args.processes > 1 else "auto",
        callbacks=[callback],
        default_root_dir=args.out.parent,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(module, datamodule=data)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.save({"weight": module.head.weight, **callback.metrics}, args.out.with_suffix(f".rank{rank}.pt"))


if __name__ == "__main__":
    main()
