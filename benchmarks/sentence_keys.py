"""CLINC150 as MiniLM keys for the recipe ``keys``: ``python -m benchmarks.sentence_keys MODEL DATA FILE``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import load_dataset
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from lightning_faast.associative.files import save_tensors

_BATCH = 64
_LENGTH = 128  # tokens; CLINC150's sentences are far shorter


@torch.inference_mode()
def encode(texts: list[str], tokenizer, model) -> Tensor:
    """Mean of the last hidden states over the tokens that are no padding, [N, d]; sorted by length to pad little."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    keys = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        inputs = tokenizer(
            [texts[i] for i in rows], padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt"
        )
        mask = inputs["attention_mask"][..., None].float()
        keys[rows] = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    return keys


def main() -> None:
    """Encode both splits and write them beside their labels."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sentence_keys", description=__doc__)
    parser.add_argument(
        "model", help="a transformers sentence encoder: a folder or a name on the hub (all-MiniLM-L6-v2)"
    )
    parser.add_argument("data", help="a folder in the hub's parquet layout, with columns text and intent or label")
    parser.add_argument("file", type=Path, help="the safetensors file to write")
    options = parser.parse_args()
    tokenizer, model = AutoTokenizer.from_pretrained(options.model), AutoModel.from_pretrained(options.model).eval()
    tensors, names = {}, []
    for split in ("train", "test"):
        rows = load_dataset(options.data, split=split)
        label = next(name for name in ("label", "intent") if name in rows.features)
        names = list(rows.features[label].names)
        tensors[f"{split}_keys"] = encode(list(rows["text"]), tokenizer, model)
        tensors[f"{split}_labels"] = torch.tensor(rows[label])
    save_tensors(tensors, options.file, {"class_names": json.dumps(names)})
    print(f"wrote {options.file}")


if __name__ == "__main__":
    main()
