"""No encoder: examples that are keys already."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Identity(nn.Module):
    """Pass keys through, for data that were encoded elsewhere (:class:`~lightning_faast.data.KeysDataModule`).

    Args:
        num_features: Width d of the keys.
        normalize: Divide each key by its Euclidean norm. A key of zeros stays one.

    Example:
        >>> import torch
        >>> Identity(3)(torch.tensor([[0.0, 3.0, 4.0]]))
        tensor([[0.0000, 0.6000, 0.8000]])
    """

    def __init__(self, num_features: int, normalize: bool = True) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features={num_features} must be the width of the keys.")
        self.num_features = num_features
        self.normalize = normalize

    def forward(self, keys: Tensor) -> Tensor:
        """Keys [B, d], of unit norm where ``normalize`` is set, float32 or wider.

        Raises:
            ValueError: Where they are not [B, d].
        """
        if keys.ndim != 2 or keys.shape[1] != self.num_features:
            raise ValueError(f"keys must be [B, {self.num_features}], got {tuple(keys.shape)}. Set num_features.")
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        return functional.normalize(keys, dim=-1) if self.normalize else keys
