"""A linear map whose weight and bias carry their initialisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssmtrain.layers.base import Draw, Layer, ParamSpec
from ssmtrain.layers.init import constant, linear_default


class Linear(Layer):
    """y = x W^T (+ b): W (out, in); biases start at zero and are never decayed."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, d_in: int, d_out: int, bias: bool = False, init: Draw | None = None, residual: bool = False
    ) -> None:
        super().__init__()
        spec = ParamSpec(init or linear_default(d_in), residual=residual, plain=init is None)
        self.declare("weight", (d_out, d_in), spec)
        self.register_parameter("bias", None)
        if bias:
            self.declare("bias", (d_out,), ParamSpec(constant(0.0), decay=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis of x from `in` to `out`."""
        return F.linear(x, self.weight, self.bias)
