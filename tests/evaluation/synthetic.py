"""A comparison that looks like a real one, made from a seed: 6 methods, 4 numbers of shots, 3 seeds."""

from __future__ import annotations

import math

import torch

from lightning_faast.evaluation.records import Record, Rows, mean_class_accuracy
from lightning_faast.evaluation.summary import Comparison, calibration_error

CLASSES, WIDTH, TEST_ROWS = 10, 384, 1000
SHOTS = (4, 16, 64, None)
#: Skill with 4 shots and gain from there to all, sharpness of the probabilities, seconds an example and seconds beside,
#: encodings an example, bytes to update an example and beside, microseconds a prediction.
METHODS = {
    "faast": (1.7, 1.9, 1.0, 0.02, 0.05, 1, 0, 1_600_000, 9.0),
    "full_finetuning": (1.2, 2.5, 1.6, 2.5, 4.0, 20, 0, 260_000_000, 9.5),
    "linear_probe": (1.3, 1.9, 0.6, 0.4, 1.0, 20, 0, 46_000, 9.2),
    "logistic_regression": (1.6, 1.95, 1.1, 0.0205, 0.4, 1, 1536, 0, 9.1),
    "knn": (1.1, 1.9, 2.5, 0.0201, 0.01, 1, 1544, 0, 160.0),
    "zero_shot": (1.9, 0.0, 1.0, 0.0, 0.6, 0, 0, 15_360, 8.7),
}


def comparison(test_rows: int = TEST_ROWS) -> Comparison:
    """Whatever is called, the same figures: two runs have no result, one failed and one refused."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(CLASSES, (test_rows,), generator=generator)
    difficulty = torch.randn(test_rows, generator=generator)
    records, kept = [], []
    for method in METHODS:
        for place, shots in enumerate(SHOTS):
            for seed in (0, 1, 2) if shots else (0,):
                record, rows = _run(method, place, shots, seed, label, difficulty, generator)
                records.append(record)
                kept.append(rows)
    about = {
        "title": "CIFAR-10 with DINOv2 ViT-S/14",
        "recipe": "recipes/vit_cifar.yaml",
        "encoder": "vit_small_patch14_dinov2.lvd142m, frozen, 384 wide",
        "data": "cifar10-small: 5,000 training and 1,000 test images",
        "device": "CPU, 2 cores",
        "versions": "lightning-faast 0.1.0, torch 2.8.0, lightning 2.6.4",
        "date": "2025-01-31",
        "command": "python -m lightning_faast compare --recipe recipes/vit_cifar.yaml "
        "--methods faast,full_finetuning,linear_probe,logistic_regression,knn,zero_shot --shots 4,16,64,all --seeds 3",
    }
    return Comparison(records, kept, "faast", about)


def _run(
    method: str,
    place: int,
    shots: int | None,
    seed: int,
    label: torch.Tensor,
    difficulty: torch.Tensor,
    generator: torch.Generator,
) -> tuple[Record, Rows | None]:
    command = f"python -m lightning_faast fit --config recipes/vit_cifar.yaml --config configs/methods/{method}.yaml"
    if method == "full_finetuning" and shots is None:
        return Record(method, shots, seed, "failed", "RuntimeError: out of memory (tried to allocate 2.1 GB)"), None
    if method == "zero_shot" and shots == 64:
        return Record(method, shots, seed, "refused", "zero_shot reads no examples: shots change nothing."), None
    skill, gain, sharpness, per_example, fixed, encodings, per_row, state, micro = METHODS[method]
    level = skill + gain * place / (len(SHOTS) - 1) + 0.04 * float(torch.randn((), generator=generator))
    logits = torch.randn(len(label), CLASSES, generator=generator)
    logits[torch.arange(len(label)), label] += level - 0.9 * difficulty
    rows = Rows.from_log_probabilities((0.7 * level * sharpness * logits).log_softmax(-1), label)
    examples = CLASSES * (shots or 500)
    bytes_to_update = per_row * examples + state
    grid = [10.0 ** (exponent / 2) for exponent in range(-12, 5)]
    chosen = grid[9 - place]
    path = {
        "kind": "ridge",
        "grid": grid,
        "scores": [0.04 + 0.01 * math.log10(value / chosen) ** 2 / (1 + place) for value in grid],
        "chosen": chosen,
    }
    return Record(
        method,
        shots,
        seed,
        "done",
        command=command,
        num_classes=CLASSES,
        key_width=WIDTH,
        train_rows=examples,
        test_rows=len(label),
        accuracy=float((rows.predicted == label).double().mean()),
        mean_class_accuracy=mean_class_accuracy(rows),
        loss=float(-rows.log_likelihood.double().mean()),
        calibration_error=calibration_error(rows),
        seconds_encode=per_example * examples,
        seconds_fit=fixed,
        seconds_solve=0.1 * fixed,
        examples_encoded=encodings * examples,
        peak_memory=int(4e8 + 30 * bytes_to_update),
        bytes_to_predict=max(15_400, per_row * examples),
        bytes_to_update=bytes_to_update,
        microseconds_1=20 * micro,
        microseconds_256=micro * (1 + per_row * examples / 1e6),
        parameters=0 if method in ("knn", "zero_shot") else WIDTH * CLASSES + CLASSES,
        device="cpu",
        details={"path": path} if method == "faast" else {},
    ), rows
