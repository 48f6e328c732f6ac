"""What a run is watched by while it learns and is tested: labelled rows, or the tokens of a text."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_faast.evaluation.measure import microseconds, quality, quality_of_rows, synchronize
from lightning_faast.evaluation.records import Rows
from lightning_faast.language.module import LanguageModule
from lightning_faast.language.pairs import IGNORED
from lightning_faast.language.scoring import TokenScores

_TIMED_KEYS = 256
_PROMPT = 64  # tokens before the one whose latency is measured
_REPEATS = 5


class Watch(ABC):
    """Watches a module.

    Args:
        module: What runs.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    @abstractmethod
    def encoder(self) -> nn.Module:
        """The pretrained part, whose forward counts as encoding."""

    @abstractmethod
    def encoded(self, inputs: Any, output: Any) -> int:
        """Examples (or tokens) in one forward pass of the encoder, of its arguments and what it gave."""

    @abstractmethod
    def train_rows(self, trainer: Trainer) -> int:
        """Examples (or tokens) there were to learn from."""

    @abstractmethod
    def start_test(self) -> list[Any]:
        """Hooks for the test; their handles."""

    @abstractmethod
    def before_test_batch(self) -> None:
        """A test batch is there."""

    @abstractmethod
    def after_test_batch(self, outputs: Any, batch: Any) -> None:
        """A test batch is done."""

    @abstractmethod
    def result(self) -> tuple[dict[str, Any], Rows]:
        """Figures of the record that the test gave, and what was said of each row."""


def watch(module: LightningModule) -> Watch:
    """What watches a module.

    Raises:
        ValueError: For a module that has no encoder and is no language module.
    """
    if isinstance(module, LanguageModule):
        return TokenWatch(module)
    if not isinstance(getattr(module, "encoder", None), nn.Module):
        raise ValueError(f"RecordRun needs a module with an encoder and a head, and {type(module).__name__} has none.")
    return RowWatch(module)


class RowWatch(Watch):
    """Watches a module that classifies ``head(encoder(x))``."""

    @property
    def encoder(self) -> nn.Module:
        """The module's encoder."""
        encoder: nn.Module = self.module.encoder
        return encoder

    def encoded(self, inputs: Any, output: Any) -> int:
        """Rows of the keys."""
        return len(output)

    def train_rows(self, trainer: Trainer) -> int:
        """Rows of the training data; 0 where no loader was made."""
        try:
            return len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
        except (AttributeError, TypeError):  # max_epochs=0
            return 0

    def start_test(self) -> list[Any]:
        """Watch what the module says of each row, and the keys of the first."""
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._keys: Tensor | None = None
        return [
            self.module.register_forward_hook(self._after_module),
            self.encoder.register_forward_hook(self._keep_keys),
        ]

    def _after_module(self, _: nn.Module, args: Any, output: Tensor) -> None:
        self._logits.append(output.float())

    def _keep_keys(self, _: nn.Module, args: Any, output: Tensor) -> None:
        if self._keys is None or len(self._keys) < _TIMED_KEYS:
            new = output.detach()
            self._keys = new if self._keys is None else torch.cat([self._keys, new])

    def before_test_batch(self) -> None:
        """Nothing to do: predictions are timed from keys."""

    def after_test_batch(self, outputs: Any, batch: Any) -> None:
        """Keep the labels."""
        self._labels.append(batch[1])

    def result(self) -> tuple[dict[str, Any], Rows]:
        """Quality, and the time of a prediction from a key."""
        logits, labels = torch.cat(self._logits), torch.cat(self._labels).long()
        measured, rows = quality(logits.log_softmax(-1), labels)
        assert self._keys is not None
        head = self.module.head
        return {
            "num_classes": logits.shape[1],
            "key_width": self._keys.shape[1],
            "test_rows": len(labels),
            "microseconds_1": microseconds(head, self._keys, 1),
            "microseconds_256": microseconds(head, self._keys, 256),
            **measured,
        }, rows


class TokenWatch(Watch):
    """Watches a :class:`~lightning_faast.language.LanguageModule`."""

    module: LanguageModule

    @property
    def encoder(self) -> nn.Module:
        """The language model."""
        model: nn.Module = self.module.model
        return model

    def encoded(self, inputs: Any, output: Any) -> int:
        """Tokens of the batch."""
        return int(inputs["input_ids"].numel())

    def train_rows(self, trainer: Trainer) -> int:
        """Tokens to learn; 0 where nothing was."""
        if trainer.max_epochs == 0:
            return 0
        return int(trainer.datamodule.num_tokens("train"))  # type: ignore[attr-defined]

    def start_test(self) -> list[Any]:
        """Nothing is hooked: the test step gives what is kept."""
        self._scores: list[TokenScores] = []
        self._blocks: list[Tensor] = []
        self._windows = self._tokens = self._bytes = 0
        self._seconds = 0.0
        self._prompt: Tensor | None = None
        return []

    def before_test_batch(self) -> None:
        """Start the clock."""
        synchronize(self.module.device)
        self._start = time.perf_counter()

    def after_test_batch(self, outputs: Any, batch: Any) -> None:
        """Keep what was said of the tokens, and from which window each is."""
        synchronize(self.module.device)
        self._seconds += time.perf_counter() - self._start
        counted = (batch["labels"][:, 1:] != IGNORED).sum(1).cpu()
        self._scores.append(TokenScores(**outputs))
        self._blocks.append((self._windows + torch.arange(len(counted))).repeat_interleave(counted))
        self._windows += len(counted)
        self._tokens += batch["input_ids"].numel()
        self._bytes += int(batch["bytes"].sum())
        if self._prompt is None:
            self._prompt = batch["input_ids"][:1, :_PROMPT]

    def result(self) -> tuple[dict[str, Any], Rows]:
        """Quality, speed, and the time to the first token that is generated."""
        columns = {name: torch.cat([getattr(s, name).cpu() for s in self._scores]) for name in vars(self._scores[0])}
        rows = Rows(**columns, block=torch.cat(self._blocks))
        measured = quality_of_rows(rows)
        head = self.module.head
        loss = float(-rows.log_likelihood.double().sum())
        return {
            "unit": "token",
            "num_classes": self.module.model.get_output_embeddings().weight.shape[0],
            "key_width": head.in_features,
            "test_rows": len(rows.label),
            "bits_per_byte": loss / float(torch.tensor(2.0).log()) / self._bytes,
            "tokens_per_second": self._tokens / self._seconds,
            "first_token_seconds": self._first_token(),
            **measured,
        }, rows

    def _first_token(self) -> float:
        """Median seconds from a prompt to the first token that is generated."""
        assert self._prompt is not None
        times = []
        with torch.inference_mode():
            for _ in range(_REPEATS + 1):
                synchronize(self.module.device)
                start = time.perf_counter()
                self.module.generate(self._prompt, max_new_tokens=1, do_sample=False)
                synchronize(self.module.device)
                times.append(time.perf_counter() - start)
        return sorted(times[1:])[_REPEATS // 2]
