"""Lightning projects written by people who have never heard of this package, in both namespaces.

Each takes the namespace (``lightning.pytorch`` or ``pytorch_lightning``) and returns a module class.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

WIDTH, CLASSES = 6, 3


def examples(n: int = 120, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[n, 6] inputs of three overlapping classes, every class among the first rows, and labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    centers = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(7))
    return centers[labels] * 1.5 + torch.randn(n, WIDTH, generator=generator), labels


def loader(n: int = 120, batch_size: int = 16, seed: int = 0, **kwargs: Any) -> DataLoader:
    return DataLoader(TensorDataset(*examples(n, seed)), batch_size=batch_size, **kwargs)


class DictDataset(Dataset):
    def __init__(self, n: int = 120, seed: int = 0) -> None:
        self.inputs, self.labels = examples(n, seed)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixels": self.inputs[i], "labels": self.labels[i]}


def body(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5))


def plain(pl: ModuleType) -> type:
    """AdamW, a cosine schedule, train and validation logs."""

    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleDict({"body": body(), "fc": nn.Linear(16, CLASSES)})
            self.seen_in_training_mode = False

        def forward(self, x: Tensor) -> Tensor:
            return self.net["fc"](self.net["body"](x))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen_in_training_mode |= self.training or torch.is_grad_enabled()
            loss = F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)
            self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            logits = self(batch[0])
            self.log("val_acc", (logits.argmax(-1) == batch[1]).float().mean())
            self.log("val_loss", F.cross_entropy(logits, batch[1]))

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)}

    return Plain


def dict_batches(pl: ModuleType) -> type:
    """Dict batches, head built in setup, a dict returned from training_step, OneCycleLR, metrics of its own."""

    class DictBatches(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = body()
            self.train_accuracy = MulticlassAccuracy(CLASSES)
            self.val_accuracy = MulticlassAccuracy(CLASSES)

        def setup(self, stage: str) -> None:
            if not hasattr(self, "classifier"):
                self.classifier = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))

        def step(self, batch: dict[str, Tensor], metric: MulticlassAccuracy) -> Tensor:
            logits = self.classifier(self.encoder(batch["pixels"]))
            metric(logits, batch["labels"])
            return F.cross_entropy(logits, batch["labels"])

        def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            loss = self.step(batch, self.train_accuracy)
            self.log_dict({"train/loss": loss})
            return {"loss": loss}

        def on_train_epoch_start(self) -> None:
            self.train()  # a habit of older projects

        def on_train_epoch_end(self) -> None:
            self.log("train/accuracy", self.train_accuracy)

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.log("val/loss", self.step(batch, self.val_accuracy))
            self.log("val/accuracy", self.val_accuracy)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            steps = int(self.trainer.estimated_stepping_batches)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return DictBatches


def one_logit(pl: ModuleType) -> type:
    """A binary head of one logit with the module's own BinaryAccuracy; class 2 against the others."""

    class OneLogit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = body()
            self.out = nn.Linear(16, 1)
            self.accuracy = BinaryAccuracy()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.binary_cross_entropy_with_logits(self.out(self.backbone(x)).squeeze(-1), y.float())

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.accuracy(self.out(self.backbone(x)).squeeze(-1), y)  # logits: torchmetrics applies the sigmoid
            self.log("val_accuracy", self.accuracy)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    return OneLogit


def tokens(pl: ModuleType) -> type:
    """[B, T, d] keys with labels of -100 where nothing is to be learnt."""

    class Tokens(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(WIDTH, 16)
            self.tag = nn.Linear(16, CLASSES)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.tag(self.embed(batch[0]).tanh())
            return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), ignore_index=-100)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    return Tokens
