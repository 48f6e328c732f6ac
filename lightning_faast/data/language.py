"""Running text for language models: one stream of tokens a split, cut into windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_faast.cache import cache_directory
from lightning_faast.data.huggingface import DatasetSource, describe_files, find_kind
from lightning_faast.data.tokens import TokenStream, open_stream, tokenizer_digest
from lightning_faast.language.pairs import IGNORED
from lightning_faast.language.pretrained import load_tokenizer
from lightning_faast.language.scoring import Window, sliding_windows

_TEXT_NAMES = ("text", "content", "document", "sentence")
_TEXT_FILES = (".txt", ".md")
_DATA_FILES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
_ROWS = 1000  # of a data set read at a time

#: What tokens are for; test tokens are those of ``predict`` too.
Stage = Literal["train", "val", "test"]


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Windows of a stream of tokens.

    Items are ``input_ids`` [T] and ``labels`` [T], int64, and ``bytes``, those of the text that the labels stand for. A
    window at the end of the stream is filled up on the right, where no label counts.

    Args:
        stream: The tokens.
        windows: Places in it.
        length: T.
        offset: Where in the stream the windows' places begin.
    """

    def __init__(self, stream: TokenStream, windows: Sequence[Window], length: int, offset: int = 0) -> None:
        self.ids = stream.ids[offset:]
        self.windows = windows
        self.length = length
        ends = stream.ends_at([offset + place for w in windows for place in (w.first, w.end)])
        self.num_bytes = torch.from_numpy(ends.reshape(-1, 2) @ np.array([-1, 1]))

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index]
        size = window.end - window.start
        # what follows the text is never looked at by a causal model, so any token will do
        input_ids, labels = torch.zeros(self.length, dtype=torch.int64), torch.full((self.length,), IGNORED)
        input_ids[:size] = self.ids[window.start : window.end]
        labels[window.first - window.start : size] = self.ids[window.first : window.end]
        return {"input_ids": input_ids, "labels": labels, "bytes": self.num_bytes[index]}


class LanguageDataModule(LightningDataModule):
    """Text from the Hugging Face hub or local files, as windows of tokens.

    The rows of a split, with ``separator`` behind each, are one text. It is tokenized once, by the tokenizer of the
    module that runs, without special tokens, and kept on disk (in ``$LIGHTNING_FAAST_CACHE/tokens``); texts of more
    than eight million characters are tokenized in blocks of as many. Raw text stays raw: ``<unk>`` in it is text.

    Training windows are disjoint and come in order, unless ``shuffle`` is set. Validation and test windows begin
    ``stride`` tokens apart and score every token once
    (:func:`~lightning_faast.language.scoring.sliding_windows`), with at least ``window - stride`` tokens of context.
    Without ``stride`` they are disjoint, as the field mostly reports perplexity.

    Batches are dicts of ``input_ids`` [B, T] and ``labels`` [B, T], -100 where a token is context or none, and
    ``bytes`` [B].

    Args:
        path: A data set's name on the hub (``Salesforce/wikitext``), a local folder in its layout, a parquet, JSON
            lines or CSV file, or a plain text file (``.txt``, ``.md``; its split is ``train``).
        name: Configuration of a data set on the hub (``wikitext-2-v1``).
        train_split: Split to learn; ``None`` for text that is only evaluated on.
        val_split: Split to validate on; ``None`` for no validation.
        test_split: Split of ``test`` and ``predict``; ``None`` where there is none.
        holdout: Share of the tokens of ``train_split``, the last ones, that are the test tokens, where ``test_split``
            is ``None``.
        text_column: Column of the text; ``None`` to find it.
        separator: What stands behind each row.
        window: T, tokens of a window.
        stride: Tokens from one evaluated window to the next; ``None`` for ``window``.
        limit_tokens: Learn the first so many tokens only.
        val_tokens: Validate on the first so many tokens only.
        test_tokens: Score the first so many tokens only.
        batch_size: Windows a batch, on each device.
        eval_batch_size: The same for validation, test and prediction; ``None`` for ``batch_size``.
        num_workers: Processes that cut windows, for each loader.
        pin_memory: Page-locked batches; ``None`` for where CUDA is available.
        shuffle: Shuffle the training windows anew in every epoch.
        seed: Seed of shuffling.
        tokenizer: Name or folder of a tokenizer; ``None`` for that of the module that runs.

    Raises:
        ValueError: For options that cannot be, splits and columns that are not there, and texts that are too short.
        ConnectionError: Where the data set is on the hub and the hub cannot be reached.

    Example::

        data = LanguageDataModule("Salesforce/wikitext", "wikitext-2-v1", limit_tokens=10_000)
        trainer.fit(LanguageModule("HuggingFaceTB/SmolLM2-135M-Instruct"), datamodule=data)
    """

    #: The option that ``--shots`` of a comparison stands for, and what it counts.
    shots_option = "limit_tokens"
    shots_unit = "token"

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train_split: str | None = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        holdout: float | None = None,
        text_column: str | None = None,
        separator: str = "\n",
        window: int = 512,
        stride: int | None = None,
        limit_tokens: int | None = None,
        val_tokens: int | None = None,
        test_tokens: int | None = None,
        batch_size: int = 4,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        shuffle: bool = False,
        seed: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        if train_split is None and val_split is None and test_split is None:
            raise ValueError("train_split, val_split and test_split are all None: name at least one split.")
        for option, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("limit_tokens", limit_tokens, 2),
            ("val_tokens", val_tokens, 2),
            ("test_tokens", test_tokens, 2),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{option}={value} must be at least {least}.")
        if holdout is not None:
            if not 0 < holdout < 1:
                raise ValueError(f"holdout={holdout} must lie between 0 and 1: the share of the tokens to test on.")
            if train_split is None or test_split is not None:
                raise ValueError(
                    f"holdout={holdout} makes test tokens of training tokens: it needs a train_split, and "
                    "test_split=None (--data.test_split=null)."
                )
        sliding_windows(0, window, stride)  # refuses what cannot be
        self.path = path
        self.name = name
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split
        self.holdout = holdout
        self.text_column = text_column
        self.separator = separator
        self.window = window
        self.stride = stride
        self.limit_tokens = limit_tokens
        self.val_tokens = val_tokens
        self.test_tokens = test_tokens
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.shuffle = shuffle
        self.seed = seed
        self.tokenizer = tokenizer
        self._streams: dict[str, TokenStream] = {}  # by split
        self._digest = ""  # of the tokenizer that made them
        self._given_tokenizer: Any = None

    @property
    def has_test(self) -> bool:
        """Whether there are test tokens."""
        return self._split_of("test") is not None

    def num_tokens(self, stage: Stage) -> int:
        """Tokens of a stage, after its limit."""
        start, end = self._span(stage)
        return end - start

    def num_bytes(self, stage: Stage) -> int:
        """Bytes of the text of a stage, after its limit."""
        return self._stream(stage).num_bytes(*self._span(stage))

    def fingerprint(self, stage: Stage) -> str:
        """32 hexadecimal digits that change whenever the tokens of a stage do; ``limit_tokens`` does not apply.

        Files count by their names, sizes and times of last change; data sets on the hub by their revision.
        """
        stream = self._stream(stage)
        start, end = (0, len(stream)) if stage == "train" else self._span(stage)
        if stage == "train" and self.holdout is not None:
            end = self._cut(stream)
        return hashlib.sha256(json.dumps([stream.path.name, start, end]).encode()).hexdigest()[:32]

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Cut the text with this tokenizer, whatever module runs, where the option does not name one."""
        self._given_tokenizer = tokenizer

    def prepare_data(self) -> None:
        """Download what is not on this machine yet, and tokenize it."""
        self._open_splits()

    def setup(self, stage: str | None = None) -> None:
        """Open the tokens of all splits.

        Raises:
            ValueError: Where a stage has fewer than two tokens.
        """
        self._open_splits()
        for part in ("train", "val", "test"):
            if self._split_of(part) is not None and self.num_tokens(part) < 2:
                raise ValueError(f"The {part} text has {self.num_tokens(part)} tokens; at least 2 are needed.")

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The training windows."""
        return self._loader("train", self.window, self.batch_size, self.shuffle)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """The validation windows; an empty list, which Lightning takes for no validation, where there is no split."""
        return [] if self.val_split is None else self._loader("val", self.stride, self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The test windows."""
        return self._loader("test", self.stride, self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The test windows."""
        return self.test_dataloader()

    def _loader(
        self, stage: Stage, stride: int | None, batch_size: int | None, shuffle: bool = False
    ) -> DataLoader[dict[str, Tensor]]:
        start, end = self._span(stage)
        windows = sliding_windows(end - start, self.window, stride)
        return DataLoader(
            TokenWindows(self._stream(stage), windows, self.window, start),
            batch_size=batch_size or self.batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(self.seed) if shuffle else None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
        )

    # ------------------------------------------------------------------ tokens

    def _split_of(self, stage: str) -> str | None:
        if stage == "test" and self.holdout is not None:
            return self.train_split
        return {"train": self.train_split, "val": self.val_split, "test": self.test_split}[stage]

    def _stream(self, stage: Stage) -> TokenStream:
        split = self._split_of(stage)
        if split is None:
            raise ValueError(f"There is no {stage} text: set {stage}_split.")
        if split not in self._streams:
            raise RuntimeError("The tokens are known after setup: call prepare_data() and setup() first.")
        return self._streams[split]

    def _cut(self, stream: TokenStream) -> int:
        """The first token that is held out."""
        assert self.holdout is not None
        return len(stream) - round(self.holdout * len(stream))

    def _span(self, stage: Stage) -> tuple[int, int]:
        """The first token of a stage in its stream, and one behind its last."""
        stream = self._stream(stage)
        start, end = 0, len(stream)
        if self.holdout is not None and stage != "val":
            start, end = (0, self._cut(stream)) if stage == "train" else (self._cut(stream), end)
        limit = {"train": self.limit_tokens, "val": self.val_tokens, "test": self.test_tokens}[stage]
        return start, end if limit is None else min(end, start + limit)

    def _open_splits(self) -> None:
        tokenizer = self._find_tokenizer()
        if self._digest != tokenizer_digest(tokenizer):  # the module may be another
            self._streams, self._digest = {}, tokenizer_digest(tokenizer)
        for split in dict.fromkeys(self._split_of(stage) for stage in ("train", "val", "test")):
            if split is not None and split not in self._streams:
                texts, origin = self._open_text(split)
                origin = json.dumps([origin, split, self.text_column, self.separator])
                self._streams[split] = open_stream(texts, tokenizer, origin, cache_directory("tokens"))

    def _find_tokenizer(self) -> Any:
        if self.tokenizer is not None:
            return load_tokenizer(self.tokenizer)
        if self._given_tokenizer is not None:
            return self._given_tokenizer
        module = None if self.trainer is None else self.trainer.lightning_module
        found = getattr(module, "tokenizer", None)
        if found is None:
            raise ValueError(
                "tokenizer is not set, and there is no running module with an attribute tokenizer. Give the name or "
                "folder of one, LanguageDataModule(tokenizer=...)."
            )
        return found

    def _open_text(self, split: str) -> tuple[Iterator[str], str]:
        """The pieces of a split's text, read when asked for, and what changes whenever it does."""
        file = Path(self.path).expanduser()
        if file.suffix in _TEXT_FILES and file.is_file():
            if split != "train":
                raise ValueError(
                    f"path={self.path!r} is one text, the split 'train', and has no split {split!r}. To test on its "
                    "last tenth: --data.test_split=null --data.holdout=0.1."
                )
            return _read_file(file), describe_files(file.parent, [file])
        if file.suffix in _TEXT_FILES:
            raise FileNotFoundError(f"path={self.path!r}: there is no such text file.")
        kind = find_kind(self.path, _DATA_FILES)
        if kind is None:
            raise ValueError(f"path={self.path!r} holds no files that end in {', '.join(_DATA_FILES)}.")
        dataset, origin = DatasetSource(self.path, self.name, kind, _DATA_FILES, "text").open(split)
        return self._read_rows(dataset, self._find_column(dataset)), origin

    def _find_column(self, dataset: Any) -> str:
        columns = dataset.column_names
        wanted = [self.text_column] if self.text_column is not None else [c for c in columns if c in _TEXT_NAMES]
        if len(wanted) != 1 or wanted[0] not in columns:
            raise ValueError(
                f"text_column={self.text_column!r}, and the data set has the columns {', '.join(columns)}. Set "
                "text_column to that of the text."
            )
        return wanted[0]

    def _read_rows(self, dataset: Any, column: str) -> Iterator[str]:
        for rows in dataset.select_columns([column]).iter(_ROWS):
            for text in rows[column]:
                if text is None:
                    raise ValueError(f"A row of {self.path!r} has no text in column {column!r}. Remove it.")
                yield text + self.separator


def _read_file(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="") as file:
        yield from iter(lambda: file.read(2**20), "")
