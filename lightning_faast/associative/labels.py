"""LabelLearner: what all heads that learn class labels share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_faast.associative.batches import rows_of_values
from lightning_faast.associative.learner import Learner


class LabelLearner(Learner):
    """A head that learns class labels: sizes, checks, and a ``state_dict`` whose sizes come with it.

    Args:
        in_features: Width d of the keys; from the first batch where None.
        out_features: Number of classes c; from the labels where None.
    """

    #: Buffers that the solve publishes; empty before it.
    _published: tuple[str, ...]

    def __init__(self, in_features: int | None, out_features: int | None) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {size}.")
        self.in_features = in_features
        self.out_features = out_features
        self._declared = (in_features, out_features)  # what is inferred later is forgotten by reset

    @property
    def is_fitted(self) -> bool:
        """Whether there is something to predict from."""
        return all(getattr(self, name).numel() > 0 for name in self._published)

    def _require_fitted(self) -> None:
        if not self.is_fitted:
            raise RuntimeError(
                f"{type(self).__name__} is not fitted: call fit(keys, labels), or update(...) and solve(), or load a "
                "fitted state_dict."
            )

    def _rows_of(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [N, d] and labels [N] of keys [..., d] and integer labels [...] or [..., 1]."""
        for name, given in (("keys", keys), ("values", values)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}: use torch.as_tensor.")
        if keys.ndim < 2 or not keys.is_floating_point() or not keys.shape[-1]:
            raise ValueError(f"keys must be floating point of shape [..., d], got {keys.dtype} {tuple(keys.shape)}.")
        lead = keys.shape[:-1]
        if values.is_floating_point() or values.dtype == torch.bool or values.shape not in (lead, (*lead, 1)):
            raise ValueError(
                f"{type(self).__name__} learns class labels: integers {tuple(lead)}, one for each key, got "
                f"{values.dtype} {tuple(values.shape)}. FastWeights learns one-hot, multi-hot and real values."
            )
        return keys.detach().reshape(-1, keys.shape[-1]), rows_of_values(values.detach().reshape(lead), lead)

    def _checked(self, keys: Tensor) -> Tensor:
        """Keys [..., d] to predict from."""
        if self.in_features is None or self.out_features is None:
            self._require_fitted()
        if keys.ndim == 0 or keys.shape[-1] != self.in_features:
            raise ValueError(f"keys must be [..., {self.in_features}], as in the fit, got {tuple(keys.shape)}.")
        return keys

    def _unfitted_logits(self, keys: Tensor) -> Tensor:
        """Zeros: a head that has seen nothing holds every class for equally likely."""
        dtype = torch.promote_types(keys.dtype, torch.float32)
        return torch.zeros(*keys.shape[:-1], self.out_features or 0, dtype=dtype, device=keys.device)

    @torch.no_grad()
    def predict(self, keys: Tensor) -> Tensor:
        """Labels [N] of keys [N, d]; of equally probable classes the lowest."""
        self._require_fitted()
        return super().predict(keys)

    @torch.no_grad()
    def predict_proba(self, keys: Tensor) -> Tensor:
        """Probabilities [N, c] of keys [N, d]."""
        self._require_fitted()
        return super().predict_proba(keys)

    # ------------------------------------------------------------------ state

    def _publish(self, **buffers: Tensor) -> None:
        """Set what the solve found, as new tensors on the device of the old ones."""
        for name, value in buffers.items():
            setattr(self, name, value.to(getattr(self, name).device).contiguous())
        self.in_features, self.out_features = self._sizes({name: getattr(self, name) for name in self._published})

    @abstractmethod
    def _sizes(self, published: Mapping[str, Tensor]) -> tuple[int, int]:
        """Widths (d, c) by the published buffers."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A layer takes the sizes of what it loads, except those that were declared.
        errors = args[-1]
        loaded = {name: state_dict[prefix + name] for name in self._published if prefix + name in state_dict}
        if len(loaded) == len(self._published) and all(t.numel() for t in loaded.values()):
            sizes = self._sizes(loaded)
            for what, found, declared in zip(("in_features", "out_features"), sizes, self._declared, strict=True):
                if declared not in (None, found):
                    errors.append(f"size mismatch for {prefix}{what}: {found} in the state, {declared} declared.")
            if errors:
                return
            self.in_features, self.out_features = sizes
        for name, value in loaded.items():
            held = getattr(self, name)
            setattr(self, name, torch.empty_like(value, dtype=held.dtype, device=held.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.reset()

    @property
    def bytes_to_predict(self) -> int:
        """Bytes of what a prediction reads."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    def extra_repr(self) -> str:
        """In the manner of nn.Linear."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
