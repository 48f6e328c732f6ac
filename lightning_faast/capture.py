"""Finding the head of a foreign module and reading its keys, without editing either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_faast.associative import Learner

#: Where labels usually are in a dict batch, in the order in which they are looked for.
TARGET_KEYS = ("label", "labels", "target", "targets", "y")
#: Activations after which the order of the logits is still that of the linear layer.
_MONOTONE = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)


def named_head(module: nn.Module, name: str) -> nn.Module:
    """The submodule called ``name``.

    Raises:
        ValueError: Where there is none; the candidates are listed.
    """
    try:
        return module.get_submodule(name)
    except AttributeError:
        candidates = [n for n, m in module.named_modules() if type(m) is nn.Linear or isinstance(m, Learner)]
        shown = ", ".join(candidates[-20:]) if candidates else "none"
        raise ValueError(
            f"head={name!r} is no submodule of {type(module).__name__}. Linear layers and one-pass heads in it: "
            f"{shown}."
        ) from None


def declared_head(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The only head of a module that learns in one pass, if it has one.

    Raises:
        ValueError: Where there are several.
    """
    found = [(name, m) for name, m in module.named_modules() if isinstance(m, Learner)]
    # a head inside a head is its own affair
    found = [(name, m) for name, m in found if not any(name.startswith(f"{other}.") for other, _ in found if other)]
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise ValueError(f"{type(module).__name__} has several one-pass heads ({names}): say which with head=NAME.")
    return found[0] if found else None


def check_head(module: nn.Module, name: str, head: nn.Module) -> None:
    """Refuse a head whose weight cannot simply be replaced.

    Raises:
        ValueError: Saying why.
    """
    if isinstance(head, Learner):
        return
    if type(head) is not nn.Linear:
        raise ValueError(
            f"head {name!r} is a {type(head).__module__}.{type(head).__name__}; it must be exactly torch.nn.Linear (a "
            "subclass may compute something else with its weight) or lightning_faast.FastWeights."
        )
    if parametrize.is_parametrized(head) or "weight" not in dict(head.named_parameters(recurse=False)):
        raise ValueError(
            f"head {name!r} is parametrized: its weight is computed from others. Remove the parametrization first "
            "(torch.nn.utils.parametrize.remove_parametrizations)."
        )
    sharing = [n for n, p in module.named_parameters(remove_duplicate=False) if p is head.weight]
    if len(sharing) > 1:
        others = ", ".join(n for n in sharing if n != f"{name}.weight")
        raise ValueError(
            f"head {name!r} shares its weight with {others}: solving it would change both. Untie them first."
        )


class LastLinear:
    """Watches one step of a module and tells which nn.Linear gave its output, if that is unambiguous.

    Use as a context manager around the step, then ask :meth:`head`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._names = {id(m): name for name, m in module.named_modules()}
        self._handles: list[Any] = []
        self._linears: list[tuple[nn.Linear, Tensor]] = []
        self._output: Tensor | None = None
        self._after: list[str] = []

    def __enter__(self) -> LastLinear:
        for m in self.module.modules():
            if next(m.children(), None) is None or type(m) is nn.Linear:
                self._handles.append(m.register_forward_hook(self._seen))
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _seen(self, m: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if type(m) is nn.Linear and args and isinstance(output, Tensor):
            # Two inputs are enough to tell parallel heads from layers in a row; no more is kept alive.
            self._linears = [*self._linears[-1:], (m, args[0])]
            self._output, self._after = output, []
            return
        activation = type(m).__module__ == "torch.nn.modules.activation" and not isinstance(m, _MONOTONE)
        reshapes = activation and bool(args) and args[0] is self._output
        if reshapes or next(m.parameters(recurse=False), None) is not None:
            self._after.append(self._names[id(m)] or type(m).__name__)

    def head(self) -> tuple[str, nn.Linear, Tensor]:
        """Name, layer and keys of the last linear layer that ran.

        Raises:
            ValueError: Where none ran, or which is the head is ambiguous.
        """
        how = "Say which layer is the head: FaastCallback(head=NAME)."
        candidates = ", ".join(n for n, m in self.module.named_modules() if type(m) is nn.Linear) or "none"
        if not self._linears:
            raise ValueError(f"No torch.nn.Linear ran in training_step (there are: {candidates}). {how}")
        layer, keys = self._linears[-1]
        name = self._names[id(layer)]
        if self._after:
            raise ValueError(
                f"The last torch.nn.Linear that ran, {name!r}, does not give the output: {self._after[-1]!r} ran after "
                f"it. {how} Candidates: {candidates}."
            )
        if len(self._linears) == 2 and self._linears[0][1] is keys and self._linears[0][0] is not layer:
            other = self._names[id(self._linears[0][0])]
            raise ValueError(f"{other!r} and {name!r} read the same input, so either may be the head. {how}")
        return name, layer, keys


class KeyCapture:
    """Remembers the input of a head while a step runs, and only then: validation has inputs too, and many.

    Use as a context manager around the step, then :meth:`take` the keys.
    """

    def __init__(self, name: str, head: nn.Module) -> None:
        self.name = name
        self._inputs: list[Tensor] = []
        self._in_step = False
        self._handle = head.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._in_step:
            self._inputs.append(args[0] if args else next(iter(kwargs.values())))

    def __enter__(self) -> None:
        self._in_step, self._inputs = True, []

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._in_step = False

    def take(self) -> Tensor:
        """The keys of the step that just ran.

        Raises:
            RuntimeError: Where the head ran not exactly once.
        """
        inputs, self._inputs = self._inputs, []
        if len(inputs) != 1:
            raise RuntimeError(
                f"head {self.name!r} ran {len(inputs)} times in one training_step; it must run exactly once a batch, "
                "so that each row is counted once."
            )
        return inputs[0]

    def remove(self) -> None:
        """Take the hook off the head."""
        self._handle.remove()


def find_target(batch: Any, target: int | str | Callable[[Any], Tensor] | None) -> Tensor:
    """The labels or values of a batch.

    Args:
        batch: As ``training_step`` gets it.
        target: An index, a key, a callable, or None: the second entry of a tuple or list, or the first of
            ``label, labels, target, targets, y`` in a dict.

    Raises:
        ValueError: Where they are not found, saying what the batch holds.
    """
    if callable(target):
        found = target(batch)
    elif target is not None:
        try:
            found = batch[target]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"target={target!r} is not in the batch, which is {_described(batch)}.") from error
    elif isinstance(batch, Mapping):
        key = next((k for k in TARGET_KEYS if k in batch), None)
        if key is None:
            raise ValueError(
                f"No {', '.join(TARGET_KEYS)} in the batch, which is {_described(batch)}. "
                "Say where the labels are: FaastCallback(target=KEY)."
            )
        found = batch[key]
    elif isinstance(batch, Sequence) and len(batch) == 2:
        found = batch[1]
    else:
        raise ValueError(
            f"The batch is {_described(batch)}, so where its labels are is not known. Say so: "
            "FaastCallback(target=INDEX, KEY or a callable)."
        )
    if not isinstance(found, Tensor):
        raise ValueError(
            f"The target must be a tensor, got {type(found).__name__} from a batch of {_described(batch)}."
        )
    return found


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict with keys {', '.join(map(repr, batch))}"
    if isinstance(batch, torch.Tensor):
        return f"one tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Sequence):
        return f"a {type(batch).__name__} of {len(batch)} entries"
    return f"a {type(batch).__name__}"
