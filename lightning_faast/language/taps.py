"""Hooks that read hidden states of a causal language model and put others in their place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_faast.language.learner import HiddenLearner


class Tap(ABC):
    """Connects a layer of fast weights to a model: while attached, the model computes with it.

    Args:
        learner: The layer.
    """

    def __init__(self, learner: nn.Module) -> None:
        self.learner = learner
        self._handles: list[Any] = []
        self._read: list[Tensor] | None = None
        self._watched: list[Tensor] | None = None

    @abstractmethod
    def attach(self) -> None:
        """Put the hooks on the model."""

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def reading(self) -> Iterator[list[Tensor]]:
        """While open, the model runs without the layer, and the keys of every forward pass are appended to the list.

        The output layer gets no rows then: reading costs no product with the vocabulary.
        """
        read: list[Tensor] = []
        self._read = read
        try:
            yield read
        finally:
            self._read = None

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """While open, the keys of every forward pass are appended to the list; the model computes with the layer."""
        watched: list[Tensor] = []
        self._watched = watched
        try:
            yield watched
        finally:
            self._watched = None

    def _through(self, keys: Tensor) -> Tensor:
        if self._watched is not None:
            self._watched.append(keys)
        return self.learner(keys)


class OutputTap(Tap):
    """The layer reads and replaces the input of the output layer.

    Args:
        learner: From keys to the hidden states of the output layer.
        output: The output layer.
        key_layers: Decoder layers whose outputs come first in the keys.
        model: The model that is called, where there are ``key_layers``.
    """

    def __init__(
        self, learner: HiddenLearner, output: nn.Module, key_layers: Sequence[nn.Module] = (), model: Any = None
    ) -> None:
        super().__init__(learner)
        self.output = output
        self.key_layers = key_layers
        self.model = model
        self._states: list[Tensor] = []

    def attach(self) -> None:
        """Put the hooks on the model."""
        self._handles.append(self.output.register_forward_pre_hook(self._before_output))
        if self.key_layers:
            self._handles.append(self.model.register_forward_pre_hook(self._before_model, with_kwargs=True))
            self._handles += [layer.register_forward_hook(self._after_layer) for layer in self.key_layers]

    def _before_model(self, _: nn.Module, __: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise ValueError(
                "With key_layers, logits_to_keep must be a number: which positions an index means is lost."
            )
        self._states.clear()

    def _after_layer(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._states.append(first_tensor(output))

    def _before_output(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        keys = self._keys(hidden)
        if self._read is not None:
            self._read.append(keys)
            return (hidden[:, :0], *args[1:])
        return (self._through(keys), *args[1:])

    def _keys(self, hidden: Tensor) -> Tensor:
        if not self.key_layers:
            return hidden
        # the model may have kept only the last positions for its output layer
        states = [state[:, state.shape[1] - hidden.shape[1] :].to(hidden) for state in self._states]
        self._states.clear()
        return torch.cat([*states, hidden], -1)


class LogitsTap(OutputTap):
    """As :class:`OutputTap`; the layer also changes what the output layer gives, by :meth:`HiddenLearner.adjusted`."""

    learner: HiddenLearner
    _now: Tensor

    def attach(self) -> None:
        """Put the hooks on the model."""
        super().attach()
        self._handles.append(self.output.register_forward_hook(self._after_output))

    def _through(self, keys: Tensor) -> Tensor:
        self._now = keys
        return super()._through(keys)

    def _after_output(self, _: nn.Module, __: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        if self._read is not None:
            return None
        keys = self._now
        del self._now
        return self.learner.adjusted(logits, keys, self.learner.output.scale)


class MiddleTap(Tap):
    """The layer reads and replaces the output of a decoder layer.

    Args:
        learner: From hidden states to hidden states.
        layer: The decoder layer.
        output: The output layer, which gets no rows while hidden states are read.
    """

    def __init__(self, learner: HiddenLearner, layer: nn.Module, output: nn.Module) -> None:
        super().__init__(learner)
        self.layer = layer
        self.output = output

    def attach(self) -> None:
        """Put the hooks on the model."""
        self._handles.append(self.layer.register_forward_hook(self._after_layer))
        self._handles.append(self.output.register_forward_pre_hook(self._before_output))

    def _after_layer(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        hidden = first_tensor(output)
        if self._read is not None:
            self._read.append(hidden)
            return None
        new = self._through(hidden)
        return new if isinstance(output, Tensor) else (new, *output[1:])

    def _before_output(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self._read is None else (args[0][:, :0], *args[1:])


def first_tensor(output: Any) -> Tensor:
    """The hidden states of what a decoder layer gives: a tensor, or a tuple that begins with it, by version."""
    return output if isinstance(output, Tensor) else output[0]
