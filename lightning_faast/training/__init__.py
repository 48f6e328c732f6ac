"""Training by backpropagation: how the encoder takes part, heads, schedules, and the choice of a learning rate."""

from typing import TYPE_CHECKING

from lightning_faast.lazy import attach

if TYPE_CHECKING:
    from lightning_faast.training.adapters import Adapter, FullFinetuning, Lora
    from lightning_faast.training.augmentation import AugmentImages
    from lightning_faast.training.heads import ResidualLinear, linear_head
    from lightning_faast.training.learning_rate import LearningRateSearch
    from lightning_faast.training.schedules import WarmupCosine

__all__ = [
    "Adapter",
    "AugmentImages",
    "FullFinetuning",
    "LearningRateSearch",
    "Lora",
    "ResidualLinear",
    "WarmupCosine",
    "linear_head",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "Adapter": "lightning_faast.training.adapters",
        "AugmentImages": "lightning_faast.training.augmentation",
        "FullFinetuning": "lightning_faast.training.adapters",
        "LearningRateSearch": "lightning_faast.training.learning_rate",
        "Lora": "lightning_faast.training.adapters",
        "ResidualLinear": "lightning_faast.training.heads",
        "WarmupCosine": "lightning_faast.training.schedules",
        "linear_head": "lightning_faast.training.heads",
    },
)
