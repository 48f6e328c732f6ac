"""What data modules of labelled rows have in common: splits, classes, few shots, rows in order."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_faast.data.labels import choose_per_class, encode_labels, hold_out
from lightning_faast.data.rows import LabelledRows

#: What rows are for; test rows are those of ``predict`` too.
Stage = Literal["train", "val", "test"]

Rows = TypeVar("Rows", bound=LabelledRows)


class LabelledDataModule(LightningDataModule, Generic[Rows]):
    """Labelled rows in splits; a subclass opens the splits and makes the loaders.

    Batches are tuples ``(inputs, labels)``, the labels int64 ``(batch,)``. The training split comes in order and whole
    unless ``shuffle`` is set: what is fitted in closed form gains nothing from chance.

    Declared classes that no row has are left out where there is a training split.

    What compares methods encodes each row once, from :meth:`ordered_loader`, keeps the keys under :meth:`fingerprint`
    and :attr:`transform_description`, and takes subsets of the rows of :meth:`labels` with
    :func:`~lightning_faast.data.labels.choose_per_class`, which are those of ``limit_per_class``.

    Args:
        train_split: Split to fit on; ``None`` for data sets that are only evaluated on.
        val_split: Split to validate on; ``None`` for no validation.
        test_split: Split of ``test`` and ``predict``; ``None`` where there is none.
        holdout: Share of each class of ``train_split`` that becomes the test rows, where ``test_split`` is ``None``.
        holdout_seed: Seed of that choice, which depends on the labels alone.
        batch_size: Rows a batch, on each device.
        eval_batch_size: The same for validation, test and prediction; ``None`` for ``batch_size``.
        limit_per_class: Fit on this many rows of each class only, chosen at random from the labels alone.
        seed: Seed of that choice and of shuffling.
        shuffle: Shuffle the training split anew in every epoch.

    Attributes:
        class_names: Names of the classes, after ``setup``.
        num_classes: Number of classes, after ``setup``.

    Raises:
        ValueError: For options that cannot be.
    """

    def __init__(
        self,
        train_split: str | None,
        val_split: str | None,
        test_split: str | None,
        holdout: float | None,
        holdout_seed: int,
        batch_size: int,
        eval_batch_size: int | None,
        limit_per_class: int | None,
        seed: int,
        shuffle: bool,
    ) -> None:
        super().__init__()
        if train_split is None and val_split is None and test_split is None:
            raise ValueError("train_split, val_split and test_split are all None: name at least one split.")
        for option, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("limit_per_class", limit_per_class),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{option}={value} must be at least 1.")
        for option, value in (("seed", seed), ("holdout_seed", holdout_seed)):
            if value < 0:
                raise ValueError(f"{option}={value} must not be negative.")
        if holdout is not None:
            _check_holdout(holdout, train_split, test_split)
        # no save_hyperparameters: Lightning refuses a name that module and data module log with different values
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split
        self.holdout = holdout
        self.holdout_seed = holdout_seed
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.limit_per_class = limit_per_class
        self.seed = seed
        self.shuffle = shuffle

        self._rows: dict[str, Rows] = {}  # by split
        self._labels: dict[str, np.ndarray] = {}  # by split
        self._indices: dict[Stage, np.ndarray] = {}  # rows of its split that a stage has
        self._fitted_on: np.ndarray = np.zeros(0, np.int64)  # those of the training rows that limit_per_class leaves
        self._class_names: list[str] | None = None

    @abstractmethod
    def _open(self, splits: Sequence[str]) -> dict[str, Rows]:
        """Rows of each split; what a data module of another source replaces, together with ``prepare_data``."""

    @abstractmethod
    def _loader(self, stage: Stage, indices: np.ndarray, for_training: bool = False) -> DataLoader[Any]:
        """These rows of a stage's split; ``for_training`` with what only training does, such as shuffling."""

    @property
    @abstractmethod
    def transform_description(self) -> str:
        """What is done to the rows before the encoder sees them, in words that change whenever that does."""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their indices."""
        if self._class_names is None:
            raise RuntimeError("The classes are known after setup: call prepare_data() and setup() first.")
        return self._class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def has_test(self) -> bool:
        """Whether there are test rows: of ``test_split``, or held out."""
        return self._split_of("test") is not None

    def labels(self, stage: Stage) -> np.ndarray:
        """Class indices of all rows of a stage, int64 ``(rows,)``, in order.

        Args:
            stage: ``"train"`` (without the rows held out; ``limit_per_class`` does not apply), ``"val"`` or ``"test"``.

        Raises:
            RuntimeError: Before ``setup``.
            ValueError: Where the stage has no split.
        """
        split = self._opened_split(stage)
        return self._labels[split][self._indices[stage]]

    def fingerprint(self, stage: Stage) -> str:
        """32 hexadecimal digits that change whenever the rows of :meth:`labels`, their order or labels do.

        Local files count by their names within the data set, sizes and times of last change, which is quick; data sets
        on the hub by their revision; arrays by their content.

        Args:
            stage: ``"train"``, ``"val"`` or ``"test"``.

        Raises:
            RuntimeError: Before ``setup``.
            ValueError: Where the stage has no split.
        """
        split = self._opened_split(stage)
        state = hashlib.sha256()
        state.update(json.dumps([self._rows[split].fingerprint(), self.class_names]).encode())
        state.update(self._indices[stage].tobytes())
        state.update(self.labels(stage).tobytes())
        return state.hexdigest()[:32]

    def ordered_loader(self, stage: Stage) -> DataLoader[Any]:
        """All rows of a stage, in the order of :meth:`labels`, prepared as for evaluation.

        Nothing that is for training alone applies, such as ``limit_per_class`` and ``shuffle``.
        ``on_after_batch_transfer`` ends the preparation, as for the other loaders.

        Args:
            stage: ``"train"``, ``"val"`` or ``"test"``.

        Raises:
            RuntimeError: Before ``setup``.
            ValueError: Where the stage has no split.
        """
        self._opened_split(stage)
        return self._loader(stage, self._indices[stage])

    def setup(self, stage: str | None = None) -> None:
        """Open the splits.

        Args:
            stage: Whatever it is, all splits are opened: the training split defines the classes.
        """
        if self._class_names is None:
            self._open_splits()

    def train_dataloader(self) -> DataLoader[Any]:
        """The training rows."""
        self._opened_split("train")
        return self._loader("train", self._fitted_on, for_training=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation split; an empty list, which Lightning takes for no validation, where there is none."""
        return [] if self.val_split is None else self.ordered_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test rows: the test split, or what is held out of the training split."""
        return self.ordered_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test rows."""
        return self.test_dataloader()

    def _split_of(self, stage: Stage) -> str | None:
        if stage == "test" and self.holdout is not None:
            return self.train_split
        return {"train": self.train_split, "val": self.val_split, "test": self.test_split}[stage]

    def _opened_split(self, stage: Stage) -> str:
        if stage not in get_args(Stage):
            raise ValueError(f"stage={stage!r} must be one of {', '.join(get_args(Stage))}.")
        split = self._split_of(stage)
        if split is None:
            purpose = {"train": "fit", "val": "validate", "test": "test"}[stage]
            or_share = ", or hold out a share of the training split (--data.holdout=0.2)" if stage == "test" else ""
            raise ValueError(
                f"{stage}_split=None: name the split to {purpose} on (--data.{stage}_split=NAME){or_share}."
            )
        if split not in self._rows:
            raise RuntimeError("Call prepare_data() and setup() first; a Trainer does.")
        return split

    def _splits(self) -> list[str]:
        named = (self.train_split, self.val_split, self.test_split)
        return list(dict.fromkeys(split for split in named if split is not None))

    def _open_splits(self) -> None:
        self._rows = self._open(self._splits())
        # the classes of a checkpoint that is only evaluated are those declared, whether its rows have them or not
        class_names, self._labels = encode_labels(self._rows, keep_unused=self.train_split is None)
        for stage in get_args(Stage):
            split = self._split_of(stage)
            if split is not None:
                self._indices[stage] = np.arange(len(self._rows[split]))
        if self.holdout is not None and self.train_split is not None:
            labels = self._labels[self.train_split]
            self._indices["train"], self._indices["test"] = hold_out(
                labels, class_names, self.holdout, self.holdout_seed
            )
        if self.train_split is not None:
            training = self._indices["train"]
            if self.limit_per_class is not None:
                labels = self._labels[self.train_split][training]
                training = training[self._choose(labels, class_names, self.limit_per_class)]
            self._fitted_on = training
        self._class_names = class_names

    def _choose(self, labels: np.ndarray, class_names: list[str], limit: int) -> np.ndarray:
        chosen, counts = choose_per_class(labels, len(class_names), limit, self.seed)
        short = [f"{class_names[i]} ({counts[i]})" for i in np.flatnonzero(counts < limit)]
        if short:
            listed = ", ".join(short[:10]) + (f" and {len(short) - 10} more" if len(short) > 10 else "")
            rank_zero_warn(
                f"limit_per_class={limit}, but some classes of the split {self.train_split!r} have fewer rows, all "
                f"of which are taken: {listed}."
            )
        return chosen


def _check_holdout(holdout: float, train_split: str | None, test_split: str | None) -> None:
    if not 0 < holdout < 1:
        raise ValueError(f"holdout={holdout} must lie between 0 and 1: the share of each class to test on.")
    if train_split is None:
        raise ValueError(f"holdout={holdout} is a share of the training split, and train_split=None.")
    if test_split is not None:
        raise ValueError(
            f"holdout={holdout} makes test rows of training rows, and test_split={test_split!r} names others. Set "
            "test_split=None (--data.test_split=null), or leave holdout out."
        )
