"""Learning rates over the whole of training."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine:
    r"""A linear warm-up and then half a cosine, changed at every step.

    Of T steps the first w = ``round(warmup * T)`` rise to the optimizer's own rate, and the others fall from it:

    .. math:: f(t) = \frac{t + 1}{w + 1} \; (t < w), \qquad
        f(t) = \tfrac{1}{2} \Big(1 + \cos \pi \frac{t - w}{T - w}\Big) \; (t \ge w)

    Each parameter group keeps its own rate, to which the factor is applied.

    Args:
        warmup: Share of the steps that warm up, in [0, 1).

    Raises:
        ValueError: Where ``warmup`` is out of its range, or the number of steps is not known.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler = WarmupCosine(warmup=0.25)(optimizer, total_steps=4)
        >>> scheduler.get_last_lr()
        [0.5]
    """

    #: FaastModule calls it with the number of steps, and steps what it returns after every one of them.
    interval = "step"

    def __init__(self, warmup: float = 0.1) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup} must be a share of the steps, at least 0 and less than 1.")
        self.warmup = warmup

    def __call__(self, optimizer: Optimizer, total_steps: float) -> LambdaLR:
        """Schedule ``optimizer`` over ``total_steps`` steps."""
        if not 0 < total_steps < math.inf:
            raise ValueError(
                f"a schedule over {total_steps} steps: training must have an end. Set the trainer's max_epochs or "
                "max_steps (--trainer.max_epochs=10)."
            )
        warm = round(self.warmup * total_steps)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / (warm + 1)
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / (total_steps - warm)))

        return LambdaLR(optimizer, factor)
