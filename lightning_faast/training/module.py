"""What modules that may train by backpropagation have in common: an adapter, an optimizer and a schedule."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import nn
from torch.optim import Optimizer

from lightning_faast.training.adapters import Adapter, is_frozen
from lightning_faast.training.schedules import WarmupCosine


class TrainableModule(LightningModule):
    """A LightningModule with a pretrained part, which an adapter prepares for training or leaves frozen.

    A part of it none of whose parameters requires a gradient is frozen and always in eval mode: neither its weights nor
    its BatchNorm statistics move. Where it is frozen as a whole it drops nothing out.

    Args:
        optimizer: Called with groups of the parameters that require a gradient.
        lr_scheduler: Called with the optimizer, stepped once an epoch; a
            :class:`~lightning_faast.training.WarmupCosine` covers the whole of training and is stepped after every
            batch.
        adapter: How the pretrained part takes part in training; ``None`` leaves it as it is.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | WarmupCosine | None,
        adapter: Adapter | None,
    ) -> None:
        super().__init__()
        self.adapter = Adapter() if adapter is None else adapter
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler

    @property
    @abstractmethod
    def pretrained(self) -> nn.Module:
        """The part that the adapter has prepared."""

    @abstractmethod
    def own_parameters(self) -> list[nn.Parameter]:
        """Trained parameters beside it."""

    @abstractmethod
    def nothing_to_optimize(self) -> str:
        """What to tell a user whose module has no parameter that requires a gradient."""

    def set_pretrained_mode(self) -> None:
        """Put frozen parts in eval mode."""
        if is_frozen(self.pretrained):
            self.pretrained.eval()
            return
        for part in self.pretrained.modules():
            if self.adapter.stays_in_eval_mode(part):
                part.eval()

    def train(self, mode: bool = True) -> "TrainableModule":
        """Set train or eval mode; frozen parts of the pretrained part stay in eval mode."""
        super().train(mode)
        self.set_pretrained_mode()
        return self

    def on_after_backward(self) -> None:
        """Have the adapter look at its first gradients."""
        if self.global_step == 0:
            self.adapter.check_gradients(self.pretrained)

    def configure_optimizers(self) -> Any:
        """Optimize the parameters that require a gradient; nothing in a fit of no epochs.

        Raises:
            RuntimeError: If there are none.
        """
        if self.trainer.max_epochs == 0:
            return None
        groups = [*self.adapter.parameter_groups(self.pretrained), {"params": self.own_parameters()}]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise RuntimeError(f"nothing to optimize: {self.nothing_to_optimize()}")
        optimizer = self.make_optimizer(groups)
        # asked for where it is needed only: it opens the data
        steps = self.trainer.estimated_stepping_batches if self.schedule_interval == "step" else 0
        scheduler = self.make_scheduler(optimizer, steps)
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}

    def make_optimizer(self, groups: Iterable[dict[str, Any]]) -> Optimizer:
        """Make the optimizer of parameter groups; the ``lr_scale`` of a group multiplies its learning rate."""
        optimizer = self._optimizer(groups)
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_scale", 1.0)
        return optimizer

    @property
    def schedule_interval(self) -> str:
        """When the scheduler is stepped: once an ``"epoch"``, or after every ``"step"``."""
        return getattr(self._lr_scheduler, "interval", "epoch")

    def make_scheduler(self, optimizer: Optimizer, total_steps: float) -> dict[str, Any] | None:
        """Make the learning rate's scheduler, as Lightning takes it; None where there is none.

        Args:
            optimizer: What it schedules.
            total_steps: Steps of the whole of training, for a scheduler that is stepped after each.
        """
        schedule: Any = self._lr_scheduler
        if schedule is None:
            return None
        if self.schedule_interval == "step":
            return {"scheduler": schedule(optimizer, total_steps), "interval": "step"}
        scheduler = schedule(optimizer)
        monitor = {"monitor": scheduler.monitor} if isinstance(scheduler, ReduceLROnPlateau) else {}
        return {"scheduler": scheduler, "interval": "epoch", **monitor}
