"""What layers of fast weights inside a language model have in common: hidden states in, hidden states out."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_faast.associative import Learner
from lightning_faast.language.output import OutputLayer
from lightning_faast.language.pairs import Pairs


class HiddenLearner(Learner):
    """A :class:`~lightning_faast.associative.Learner` whose keys are hidden states and whose values are tokens.

    ``update`` takes hidden states [B, T, k] with labels [B, T] in the convention of transformers: the label at t is
    predicted from the state at t - 1, -100 is left out, and no pair crosses two sequences. Rows [N, k] with tokens [N]
    are taken as pairs already made. ``forward`` gives hidden states for the model's output layer.

    Args:
        output: The model's output layer.
    """

    in_features: int
    unit = "tokens"
    reads_sequences = True
    #: Entries of the state_dict that have a row for every token, and so any length.
    row_tensors: frozenset[str] = frozenset()
    #: [V], added to the logits; None for none.
    token_bias: Tensor | None

    def __init__(self, output: OutputLayer) -> None:
        super().__init__()
        self.output = output
        self.out_features = output.vocabulary
        self.register_buffer("token_bias", None)

    @property
    def changes_logits(self) -> bool:
        """Whether the layer changes what the output layer gives, too, by :meth:`adjusted`."""
        return self.token_bias is not None

    @abstractmethod
    def forget(self) -> None:
        """Predict as before the first solve."""

    @abstractmethod
    def forward(self, keys: Tensor) -> Tensor:
        """Hidden states [..., d] for the output layer, of keys [..., k], in their dtype."""

    @torch.no_grad()
    def predict(self, keys: Tensor) -> Tensor:
        """The most likely next tokens [...] of keys [..., k]."""
        return self.output.logits(self(keys), self.token_bias).argmax(-1)

    @torch.no_grad()
    def predict_proba(self, keys: Tensor) -> Tensor:
        """Probabilities [..., V] of the next token, of keys [..., k]."""
        return self.output.logits(self(keys), self.token_bias).softmax(-1)

    def adjusted(self, logits: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
        """What the output layer is to give, where the layer changes that too.

        Args:
            logits: [..., V], before ``scale``.
            keys: [..., k].
            scale: By which the model multiplies logits afterwards.
        """
        return logits if self.token_bias is None else logits + (self.token_bias / scale).to(logits)

    def _pairs(self, keys: Tensor, values: Tensor, weights: Tensor | None) -> tuple[Pairs, Tensor | None]:
        """The pairs of a batch, and the weights of its rows."""
        if not keys.is_floating_point() or keys.ndim not in (2, 3) or not keys.shape[-1]:
            raise ValueError(
                f"keys must be hidden states [B, T, k] or rows [N, k], floating point, got {keys.dtype} "
                f"{tuple(keys.shape)}."
            )
        if values.shape != keys.shape[:-1] or values.is_floating_point():
            raise ValueError(
                f"values must be token ids {tuple(keys.shape[:-1])}, one for each hidden state, got {values.dtype} "
                f"{tuple(values.shape)}."
            )
        if weights is not None and weights.shape != keys.shape[:-1]:
            raise ValueError(f"weights must be {tuple(keys.shape[:-1])}, got {tuple(weights.shape)}.")
        if keys.ndim == 2:
            return Pairs(None, values, None), weights
        pairs = Pairs.of(values)
        own = pairs.weights
        if weights is not None:
            rows = pairs.next(weights[..., None])[:, 0]  # the weight of a pair is that of its target
            own = rows if own is None else own.to(rows) * rows
        return pairs, own

    def _check_width(self, keys: Tensor) -> None:
        if keys.shape[-1] != self.in_features:
            raise ValueError(f"keys must have width {self.in_features}, got {tuple(keys.shape)}.")

    def _checked_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids as they are indexed; on the CPU those out of range are refused at once.

        Raises:
            ValueError: Naming the first token that the model does not have.
        """
        tokens = tokens.long()
        if tokens.device.type == "cpu" and tokens.numel():
            low, high = (int(t) for t in torch.aminmax(tokens))
            if low < 0 or high >= self.output.vocabulary:
                raise ValueError(
                    f"Token id {low if low < 0 else high} is outside the model's vocabulary of "
                    f"{self.output.vocabulary}. Use the model's own tokenizer (or resize_token_embeddings), and -100 "
                    "for labels that do not count."
                )
        return tokens
