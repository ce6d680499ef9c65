"""Head kinds: what the residual stream is turned into at the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmtrain.kernels.linear_cross_entropy import linear_cross_entropy
from ssmtrain.kernels.linear_cross_entropy.reference import chunk_rows, matmul_dtype
from ssmtrain.kernels.matmul import mm
from ssmtrain.layers.base import Layer, ParamSpec
from ssmtrain.layers.init import normal
from ssmtrain.layers.norm import RMSNorm


class LmHead(Layer):
    """Final norm, projection to the vocabulary, and a cross-entropy that never stores all logits.

    A tied head owns no projection: it is handed the embedding's weight at each call, so that there is one
    parameter, whatever wraps the model.
    """

    weight: Tensor | None

    def __init__(self, vocab: int, d_model: int, eps: float, std: float, tied: bool, scale: float) -> None:
        super().__init__()
        self.logit_scale = scale
        self.norm = RMSNorm(d_model, eps)
        self.register_parameter("weight", None)
        if not tied:
            self.declare("weight", (vocab, d_model), ParamSpec(normal(std)))

    def _projection(self, embedding: Tensor) -> Tensor:
        return embedding if self.weight is None else self.weight

    def logits(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Logits (..., V) of x (..., D), in the dtype of the matrix product."""
        y = F.linear(self.norm(x), self._projection(embedding))  # (..., V)
        return y * self.logit_scale if self.logit_scale != 1.0 else y

    @torch.no_grad()
    def answers(self, x: Tensor, labels: Tensor, embedding: Tensor) -> Tensor:
        """The likeliest id (n,) at each of the n labels that are not -100, in their order; x (B, L, D).

        Logits are made where something is asked and nowhere else, some rows at a time.
        """
        asked = self.norm(x[labels != -100])  # (n, D)
        rows = chunk_rows(self._projection(embedding).shape[0], x.is_cuda)
        found = [self._largest(part, embedding) for part in asked.split(rows)]
        return torch.cat(found)

    def _largest(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        weight = self._projection(embedding)
        low = matmul_dtype(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            wide = torch.float64 if low == torch.float64 else torch.float32
            logits = mm(hidden.to(low), weight.to(low).t(), wide)  # (n, V)
        return logits.argmax(-1)

    def loss(self, x: Tensor, labels: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy in nats and number of labels that are not -100; x (B, L, D), labels (B, L)."""
        hidden = self.norm(x).flatten(0, 1)  # (B L, D)
        return linear_cross_entropy(
            hidden, self._projection(embedding), labels.flatten(), logit_scale=self.logit_scale
        )
