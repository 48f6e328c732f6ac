"""Keys that were encoded elsewhere, from a safetensors file."""

import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_faast.data.labels import choose_per_class


class KeysDataModule(LightningDataModule):
    """Labelled keys from one safetensors file, for :class:`~lightning_faast.encoders.Identity`.

    The file holds ``train_keys`` [N, d] (floating point), ``train_labels`` [N] (integers from 0), ``test_keys`` and
    ``test_labels``. Its metadata may name the classes: ``class_names``, a JSON list.

    Args:
        path: The file.
        batch_size: Rows a batch.
        limit_per_class: Fit on this many rows of each class only, chosen at random from the labels alone.
        seed: Seed of that choice and of shuffling.
        shuffle: Shuffle the training rows anew in every epoch.

    Attributes:
        class_names: Names of the classes, after ``setup``; their numbers where the file has none.
        num_classes: Number of classes, after ``setup``.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> path = tempfile.mkdtemp() + "/keys.safetensors"
        >>> split = lambda n: (torch.randn(n, 4), torch.arange(n) % 2)
        >>> names = ("train_keys", "train_labels", "test_keys", "test_labels")
        >>> save_file(dict(zip(names, (*split(10), *split(6)))), path)
        >>> data = KeysDataModule(path, limit_per_class=3)
        >>> data.setup()
        >>> [len(keys) for keys, labels in data.train_dataloader()], data.class_names
        ([6], ['0', '1'])
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 256,
        limit_per_class: int | None = None,
        seed: int = 0,
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        for option, value in (("batch_size", batch_size), ("limit_per_class", limit_per_class)):
            if value is not None and value < 1:
                raise ValueError(f"{option}={value} must be at least 1.")
        self.path = path
        self.batch_size = batch_size
        self.limit_per_class = limit_per_class
        self.seed = seed
        self.shuffle = shuffle
        self.class_names: list[str] = []
        self.num_classes: int | None = None
        self._splits: dict[str, tuple[Tensor, Tensor]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the file.

        Raises:
            FileNotFoundError: Where there is none.
            ValueError: Where it holds something else.
        """
        if self._splits:
            return
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"path={self.path!r}: there is no such file (--data.path=FILE).")
        splits = {}
        try:
            with safe_open(self.path, framework="pt") as file:
                names = json.loads((file.metadata() or {}).get("class_names", "[]"))
                for split in ("train", "test"):
                    splits[split] = (file.get_tensor(f"{split}_keys"), file.get_tensor(f"{split}_labels").long())
        except SafetensorError as error:
            raise ValueError(
                f"{self.path} must be a safetensors file of train_keys, train_labels, test_keys and "
                f"test_labels ({error})."
            ) from error
        for split, (keys, labels) in splits.items():
            if keys.ndim != 2 or labels.shape != keys.shape[:1] or not len(keys):
                raise ValueError(
                    f"{self.path}: {split}_keys must be [N, d] with N labels, and N at least 1; got "
                    f"{tuple(keys.shape)} and {tuple(labels.shape)}."
                )
        known = len(names) or int(splits["train"][1].max()) + 1
        for split, (_, labels) in splits.items():
            if int(labels.min()) < 0 or int(labels.max()) >= known:
                raise ValueError(
                    f"{self.path}: {split}_labels lie in [{int(labels.min())}, {int(labels.max())}], expected "
                    f"[0, {known - 1}]."
                )
        self.class_names = [str(name) for name in names or range(known)]
        self.num_classes = known
        self._splits = splits

    @property
    def transform_description(self) -> str:
        """Keys are taken as they are."""
        return "none"

    def labels(self, stage: Literal["train", "test"]) -> np.ndarray:
        """Labels of all rows of a stage, int64 ``(rows,)``; ``limit_per_class`` does not apply."""
        return self._split(stage)[1].numpy()

    def fingerprint(self, stage: Literal["train", "test"]) -> str:
        """32 hexadecimal digits of the keys and labels of a stage."""
        state = hashlib.sha256()
        for tensor in self._split(stage):
            state.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            state.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return state.hexdigest()[:32]

    def ordered_loader(self, stage: Literal["train", "test"]) -> DataLoader[tuple[Tensor, ...]]:
        """All rows of a stage, in order."""
        return DataLoader(TensorDataset(*self._split(stage)), self.batch_size)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The training rows."""
        keys, labels = self._split("train")
        if self.limit_per_class is not None:
            chosen, _ = choose_per_class(labels.numpy(), len(self.class_names), self.limit_per_class, self.seed)
            keys, labels = keys[chosen], labels[chosen]
        generator = torch.Generator().manual_seed(self.seed) if self.shuffle else None
        return DataLoader(TensorDataset(keys, labels), self.batch_size, shuffle=self.shuffle, generator=generator)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The test rows."""
        return self.ordered_loader("test")

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The test rows."""
        return self.ordered_loader("test")

    def _split(self, stage: str) -> tuple[Tensor, Tensor]:
        if not self._splits:
            raise RuntimeError("Call setup() first; a Trainer does.")
        if stage not in self._splits:
            raise ValueError(f"stage={stage!r} must be 'train' or 'test'.")
        return self._splits[stage]
