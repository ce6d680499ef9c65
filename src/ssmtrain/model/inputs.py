"""Input kinds: how a batch enters the residual stream."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssmtrain.layers.base import Layer, ParamSpec
from ssmtrain.layers.init import normal


class TokenInput(Layer):
    """Token embedding, scaled by a multiplier."""

    weight: Tensor

    def __init__(self, vocab_size: int, d_model: int, std: float, multiplier: float) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.declare("weight", (vocab_size, d_model), ParamSpec(normal(std)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens (B, L), any integer dtype; returns (B, L, D) in the weight's dtype."""
        x = F.embedding(tokens, self.weight)  # (B, L, D)
        return x * self.multiplier if self.multiplier != 1.0 else x
