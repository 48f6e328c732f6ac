"""Labelled texts for any encoder of text."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_faast.data.labelled import LabelledDataModule, Stage
from lightning_faast.data.text_sources import TextRows, TextSource

_Text = str | tuple[str, str]


class TextDataset(Dataset[tuple[_Text, int]]):
    """Rows of a split as they are, read when asked for.

    Args:
        rows: The texts.
        labels: Class index of every row, int64.
        indices: The rows that take part, in order.
    """

    def __init__(self, rows: TextRows, labels: np.ndarray, indices: np.ndarray) -> None:
        self.rows = rows
        self.labels = labels
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[_Text, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[_Text, int]]:
        """Several rows, which a DataLoader asks for at once."""
        chosen = self.indices[indices]
        return list(zip(self.rows.texts(chosen), self.labels[chosen].tolist(), strict=True))


class TextDataModule(LabelledDataModule[TextRows]):
    r"""Labelled texts, or pairs of texts, from the Hugging Face hub or local files, as they are.

    Batches are tuples ``(texts, labels)``: a list of strings, or of pairs of strings, and int64 ``(batch,)``. How they
    are tokenized belongs to the encoder (:class:`~lightning_faast.encoders.TextEncoder`), which also puts texts of
    alike length together: a batch may be large. The training split comes in order and whole; methods with epochs set
    ``shuffle``.

    Declared classes that no row has are left out where there is a training split.

    Args:
        path: A data set's name on the hub (``SetFit/sst2``), a local folder in the hub's layout (``train.csv`` and
            ``test.csv`` too), or one file, whose split is ``train``. Files are parquet, CSV, TSV or JSON lines.
        name: Configuration of a data set on the hub.
        train_split: Split to fit on; ``None`` for data sets that are only evaluated on. Slices work, such as
            ``train[:80%]``.
        val_split: Split to validate on; ``None`` for no validation.
        test_split: Split of ``test`` and ``predict``; ``None`` where there is none.
        holdout: Share of each class of ``train_split`` that becomes the test rows, where ``test_split`` is ``None``;
            the others are the training rows. At least one row of each class is on each side.
        holdout_seed: Seed of that choice, which depends on the labels alone.
        text_column: Column of the texts; ``None`` to find it by its name and type.
        pair_column: Column of the second text, where ``text_column`` is named too; usual pairs (``premise`` and
            ``hypothesis``) are found.
        label_column: Column of the labels (class labels, integers or strings); ``None`` to find it.
        batch_size: Texts a batch, on each device.
        eval_batch_size: The same for validation, test and prediction; ``None`` for ``batch_size``.
        limit_per_class: Fit on this many texts of each class only, chosen at random from the labels alone.
        seed: Seed of that choice and of shuffling.
        shuffle: Shuffle the training split anew in every epoch.

    Attributes:
        class_names: Names of the classes, after ``setup``.
        num_classes: Number of classes, after ``setup``.

    Raises:
        ValueError: For options that cannot be, splits and columns that are not there (the message lists those that
            are), and rows without text or label.
        ConnectionError: Where the data set is on the hub and the hub cannot be reached.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning_faast.data import TextDataModule
        >>> path = Path(tempfile.mkdtemp()) / "reviews.csv"
        >>> lines = ["review,sentiment", "gripping,good", "two hours lost,bad", "moving,good", "null,bad"]
        >>> _ = path.write_text("\n".join(lines))
        >>> data = TextDataModule(str(path), test_split=None, holdout=0.5)
        >>> data.prepare_data()
        >>> data.setup()
        >>> data.class_names, [len(data.labels(stage)) for stage in ("train", "test")]
        (['bad', 'good'], [2, 2])
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train_split: str | None = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        holdout: float | None = None,
        holdout_seed: int = 42,
        text_column: str | None = None,
        pair_column: str | None = None,
        label_column: str | None = None,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        limit_per_class: int | None = None,
        seed: int = 0,
        shuffle: bool = False,
    ) -> None:
        super().__init__(
            train_split=train_split,
            val_split=val_split,
            test_split=test_split,
            holdout=holdout,
            holdout_seed=holdout_seed,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            limit_per_class=limit_per_class,
            seed=seed,
            shuffle=shuffle,
        )
        self.path = path
        self.name = name
        self.text_column = text_column
        self.pair_column = pair_column
        self.label_column = label_column

    @property
    def transform_description(self) -> str:
        """Texts are taken as they are."""
        return "none"

    def prepare_data(self) -> None:
        """Download what is not on this machine yet."""
        self._source().download(self._splits())

    def _source(self) -> TextSource:
        return TextSource(self.path, self.name, self.text_column, self.pair_column, self.label_column)

    def _open(self, splits: Sequence[str]) -> dict[str, TextRows]:
        source = self._source()
        return {split: source.open(split) for split in splits}

    def _loader(self, stage: Stage, indices: np.ndarray, for_training: bool = False) -> DataLoader[tuple[_Text, int]]:
        split = self._opened_split(stage)
        shuffle = self.shuffle and for_training
        return DataLoader(
            TextDataset(self._rows[split], self._labels[split], indices),
            batch_size=self.batch_size if for_training else self.eval_batch_size or self.batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(self.seed) if shuffle else None,
            collate_fn=_collate,
        )


def _collate(rows: list[tuple[_Text, int]]) -> tuple[list[_Text], Tensor]:
    texts, labels = zip(*rows, strict=True)
    return list(texts), torch.tensor(labels)
