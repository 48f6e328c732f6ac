"""FaastCallback: fit the head of any Lightning module in one forward pass."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_faast import distributed, reporting, takeover
from lightning_faast.associative import FastWeights, Learner, Regularization, Solution
from lightning_faast.capture import KeyCapture, LastLinear, check_head, declared_head, find_target, named_head

#: Options of FastWeights that make the layer non-linear in its input, or blend in weights an nn.Linear does not have.
_NOT_LINEAR = ("normalize", "class_embeddings", "scale", "zero_shot", "prior_count")
#: Callbacks that cannot work beside a pass without gradients.
_INCOMPATIBLE = ("BaseFinetuning", "StochasticWeightAveraging", "WeightAveraging")


class FaastCallback(Callback):
    r"""Replaces the optimizer loop of ``trainer.fit`` by one forward-only pass and a closed-form solve.

    One epoch of the module's own ``training_step`` runs under ``no_grad`` and in eval mode, on the module's own loader
    and transforms. The input of the head (the keys) and the labels of each batch are summed into sufficient
    statistics, and on the last batch the head's weight and bias are solved from them, so that the validation of the
    same epoch sees the solved head. Nothing else in the module changes, no optimizer is made, and a ModelCheckpoint
    writes an ordinary checkpoint that loads without this package. Afterwards the module and the trainer are as they
    were, and the module fine-tunes normally.

    Trainer settings that would skip or misplace the solve (``max_epochs``, ``max_steps``, ``max_time``,
    ``val_check_interval``, ``check_val_every_n_epoch``, ``accumulate_grad_batches``) are overridden during the fit,
    named in the log, and restored. What ``training_step`` logs would describe an unsolved head and is dropped.

    Labels come from the batch, as ``training_step`` gets it: a step that itself mixes, permutes or renumbers rows or
    labels needs ``target``, or that moved to ``on_after_batch_transfer`` or the loader.

    Args:
        head: Path of the head in the module, such as ``"net.fc"``: an nn.Linear, or a
            :class:`~lightning_faast.associative.Learner` such as :class:`FastWeights` or a memory. Where not
            given, the module's only such head, else the last nn.Linear that ran, if that is unambiguous; the log
            names it.
        regularization: For an nn.Linear head; GCV where not given. A FastWeights head has its own.
        readout: For an nn.Linear head: ``"auto"``, ``"discriminant"`` or ``"regression"``; ``"auto"`` where not given.
        target: Where a batch holds its labels: an index, a key, or a callable of the batch. By default the second of
            two entries, or ``label``, ``labels``, ``target``, ``targets`` or ``y`` in a dict.
        ignore_index: Label of rows that do not count (padding, unlabelled pixels).
        epochs: Passes over the data; the sums go on. More than one only makes sense with random augmentation.
        save_statistics: Whether checkpoints hold the statistics too, so that learning can go on from them and a pass
            can be resumed in its middle (67 MB at a key width of 4,096).
        **options: Further options of :class:`FastWeights` for an nn.Linear head: ``prior``, ``shrink_means``,
            ``empty_classes``, ``reservoir_size``, ``seed``.

    Attributes:
        solution: :class:`~lightning_faast.associative.Solution` of the last fit; None where the head is not fast
            weights.
        metrics: The figures of the closing line, as logged under ``faast/...``.

    Raises:
        ValueError: Before the pass where it can be known there, naming the argument, for modules with manual
            optimization, several train loaders, sharded strategies, callbacks that change weights beside this one,
            heads that are not found, ambiguous or not solvable, and monitors of dropped metrics.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from lightning_faast import FaastCallback
        >>> class Net(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU())
        ...         self.fc = torch.nn.Linear(32, 2)
        ...     def training_step(self, batch):
        ...         return torch.nn.functional.cross_entropy(self.fc(self.body(batch[0])), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.parameters())
        >>> inputs = torch.randn(200, 8)
        >>> data = torch.utils.data.TensorDataset(inputs, (inputs.sum(1) > 0).long())
        >>> callback = FaastCallback(head="fc")
        >>> options = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
        >>> quiet = dict.fromkeys(options, False)
        >>> trainer = Trainer(callbacks=[callback], accelerator="cpu", **quiet)
        >>> trainer.fit(Net(), torch.utils.data.DataLoader(data, batch_size=50))
        >>> callback.solution.leave_one_out_accuracy > 0.8
        True
    """

    def __init__(
        self,
        head: str | None = None,
        regularization: Regularization | None = None,
        readout: str | None = None,
        target: int | str | Callable[[Any], Tensor] | None = None,
        ignore_index: int | None = None,
        epochs: int = 1,
        save_statistics: bool = False,
        **options: Any,
    ) -> None:
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}.")
        self.head = head
        self.target = target
        self.ignore_index = ignore_index
        self.epochs = epochs
        self.save_statistics = save_statistics
        self._options = dict(options)
        if regularization is not None:
            self._options["regularization"] = regularization
        if readout is not None:
            self._options["readout"] = readout
        self._refuse_nonlinear_options()
        FastWeights(**self._options)  # wrong names and values are refused here, not after the pass
        self.solution: Solution | None = None
        self.metrics: dict[str, float] = {}
        self._restored: dict[str, Any] | None = None
        self._takeover = takeover.Takeover()
        self._eval_mode: takeover.EvalMode | None = None
        self._forget()

    def _forget(self) -> None:
        """Drop what belongs to one fit."""
        self._name: str | None = None
        self._module: nn.Module | None = None  # the head
        self._learner: Learner | None = None
        self._capture: KeyCapture | None = None
        self._counter = distributed.RowCounter()
        self._solved = False

    @property
    def learner(self) -> Learner | None:
        """What learns the head: a one-pass head itself, or fast weights beside an nn.Linear.

        The ``statistics`` of fast weights can be saved, merged and subtracted. With several processes rank 0's holds
        all rows.
        """
        return self._learner

    # ------------------------------------------------------------------ before the pass

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over the fit."""
        if stage != "fit":
            return
        self._forget()
        self._restored = None
        self._refuse_what_cannot_work(trainer, pl_module)
        several = distributed.check_strategy(trainer.strategy)
        self._first_epoch = trainer.current_epoch
        changed = takeover.forward_only(self._takeover, trainer, pl_module, self.epochs, self._step)
        self._takeover.set(pl_module, "log", self._drop_training_logs(trainer, pl_module.log))
        if several:
            takeover.skip_ddp_wrapping(self._takeover, trainer.strategy)
        if changed:
            settings = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in changed.items())
            rank_zero_info(f"FAAST: one forward pass instead of training. Overridden during this fit: {settings}.")

    def _refuse_what_cannot_work(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} uses manual optimization: its training_step steps optimizers itself, "
                "which a pass without gradients cannot run. Set automatic_optimization = True, or fit "
                "without FaastCallback."
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if any(c.__name__ in _INCOMPATIBLE for c in type(callback).__mro__):
                raise ValueError(
                    f"{type(callback).__name__} cannot work beside FaastCallback: it changes weights too. Leave it out "
                    "of this fit; it may join a later one that fine-tunes."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on the weights; find the head, which may have been built in ``setup`` or ``configure_model``."""
        if trainer.world_size > 1:
            _share_weights(pl_module)
        if self.head is not None:
            self._use_head(pl_module, self.head, named_head(pl_module, self.head))
        elif (declared := declared_head(pl_module)) is not None:
            self._use_head(pl_module, *declared)

    def _use_head(self, pl_module: LightningModule, name: str, head: nn.Module) -> None:
        """Settle on a head, and on what learns it: itself, or fast weights beside an nn.Linear."""
        check_head(pl_module, name, head)
        if isinstance(head, Learner):
            kind = type(head).__name__
            if head.in_features is None or head.out_features is None:
                raise ValueError(
                    f"head {name!r} is a {kind} without sizes, which cannot run before it is solved: write "
                    f"{kind}(in_features, out_features, ...)."
                )
            if self._options:
                raise ValueError(
                    f"{', '.join(self._options)} given to FaastCallback, but head {name!r} is a {kind}, which has "
                    f"its own: set them there, {kind}({_written(self._options)})."
                )
            if head.reads_sequences and self.ignore_index is not None:
                raise ValueError(
                    f"ignore_index={self.ignore_index} given to FaastCallback, but head {name!r} is a {kind}, which "
                    "reads whole sequences and leaves out labels of -100 by itself. Leave ignore_index out."
                )
            self._learner = head
        else:
            assert isinstance(head, nn.Linear)
            learner = FastWeights(head.in_features, head.out_features, bias=head.bias is not None, **self._options)
            # Where the head is: a process that sees no row takes part in the sums with tensors of that device.
            self._learner = learner.to(head.weight.device)
        self._name, self._module = name, head
        self._capture = KeyCapture(name, head)

    def _refuse_nonlinear_options(self) -> None:
        bad = {name: value for name, value in self._options.items() if name in _NOT_LINEAR}
        if bad:
            raise ValueError(
                f"{', '.join(bad)}: an nn.Linear head cannot hold this, since it is not linear in the key alone. Make "
                f"the head a FastWeights, self.head = FastWeights(in_features, out_features, {_written(bad)}), and "
                "leave the options of FaastCallback empty."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Eval mode; refuse loaders that cannot be counted or resumed."""
        loader = trainer.train_dataloader
        if isinstance(loader, (dict, list, tuple)) or hasattr(loader, "iterables"):
            raise ValueError("There are several train loaders; FaastCallback needs exactly one to count each row once.")
        self._counter = distributed.RowCounter.for_loader(loader, trainer.world_size, trainer.global_rank)
        going_on = takeover.restarted_mid_epoch(trainer) or trainer.current_epoch > self._first_epoch
        if going_on:
            self._check_resumable(trainer, loader)
        self._eval_mode = takeover.EvalMode(pl_module)
        self._stopwatch = reporting.Stopwatch(pl_module.device)
        self._started = time.perf_counter()
        self._rows = 0
        if going_on:
            self._resume(trainer, pl_module)

    def _check_resumable(self, trainer: Trainer, loader: Any) -> None:
        if takeover.restarted_mid_epoch(trainer) and not hasattr(loader, "load_state_dict"):
            raise ValueError(
                f"This checkpoint was written in the middle of the pass, and a {type(loader).__name__} cannot go on "
                "there: it would replay the first rows and never see the last. Use torchdata's StatefulDataLoader, or "
                "start the pass again without ckpt_path."
            )
        if not (self._restored or {}).get("statistics"):
            raise ValueError(
                "This checkpoint was written before the pass was complete and holds no statistics. Use "
                "FaastCallback(save_statistics=True) for passes that may be resumed, or start again without ckpt_path."
            )

    def _resume(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from restored statistics, held by rank 0 alone: every other process would count them again."""
        assert self._restored is not None
        if self._learner is None:  # the head that the first step found before the checkpoint was written
            self._use_head(pl_module, self._restored["head"], named_head(pl_module, self._restored["head"]))
        assert self._learner is not None
        self._learner.reset()
        if trainer.is_global_zero:
            self._learner.load_learned_state(self._restored["statistics"])
        if takeover.restarted_mid_epoch(trainer):
            self._counter.local_rows = self._restored["local_rows"]
        self._restored = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew with the first epoch. Lightning skips this hook when it resumes in the middle of one."""
        self._counter.start_epoch()
        if trainer.current_epoch == self._first_epoch and self._learner is not None:
            self._learner.reset()

    # ------------------------------------------------------------------ the pass

    def _step(self, batch: Any, step: Callable[[], Any]) -> Any:
        """Run the user's training step and add its keys and labels to the statistics."""
        assert self._eval_mode is not None
        self._eval_mode.enforce()
        if self._capture is None:
            with LastLinear(self._eval_mode.module) as trace:
                output = step()
            name, head, keys = trace.head()
            self._use_head(self._eval_mode.module, name, head)  # type: ignore[arg-type]
            rank_zero_info(f"FAAST: the head is {name!r}, the last nn.Linear that ran.")
        else:
            with self._capture:
                output = step()
            keys = self._capture.take()
        with self._stopwatch:
            self._add(keys, find_target(batch, self.target))
        return output

    def _add(self, keys: Tensor, values: Tensor) -> None:
        assert self._learner is not None
        if keys.shape[0] != values.shape[0]:
            raise ValueError(
                f"The head {self._name!r} read {keys.shape[0]} rows ({tuple(keys.shape)}), but the target has "
                f"{values.shape[0]} ({tuple(values.shape)}): they must be the same examples. Check target=."
            )
        positions = self._counter.positions(keys.shape[0])
        kept = self._counter.keep(positions)
        if kept is not None:  # the sampler repeated rows to give every process equally many
            keys, values, positions = keys[kept.to(keys.device)], values[kept.to(values.device)], positions[kept]
        if self._learner.reads_sequences:
            self._update(keys, values, None)
            return
        inner = keys[0, ..., 0].numel() if keys.shape[0] else 1  # rows of the head in one example: 1, or T of [B, T, d]
        if inner > 1:
            positions = (positions[:, None] * inner + torch.arange(inner)).flatten()
        keys = keys.reshape(-1, keys.shape[-1])
        if values.numel() % max(len(keys), 1):
            raise ValueError(
                f"The head {self._name!r} read {len(keys)} rows, but the target is {tuple(values.shape)}: one label or "
                "one row of values for each is needed."
            )
        values = values.reshape(len(keys), -1) if len(keys) else values
        if self.ignore_index is not None and values.shape[-1] == 1:
            counted = values[:, 0] != self.ignore_index
            keys, values, positions = keys[counted], values[counted], positions[counted.cpu()]
        self._update(keys, values, positions)

    def _update(self, keys: Tensor, values: Tensor, positions: Tensor | None) -> None:
        assert self._learner is not None
        if len(keys):
            self._learner.update(keys, values, positions=positions)
            self._rows += keys[..., 0].numel()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show progress; solve on the last batch, before the validation of the same epoch."""
        if trainer.progress_bar_callback is not None:
            rows = self._rows * trainer.world_size
            rate = rows / max(time.perf_counter() - self._started, 1e-9)
            shown: Any = trainer.progress_bar_metrics  # declared as numbers; bars print text as it is
            unit = "rows" if self._learner is None else self._learner.unit
            shown.update({unit: f"{rows:,}", f"{unit}/s": f"{rate:,.0f}"})
        if trainer.is_last_batch:
            self._solve(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Solve here where the epoch ended without a last batch (``on_train_batch_start`` returned -1)."""
        if not self._solved:
            self._solve(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """New rows make the solution old."""
        self._solved = False

    def _solve(self, trainer: Trainer, pl_module: LightningModule) -> None:
        learner = self._learner
        if learner is None:
            raise RuntimeError("The pass ended before any batch reached the head: is every batch None?")
        encode = time.perf_counter() - self._started
        statistics = self._stopwatch.seconds()
        start = time.perf_counter()
        if trainer.world_size > 1:
            _merge_processes(learner)
        seen = learner.rows
        found = learner.solve()
        self.solution = found if isinstance(found, Solution) else None
        self._write()
        if trainer.world_size > 1:
            assert self._module is not None
            _share_weights(self._module)
        solve = time.perf_counter() - start
        self._solved = True
        takeover.count_one_step(trainer)
        self.metrics = reporting.figures(learner, seen, encode - statistics, statistics, solve)
        self._report(trainer)
        if trainer.world_size > 1 and not trainer.is_global_zero:
            learner.reset()  # the rows of all processes live on rank 0; kept here too, they would be counted again

    def _write(self) -> None:
        """Put the solved map into the user's own layer."""
        learner, head = self._learner, self._module
        if learner is head or learner is None:
            return
        assert isinstance(head, nn.Linear)
        assert isinstance(learner, FastWeights)
        weight, bias = learner.linear()
        with torch.no_grad():
            head.weight.copy_(weight)
            if head.bias is not None:
                head.bias.copy_(bias)
            elif bool(bias.abs().max() > 0):
                raise ValueError(
                    f"head {self._name!r} has no bias, and multi-hot targets need one to decide at one half: use "
                    "nn.Linear(..., bias=True)."
                )

    # ------------------------------------------------------------------ reporting

    def _report(self, trainer: Trainer) -> None:
        assert self._learner is not None
        # of sequences it is known how many there are, and not how many rows they hold
        counted = self.epochs == 1 and not self._learner.reads_sequences
        expected = self._counter.length if counted else None
        rank_zero_info(reporting.closing_line(self._learner, self.metrics, expected, self._stopwatch.device))
        if self.solution is not None and self.solution.below_floor:
            rank_zero_warn(
                "The truncation threshold lies under the rounding floor of the statistics: the floor decided instead."
            )
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(self.metrics, step=trainer.global_step)

    def _drop_training_logs(self, trainer: Trainer, log: Callable[..., None]) -> Callable[..., None]:
        """Log everything but what describes the unsolved head, and refuse monitors of it at the first such call."""

        def dropping(name: str, *args: Any, **kwargs: Any) -> None:
            if not trainer.training:
                log(name, *args, **kwargs)
                return
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if getattr(callback, "monitor", None) in (name, f"{name}_step", f"{name}_epoch"):
                    raise ValueError(
                        f"{type(callback).__name__} monitors {callback.monitor!r}, which training_step logs. During "
                        "the pass it would describe the unsolved head, so it is not recorded. Monitor a validation "
                        "metric, or faast/leave_one_out_accuracy."
                    )

        return dropping

    # ------------------------------------------------------------------ after the pass

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoints whose own schedule (every n steps, n epochs or minutes) never came due."""
        for callback in trainer.checkpoint_callbacks:
            scheduled = hasattr(callback, "format_checkpoint_name") and getattr(callback, "save_top_k", 0) != 0
            if not (self._solved and scheduled) or callback.best_model_path or callback.last_model_path:  # type: ignore[attr-defined]
                continue
            path = callback.format_checkpoint_name(trainer.callback_metrics)  # type: ignore[attr-defined]
            trainer.save_checkpoint(path)
            rank_zero_info(f"FAAST: {type(callback).__name__}'s schedule does not fall on the solve; saved {path}.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where nothing was solved."""
        if self._solved:
            return
        if self._restored is not None and self._restored["solved"]:
            rank_zero_info("FAAST: the pass of this checkpoint was complete; the head is the one it holds.")
            return
        raise RuntimeError(
            "fit ended without a solve: no training batch was run. Check that the train loader is not empty and "
            "limit_train_batches not 0; a checkpoint of a finished training is loaded with load_from_checkpoint, not "
            "passed as ckpt_path."
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give everything back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give everything back: Lightning does not call ``teardown`` then."""
        self._give_back()

    def _give_back(self) -> None:
        self._takeover.undo()
        if self._capture is not None:
            self._capture.remove()
            self._capture = None
        if self._eval_mode is not None:
            self._eval_mode.restore()
            self._eval_mode = None

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Primitives; with ``save_statistics`` the sums of all processes as well. Called on every rank."""
        state: dict[str, Any] = {
            "solved": self._solved,
            "head": self._name,
            "local_rows": self._counter.local_rows,
        }
        if self.save_statistics and self._learner is not None:
            learner = self._learner
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                learner = copy.deepcopy(learner)  # this process goes on with its own rows
                _merge_processes(learner)
            state["statistics"] = learner.learned_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the fit starts."""
        self._restored = state_dict


def _merge_processes(learner: Learner) -> None:
    learner.reduce(distributed.sum_over_processes, distributed.gather_from_processes)


def _share_weights(module: nn.Module) -> None:
    """Rank 0's parameters and buffers for every process."""
    distributed.broadcast_module(module)
    for m in module.modules():
        if isinstance(m, FastWeights):
            m.fold()


def _written(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={'...' if isinstance(value, Tensor) else repr(value)}" for name, value in options.items())
