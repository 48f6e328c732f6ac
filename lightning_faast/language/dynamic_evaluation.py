"""Learning while a text is read: predict a window, then learn it, then predict the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_faast.language import architecture
from lightning_faast.language.fast_weight_lm import FastWeightLM
from lightning_faast.language.pairs import IGNORED, pair_labels
from lightning_faast.language.perplexity import Batch, score_window, token_device
from lightning_faast.language.scoring import TokenScores


def dynamic_evaluation(
    model: Any,
    windows: Iterable[Batch],
    *,
    learning_rate: float,
    rule: Literal["sgd", "rms"] = "sgd",
    decay: float = 0.0,
    epsilon: float = 0.1,
    statistics: Iterable[Batch] | None = None,
) -> Iterator[TokenScores]:
    r"""Dynamic evaluation (Krause et al., 2018): after each window is predicted, a gradient step on it.

    With g the gradient of the window's mean loss and :math:`\theta_0` the weights at the start, ``"sgd"`` is
    :math:`\theta \leftarrow \theta - \eta g + \lambda (\theta_0 - \theta)`. ``"rms"`` scales both terms for each
    weight, with R the root mean square of its gradient over ``statistics`` and :math:`\bar R` the mean of R over all
    weights:

    .. math:: \theta \leftarrow \theta - \eta \frac{g}{R + \epsilon \bar R}
              + \min(\lambda R / \bar R, 1)\, (\theta_0 - \theta) .

    One forward pass serves the prediction and the step. When the generator ends, is closed or raises, the weights are
    what they were, bit for bit.

    Args:
        model: A causal language model. The parameters that require a gradient take part.
        windows: Batches of ``input_ids`` and ``labels`` [B, T] in the order of the text, as
            :func:`labelled_windows` makes them; a label counts once.
        learning_rate: :math:`\eta`; 0 is plain evaluation.
        rule: ``"sgd"`` or ``"rms"``.
        decay: :math:`\lambda`, back to the weights at the start.
        epsilon: :math:`\epsilon` of ``"rms"``, in terms of the mean (the paper's is absolute).
        statistics: Batches of training text for R; needed by ``"rms"`` alone.

    Yields:
        The scores of each batch, from before it was learned.

    Raises:
        ValueError: For options that cannot be, and a model without a parameter that requires a gradient.
        RuntimeError: While running, where the loss is no longer finite.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_faast.language import dynamic_evaluation, labelled_windows, perplexity
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> windows = labelled_windows(torch.arange(40).repeat(8), window=32, stride=16)
        >>> still, moving = (perplexity(dynamic_evaluation(model, windows, learning_rate=lr)) for lr in (0.0, 1.0))
        >>> moving < still
        True
    """
    if rule not in ("sgd", "rms"):
        raise ValueError(f"rule must be 'sgd' or 'rms', got {rule!r}.")
    for name, value in (("learning_rate", learning_rate), ("decay", decay)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a number from 0, got {value}.")
    if decay > 1:
        raise ValueError(f"decay must be at most 1, the whole way back, got {decay}.")
    if (rule == "rms") != (statistics is not None):
        raise ValueError("rule='rms' needs statistics, batches of training text, and 'sgd' none.")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}.")
    if isinstance(model, FastWeightLM):
        raise ValueError("Fast weights take no gradient step: use learn_while_reading(lm, windows).")
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise ValueError(
            "No parameter of the model requires a gradient, so nothing can be learned: model.requires_grad_(True)."
        )
    return _dynamic(model, weights, windows, learning_rate, decay, epsilon, statistics)


def _dynamic(
    model: Any,
    weights: list[nn.Parameter],
    windows: Iterable[Batch],
    learning_rate: float,
    decay: float,
    epsilon: float,
    statistics: Iterable[Batch] | None,
) -> Iterator[TokenScores]:
    start = [p.detach().clone() for p in weights]
    step_scales: list[Tensor | float] = [1.0] * len(weights)
    decay_scales: list[Tensor | float] = [1.0] * len(weights)
    if statistics is not None:
        sizes = _root_mean_squares(model, weights, statistics)
        mean = sum(float(size.double().sum()) for size in sizes) / sum(size.numel() for size in sizes)
        step_scales = [1 / (size + epsilon * mean) for size in sizes]
        if decay:
            decay_scales = [(size / mean).clamp_max(1 / decay) for size in sizes]
    try:
        for number, batch in enumerate(windows):
            scores, gradients = _forward_backward(model, weights, batch)
            with torch.no_grad():
                rows = zip(weights, gradients, start, step_scales, decay_scales, strict=True)
                for p, gradient, first, step_scale, decay_scale in rows:
                    back = decay * decay_scale * (first - p) if decay else None
                    if gradient is not None:
                        p.sub_(learning_rate * step_scale * gradient)
                    if back is not None:
                        p.add_(back)
            if not bool(scores.log_likelihood.isfinite().all()):
                raise RuntimeError(f"The loss of window {number} is not finite: use a smaller learning_rate.")
            yield scores
    finally:
        with torch.no_grad():
            for p, first in zip(weights, start, strict=True):
                p.copy_(first)


@torch.inference_mode(False)
@torch.enable_grad()
def _forward_backward(
    model: Any, weights: list[nn.Parameter], batch: Batch
) -> tuple[TokenScores, tuple[Tensor | None, ...]]:
    """The scores of a batch and the gradient of its mean loss by the weights; none where no label counts."""
    device = token_device(model)
    labels = batch["labels"].to(device)
    with architecture.evaluating(model):
        logits = model(input_ids=batch["input_ids"].to(device), use_cache=False).logits
    scores = score_window(logits, labels)
    if not len(scores):
        return scores, (None,) * len(weights)
    targets = labels[:, 1:].flatten().to(logits.device)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED)
    return scores, torch.autograd.grad(loss, weights, allow_unused=True)


def _root_mean_squares(model: Any, weights: list[nn.Parameter], batches: Iterable[Batch]) -> list[Tensor]:
    """Of the gradient of each weight over batches, float32."""
    sums = [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in weights]
    count = 0
    for batch in batches:
        for total, gradient in zip(sums, _forward_backward(model, weights, batch)[1], strict=True):
            if gradient is not None:
                total.addcmul_(gradient.float(), gradient.float())
        count += 1
    if not count or not any(bool(total.any()) for total in sums):
        raise ValueError("statistics hold no batch with a label that counts: rule='rms' needs training text.")
    return [total.div_(count).sqrt_() for total in sums]


def learn_while_reading(lm: FastWeightLM, windows: Iterable[Batch], every: int = 1) -> Iterator[TokenScores]:
    """The same protocol with fast weights: predict a window, then learn it, with what was learned before as a start.

    One forward pass serves both, since what the layer reads does not depend on what it has learned. When the generator
    ends, is closed or raises, the adaptation in use is what it was, bit for bit.

    Args:
        lm: With or without something learned already.
        windows: Batches of ``input_ids`` and ``labels`` [B, T] in the order of the text; a label counts once.
        every: Windows after which the layer learns and solves.

    Yields:
        The scores of each batch, from before it was learned.

    Raises:
        ValueError: For ``every`` below 1.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_faast.language import FastWeightLM, evaluate, labelled_windows
        >>> from lightning_faast.language import learn_while_reading, perplexity
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> lm = FastWeightLM(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)))
        >>> windows = labelled_windows(torch.arange(40).repeat(8), window=32, stride=16)
        >>> perplexity(learn_while_reading(lm, windows)) < perplexity(evaluate(lm, windows))
        True
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}.")
    return _learn_while_reading(lm, windows, every)


def _learn_while_reading(lm: FastWeightLM, windows: Iterable[Batch], every: int) -> Iterator[TokenScores]:
    waiting: list[tuple[Tensor, Tensor]] = []
    with lm.temporarily():
        for batch in windows:
            scores, rows = _predict(lm, batch)
            waiting.append(rows)
            if len(waiting) == every:
                for keys, labels in waiting:
                    if bool((labels != IGNORED).any()):
                        lm.learn_keys(keys, labels)
                waiting.clear()
            yield scores


@torch.no_grad()
def _predict(lm: FastWeightLM, batch: Batch) -> tuple[TokenScores, tuple[Tensor, Tensor]]:
    """The scores of a batch, and the keys with their labels that learn it."""
    input_ids = batch["input_ids"]
    with architecture.evaluating(lm), lm.watching() as keys:
        logits = lm(input_ids=input_ids.to(token_device(lm)), use_cache=False).logits
    labels = pair_labels(input_ids, labels=batch["labels"])
    return score_window(logits, labels), (keys[0], labels)
