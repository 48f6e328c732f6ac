"""A Lightning module of two parts: an encoder that yields features and a head that yields logits."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lightning_faast.associative import FastWeights
from lightning_faast.training.adapters import Adapter, is_frozen
from lightning_faast.training.module import TrainableModule
from lightning_faast.training.schedules import WarmupCosine

# Where the number of classes stands in a checkpoint: the head must be built before its weights can be loaded.
_NUM_CLASSES_KEY = "lightning_faast.num_classes"
# Their names, so that a checkpoint is not tested on data whose classes come in another order.
_CLASS_NAMES_KEY = "lightning_faast.class_names"


class FaastModule(TrainableModule):
    """Classify with ``head(encoder(x))``.

    With a :class:`~lightning_faast.callback.FaastCallback` in the trainer the head is solved in one pass over the
    training data. Without it the module trains by backpropagation with cross entropy: a linear probe where the encoder
    is frozen, and what ``adapter`` makes of the encoder otherwise. With ``Trainer(max_epochs=0)`` nothing is trained.

    A part of the encoder none of whose parameters requires a gradient is frozen and always in eval mode: neither its
    weights nor its BatchNorm statistics move. An encoder that is frozen as a whole drops nothing out.

    Validation and test log ``loss`` (the mean negative log likelihood), ``accuracy``, ``top5_accuracy`` (with more than
    five classes) and ``calibration_error`` (expected calibration error, 15 bins), as ``val/…`` and ``test/…``.

    Nothing is saved as hyper-parameters: ``LightningCLI`` lets those of a checkpoint overrule what the user typed. A
    checkpoint holds the weights and the number of classes; :meth:`load_from_checkpoint` takes the same ``encoder`` and
    ``head`` as the constructor.

    Args:
        encoder: Maps a batch [B, ...] to features [B, d]; has an integer attribute ``num_features`` = d.
        head: Called as ``head(num_features, num_classes)`` to build the head, or the head itself. Maps features [B, d]
            to logits [B, c].
        num_classes: c. Where nothing is said it is the ``num_classes`` of the trainer's datamodule, known after its
            ``setup``, or the ``out_features`` of a head that is given as a module.
        optimizer: Called with groups of the parameters that require a gradient. Not used with a ``FaastCallback``.
        lr_scheduler: Called with the optimizer, stepped once an epoch; a
            :class:`~lightning_faast.training.WarmupCosine` covers the whole of training and is stepped after every
            batch. Not used with a ``FaastCallback``.
        class_embeddings: Whether the value of a class is the embedding of its name: the encoder's
            ``embed_classes(class_names)`` [c, e], which a CLIP encoder has, is given to ``head`` as
            ``class_embeddings``. Needs a datamodule with ``class_names``.
        adapter: How the encoder takes part in training: :class:`~lightning_faast.training.FullFinetuning` or
            :class:`~lightning_faast.training.Lora`; ``None`` leaves it as it is. Changes the encoder in place.

    Raises:
        TypeError: If the encoder has no integer ``num_features`` or ``head`` does not build an ``nn.Module``.
        ValueError: If the number of classes is unknown, smaller than two or not that of the head.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_faast import FaastCallback, FaastModule
        >>> from lightning_faast.data import DigitsDataModule
        >>> from lightning_faast.encoders import VisionEncoder
        >>> module = FaastModule(VisionEncoder("test_vit", pretrained=False, image_size=32))
        >>> options = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
        >>> quiet = dict.fromkeys(options, False)
        >>> trainer = Trainer(callbacks=[FaastCallback()], accelerator="cpu", **quiet)
        >>> trainer.fit(module, datamodule=DigitsDataModule())
        >>> results = trainer.test(module, datamodule=DigitsDataModule(), verbose=False)
        >>> results[0]["test/accuracy"] > 0.5
        True
    """

    head: nn.Module

    def __init__(
        self,
        encoder: nn.Module,
        head: Callable[[int, int], nn.Module] = FastWeights,
        num_classes: int | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | WarmupCosine | None = None,
        class_embeddings: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, adapter)
        num_features = getattr(encoder, "num_features", None)
        if not isinstance(num_features, int):
            raise TypeError(
                f"encoder {type(encoder).__name__} has num_features={num_features!r}; expected an int, the length of "
                "the features it returns. Set encoder.num_features, or use lightning_faast.encoders.VisionEncoder."
            )
        self.encoder = self.adapter.adapt(encoder)
        self.num_features = num_features
        self.num_classes: int | None = None
        self._embeds_classes = class_embeddings
        if class_embeddings:
            self._check_class_embeddings(head, num_classes)
        self._head_argument = (head,)  # in a tuple: a module given as the head is registered only once, as self.head
        self.set_pretrained_mode()
        if num_classes is None and isinstance(head, nn.Module) and isinstance(getattr(head, "out_features", None), int):
            num_classes = int(head.out_features)  # type: ignore[arg-type]
        if num_classes is not None:
            self._build(num_classes)

    def _check_class_embeddings(self, head: Any, num_classes: int | None) -> None:
        if not callable(getattr(self.encoder, "embed_classes", None)):
            raise ValueError(
                f"class_embeddings=True needs an encoder that embeds class names, and {type(self.encoder).__name__} "
                "has no embed_classes. Use lightning_faast.encoders.ClipEncoder, or class_embeddings=False."
            )
        if num_classes is not None or isinstance(head, nn.Module):
            raise ValueError(
                "class_embeddings=True builds the head when the names of the classes are known: leave num_classes out, "
                "and give head as a class or function called as head(num_features, num_classes, class_embeddings=...)."
            )

    def _build(self, num_classes: int, class_names: list[str] | None = None) -> None:
        """Make the head and the metrics for ``num_classes`` classes, once."""
        if self.num_classes is not None:
            return
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}; expected at least 2 classes. Check the labels of the data.")
        (head,) = self._head_argument
        built = head if isinstance(head, nn.Module) else self._make_head(head, num_classes, class_names)
        if not isinstance(built, nn.Module):
            raise TypeError(
                f"head returned a {type(built).__name__}; expected an nn.Module. Pass a class or function called as "
                "head(num_features, num_classes), such as torch.nn.Linear, or an nn.Module."
            )
        if getattr(built, "out_features", None) not in (None, num_classes):
            raise ValueError(
                f"the head has out_features={built.out_features} and the data {num_classes} classes. Build the head "
                f"with {num_classes} outputs, or pass its class so that FaastModule builds it."
            )
        self.head = built
        self.num_classes = num_classes
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15, norm="l1"),
        }
        if num_classes > 5:
            metrics["top5_accuracy"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        # compute groups would merge top-1 and top-5 for good where they agree on the first batch
        collection = MetricCollection(metrics, compute_groups=False)
        self.val_metrics = collection.clone(prefix="val/")
        self.test_metrics = collection.clone(prefix="test/")

    def _make_head(self, head: Callable[..., Any], num_classes: int, class_names: list[str] | None) -> Any:
        if not self._embeds_classes:
            return head(self.num_features, num_classes)
        if class_names is None:
            raise ValueError(
                "class_embeddings=True needs the names of the classes: use a datamodule with class_names "
                f"({num_classes} of them)."
            )
        embeddings = self.encoder.embed_classes(class_names)  # type: ignore[operator]
        return head(self.num_features, num_classes, class_embeddings=embeddings)

    def setup(self, stage: str) -> None:
        """Build the head where only now the data say how many classes there are."""
        if self.num_classes is not None:
            return
        datamodule = getattr(self.trainer, "datamodule", None)
        num_classes = getattr(datamodule, "num_classes", None)
        if num_classes is None:
            source = (
                "there is no datamodule" if datamodule is None else f"{type(datamodule).__name__}.num_classes is None"
            )
            raise ValueError(
                f"the number of classes is unknown: num_classes=None and {source}. Pass FaastModule(num_classes=…) "
                "(--model.num_classes=… on the command line) or a datamodule that sets num_classes in setup."
            )
        self._build(int(num_classes), self._class_names())

    @property
    def pretrained(self) -> nn.Module:
        """The encoder."""
        return self.encoder

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether no parameter of the encoder requires a gradient."""
        return is_frozen(self.encoder)

    def forward(self, x: Any) -> Tensor:
        """Logits [B, c] of a batch [B, ...]."""
        if self.num_classes is None:
            raise RuntimeError(
                "FaastModule has no head yet, since the number of classes is unknown. Pass FaastModule(num_classes=…), "
                "or let the trainer call setup with a datamodule."
            )
        return self.head(self.encoder(x))

    def training_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch (x [B, ...], labels [B])."""
        x, label = batch
        loss = F.cross_entropy(self(x).float(), label)
        self.log("train/loss", loss, batch_size=len(label))
        return loss

    def validation_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> None:
        """Add a batch (x [B, ...], labels [B]) to the ``val/…`` metrics."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> None:
        """Add a batch (x [B, ...], labels [B]) to the ``test/…`` metrics."""
        self._evaluate(batch, "test", self.test_metrics)

    def _evaluate(self, batch: tuple[Any, Tensor], stage: str, metrics: MetricCollection) -> None:
        x, label = batch
        logits = self(x).float()  # half precision would round probabilities, and so the bins of the calibration error
        loss = F.cross_entropy(logits, label)
        # probabilities, since torchmetrics would take logits that all lie in [0, 1] for probabilities
        metrics.update(logits.softmax(-1), label)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=len(label), sync_dist=True)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(label))

    def _report_encoder(self) -> None:
        """Have an encoder of text say how many texts it cut."""
        report = getattr(self.encoder, "report_truncation", None)
        if report is not None:
            report()

    on_train_epoch_end = on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _report_encoder

    def predict_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Answer ``{"label": [B], "probabilities": [B, c]}`` for a batch (x [B, ...], labels [B])."""
        x, label = batch
        return {"label": label, "probabilities": self(x).float().softmax(-1)}

    def own_parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the head."""
        return [parameter for parameter in self.head.parameters() if parameter.requires_grad]

    def nothing_to_optimize(self) -> str:
        """As with a frozen encoder and a head that is solved."""
        return (
            f"no parameter of the encoder {type(self.encoder).__name__} or the head "
            f"{type(self.head).__name__} requires a gradient. Add FaastCallback() to the trainer's callbacks to "
            "solve the head in one pass (on the command line: no --method=null), or train a linear probe with "
            "head=torch.nn.Linear (--model.head=torch.nn.Linear)."
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the number of classes, from which a new module builds its head, and their names."""
        checkpoint[_NUM_CLASSES_KEY] = self.num_classes
        checkpoint[_CLASS_NAMES_KEY] = self._class_names()

    def _class_names(self) -> list[str] | None:
        """Names of the classes of the data that run, where the datamodule has them."""
        try:
            datamodule = getattr(self.trainer, "datamodule", None)
        except RuntimeError:  # no trainer, as in load_from_checkpoint
            return None
        names = getattr(datamodule, "class_names", None)
        return None if names is None else [str(name) for name in names]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the head before its weights are loaded.

        Raises:
            ValueError: If the checkpoint was written for another number of classes, or for others.
        """
        saved = checkpoint.get(_NUM_CLASSES_KEY)
        if self.num_classes is None and saved is not None:
            self._build(saved, checkpoint.get(_CLASS_NAMES_KEY))
        elif saved is not None and saved != self.num_classes:
            raise ValueError(
                f"the checkpoint was written for {saved} classes and this module has {self.num_classes}. Use the data "
                "(or num_classes) of the fit that wrote it."
            )
        saved_names, names = checkpoint.get(_CLASS_NAMES_KEY), self._class_names()
        if saved_names and names and saved_names != names:
            pairs = zip(saved_names, names, strict=False)
            index, (then, now) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            raise ValueError(
                f"the checkpoint was written for other classes: class {index} was {then!r} and is {now!r} in this "
                "data. Use the data of the fit that wrote it, with its class names in the same order."
            )
