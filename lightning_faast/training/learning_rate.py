"""Choosing the learning rate of a linear probe on held-out training rows."""

import copy
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader

_ENOUGH_ROWS = 200  # the standard error of an accuracy is then .035 at most
_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def hold_out_fifth(labels: Tensor, seed: int = 0, fold: int = 0) -> Tensor:
    """Choose a fifth of the rows, spread evenly over the classes; a class's only row is never chosen.

    Args:
        labels: [N], int64.
        seed: Of the choice within a class.
        fold: Which of the five fifths, 0 to 4.

    Returns:
        A mask [N], true where a row is held out.

    Example:
        >>> hold_out_fifth(torch.tensor([0, 1] * 5)).sum().item()
        2
    """
    labels = labels.cpu()
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[by_class[(fold + 2) % 5 :: 5]] = True  # of every five neighbors one, first the middle one
    return mask & (labels.bincount()[labels] > 1)


class LearningRateSearch(Callback):
    """Chooses the learning rate before training starts, by training the head at every candidate.

    The training rows are encoded once. On four fifths of these keys a copy of the head is trained for every rate, with
    the module's own optimizer and schedule, the loader's batch size and the trainer's number of epochs; the rate that
    is most accurate on the last fifth is set in the optimizer and its scheduler (of equals, the one of the lower loss).
    Then the fit on all rows runs as ever.

    Where a fifth is less than 200 rows, which tell rates apart by chance, further fifths take their turn. Where every
    class has one row only nothing can be held out, and the middle candidate is taken, which the log says.

    Args:
        rates: The candidates.
        seed: Of the choice of the held-out rows and of the order of the others.

    Attributes:
        rate: The one chosen; None before the fit.
        accuracies: Held-out accuracy at each rate; empty where nothing was held out.
        seconds: Wall time of the search, encoding included: a part of the time that adaptation takes.
        seconds_encode: Of these, in the encoder and the loader.
        examples_encoded: Rows that went through the encoder for it.

    Raises:
        TypeError: In the fit, for a module that is not a :class:`~lightning_faast.FaastModule`.
        ValueError: In the fit, where keys differ from one epoch to the next (the encoder trains, the images are
            augmented), the number of epochs is not known, the loader has no fixed batch size or the schedule needs a
            validation metric.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_faast import FaastModule
        >>> from lightning_faast.data import DigitsDataModule
        >>> from lightning_faast.encoders import VisionEncoder
        >>> encoder = VisionEncoder("test_vit", pretrained=False, image_size=32)
        >>> module = FaastModule(encoder, torch.nn.Linear, optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-3))
        >>> search = LearningRateSearch(rates=[1e-3, 1.0])
        >>> options = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
        >>> quiet = dict.fromkeys(options, False)
        >>> trainer = Trainer(max_epochs=2, callbacks=[search], accelerator="cpu", **quiet)
        >>> trainer.fit(module, datamodule=DigitsDataModule(limit_per_class=10, shuffle=True))
        >>> search.rate
        1.0
    """

    def __init__(self, rates: Sequence[float] = _RATES, seed: int = 0) -> None:
        if not rates or min(rates) <= 0:
            raise ValueError(f"rates={list(rates)} must be at least one positive learning rate.")
        self.rates = sorted(rates)
        self.seed = seed
        self.rate: float | None = None
        self.accuracies: dict[float, float] = {}
        self.seconds = 0.0
        self.seconds_encode = 0.0
        self.examples_encoded = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search, and set the rate; a fit that is resumed keeps that of its checkpoint."""
        if trainer.global_step > 0:
            return
        loader = self._check(trainer, pl_module)
        start = time.perf_counter()
        keys, labels = _encode(trainer, pl_module, loader)
        self.seconds_encode = time.perf_counter() - start
        self.examples_encoded = len(keys)
        right, losses, judged = torch.zeros(len(self.rates)), torch.zeros(len(self.rates)), 0
        for fold in range(5):
            held_out = hold_out_fifth(labels, self.seed, fold).to(keys.device)
            if judged < _ENOUGH_ROWS and held_out.any():
                scores = self._score(trainer, pl_module, keys, labels, held_out, loader.batch_size)
                right, losses, judged = right + scores[0], losses + scores[1], judged + int(held_out.sum())
        self.accuracies = dict(zip(self.rates, (right / judged).tolist(), strict=True)) if judged else {}
        candidates = range(len(self.rates))
        best = max(candidates, key=lambda i: (right[i], -losses[i])) if judged else len(candidates) // 2
        # one rate for all processes, should their sums differ in the last digit
        self.rate = float(trainer.strategy.broadcast(self.rates[best]))
        _set_rate(trainer, self.rate)
        self.seconds = time.perf_counter() - start
        self._report(trainer, judged)

    def _check(self, trainer: Trainer, module: Any) -> DataLoader[Any]:
        """The train loader, where a search makes sense."""
        from lightning_faast.module import FaastModule  # it imports this package

        if not isinstance(module, FaastModule):
            raise TypeError(f"LearningRateSearch trains the head of a FaastModule, and got a {type(module).__name__}.")
        if not module.encoder_is_frozen:
            raise ValueError(
                f"LearningRateSearch encodes the data once, but the encoder {type(module.encoder).__name__} is trained "
                "and its keys change. Use it with a frozen encoder and no adapter, or leave it out (--method=null)."
            )
        if getattr(trainer.datamodule, "augment", None) is not None:  # type: ignore[attr-defined]
            raise ValueError(
                "LearningRateSearch encodes the data once, but augmented images differ in every epoch. Set "
                "augment=None (--data.augment=null), or leave it out (--method=null)."
            )
        if not trainer.max_epochs or trainer.max_epochs < 0:
            raise ValueError(f"LearningRateSearch needs a number of epochs; got max_epochs={trainer.max_epochs}.")
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader) or loader.batch_size is None:
            raise ValueError(
                f"LearningRateSearch needs one DataLoader with a batch_size; the train loader is a "
                f"{type(loader).__name__}{' with a batch_sampler' if isinstance(loader, DataLoader) else ''}."
            )
        return loader

    def _score(
        self, trainer: Trainer, module: Any, keys: Tensor, labels: Tensor, held_out: Tensor, batch_size: Any
    ) -> tuple[Tensor, Tensor]:
        """Right answers and loss on held-out rows, of every rate, all trained at once: a parameter group for each."""
        heads = [copy.deepcopy(module.head) for _ in self.rates]
        optimizer = module.make_optimizer(
            [{"params": list(head.parameters()), "lr": rate} for head, rate in zip(heads, self.rates, strict=True)]
        )
        train_rows = (~held_out).nonzero()[:, 0]
        epochs = int(trainer.max_epochs or 0)
        config = module.make_scheduler(optimizer, epochs * math.ceil(len(train_rows) / batch_size))
        scheduler: Any = None if config is None else config["scheduler"]
        interval = None if config is None else config["interval"]
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "LearningRateSearch cannot follow ReduceLROnPlateau, which waits for a validation metric. Use a "
                "schedule of epochs or steps, such as torch.optim.lr_scheduler.StepLR."
            )
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(epochs):
            order = train_rows[torch.randperm(len(train_rows), generator=generator).to(keys.device)]
            for rows in order.split(batch_size):
                optimizer.zero_grad()
                # a sum over the heads, so that each has the gradients that it would have alone
                torch.stack(_losses(heads, keys[rows], labels[rows])).sum().backward()
                optimizer.step()
                if interval == "step":
                    scheduler.step()
            if interval == "epoch":
                scheduler.step()
        with torch.no_grad():
            keys, labels = keys[held_out], labels[held_out]
            losses = torch.stack(_losses(heads, keys, labels)) * len(labels)
            right = torch.stack([(head(keys).argmax(-1) == labels).sum() for head in heads])
        # a rate that diverged has no loss
        return right.cpu().double(), losses.cpu().double().nan_to_num(nan=math.inf)

    def _report(self, trainer: Trainer, rows: int) -> None:
        if self.accuracies:
            listed = ", ".join(f"{rate:g} {accuracy:.3f}" for rate, accuracy in self.accuracies.items())
            why = f"by the accuracy on {rows:,} held-out of {self.examples_encoded:,} rows: {listed}"
        else:
            why = "the middle candidate, since no class has two rows and nothing can be held out"
        rank_zero_info(f"Learning rate {self.rate:g}, {why}; {self.seconds:.1f} s.")
        figures = {"rate": self.rate, "seconds": self.seconds, "seconds_encode": self.seconds_encode}
        if self.accuracies and self.rate is not None:
            figures["held_out_accuracy"] = self.accuracies[self.rate]
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"learning_rate_search/{name}": value for name, value in figures.items() if value is not None}, step=0
            )


@torch.no_grad()
def _encode(trainer: Trainer, module: Any, loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    """Keys [N, d] and labels [N] of the data set in its own order, on the module's device."""
    # a loader of its own: the training loader's random state stays as it is
    in_order: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )
    keys, labels = [], []
    for batch in in_order:
        x, label = trainer.strategy.batch_to_device(batch, module.device)
        with trainer.precision_plugin.forward_context():
            keys.append(module.encoder(x).float())
        labels.append(label)
    return torch.cat(keys), torch.cat(labels)


def _losses(heads: Sequence[nn.Module], keys: Tensor, labels: Tensor) -> list[Tensor]:
    return [F.cross_entropy(head(keys).float(), labels) for head in heads]


def _set_rate(trainer: Trainer, rate: float) -> None:
    """Make ``rate`` the one from which the optimizer's groups and its scheduler set out."""
    (optimizer,) = trainer.optimizers
    for group in optimizer.param_groups:
        base = group.get("initial_lr", group["lr"])
        group["lr"] *= rate / base  # a warm-up may have begun
        if "initial_lr" in group:
            group["initial_lr"] = rate
    for config in trainer.lr_scheduler_configs:
        config.scheduler.base_lrs = [rate] * len(optimizer.param_groups)
