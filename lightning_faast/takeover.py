"""Replacing Lightning's optimizer loop by one forward-only pass, and giving everything back afterwards.

Whatever is not public in Lightning and yet needed is named here and nowhere else, one small function each.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_MISSING = object()


class Takeover:
    """Attributes of objects set for a while: instance attributes shadow methods, and all is undone in reverse."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> Any:
        """Set ``owner.name`` and return what reading it gave before."""
        before = getattr(owner, name, None)
        own = vars(owner).get(name, _MISSING)
        # A property (Trainer's and LightningModule's settings) is set through its setter; a method is shadowed.
        is_property = isinstance(getattr(type(owner), name, None), property)
        self._undo.append((owner, name, before if is_property else own))
        setattr(owner, name, value)
        return before

    def undo(self) -> None:
        """Give everything back."""
        while self._undo:
            owner, name, value = self._undo.pop()
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def forward_only(
    takeover: Takeover, trainer: Any, module: Any, epochs: int, after_step: Callable[[Any, Callable[[], Any]], Any]
) -> dict[str, tuple[Any, Any]]:
    """Make ``trainer.fit`` run ``module.training_step`` without gradients or optimizer, for whole epochs.

    Args:
        takeover: Remembers what to give back.
        trainer: The Trainer, before its loops start.
        module: The user's LightningModule.
        epochs: Epochs of this fit.
        after_step: Called with the batch and a function that runs the user's step; returns the step's output.

    Returns:
        Trainer settings that were overridden, name -> (before, after).
    """
    step = module.training_step

    @functools.wraps(step)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        batch = args[0] if args else next(iter(kwargs.values()))
        # Lightning runs steps under enable_grad, so no_grad must be inside; inference_mode would leave tensors that
        # can never be fine-tuned.
        with torch.no_grad():
            return after_step(batch, lambda: step(*args, **kwargs))

    takeover.set(module, "training_step", training_step)
    takeover.set(module, "configure_optimizers", lambda: None)
    takeover.set(module, "automatic_optimization", False)
    warnings.filterwarnings("ignore", message=".*this fit will run with no optimizer.*")

    last = trainer.current_epoch + epochs
    settings = {
        "max_epochs": (trainer.fit_loop, last),
        "min_epochs": (trainer.fit_loop, last),  # should_stop (max_time, EarlyStopping) must not end a pass half-way
        "max_steps": (trainer.fit_loop.epoch_loop, -1),
        "min_steps": (trainer.fit_loop.epoch_loop, None),
        "val_check_interval": (trainer, 1.0),  # else validation sees the unsolved head ...
        "check_val_every_n_epoch": (trainer, 1),  # ... or none at all
        "accumulate_grad_batches": (trainer, 1),
    }
    changed = {}
    for name, (owner, value) in settings.items():
        before = takeover.set(owner, name, value)
        if before != value and name not in ("min_epochs", "min_steps"):
            changed[name] = (before, value)
    _disable_timed_validation(takeover, trainer)
    return changed


def _disable_timed_validation(takeover: Takeover, trainer: Any) -> None:
    """A ``val_check_interval`` given as a time is kept under a private name, and the public one is then missing."""
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        takeover.set(trainer, "_val_check_time_interval", None)


def count_one_step(trainer: Any) -> None:
    """Count the solve as one optimizer step.

    Without it ``global_step`` stays 0, and ModelCheckpoint silently never writes. ``optimizers().step()`` works only
    inside ``training_step`` and crashes under 16-mixed.
    """
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.increment_ready()
    progress.increment_completed()


def restarted_mid_epoch(trainer: Any) -> bool:
    """Whether this fit goes on in the middle of an epoch."""
    return bool(trainer.fit_loop.restarted_mid_epoch)


def skip_ddp_wrapping(takeover: Takeover, strategy: Any) -> None:
    """Leave the module unwrapped, as Lightning itself does outside fit.

    DistributedDataParallel refuses a module without gradients, and broadcasts buffers that must stay apart.
    """
    takeover.set(strategy, "configure_ddp", lambda: None)


class EvalMode:
    """Every submodule in eval mode for a while: BatchNorm and dropout frozen, whatever the module itself sets."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._training = {m: m.training for m in module.modules()}

    def enforce(self) -> None:
        """Set it (again)."""
        self.module.eval()

    def restore(self) -> None:
        """Give each submodule its own mode back."""
        for m, training in self._training.items():
            m.training = training
