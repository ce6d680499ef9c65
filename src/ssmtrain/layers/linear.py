"""A linear map whose weight and bias carry their initialisation; the weight's gradient is not rounded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmtrain.kernels.gated_norm.reader import read, reader_of
from ssmtrain.kernels.matmul import outer
from ssmtrain.kernels.narrow import narrow
from ssmtrain.layers.base import Draw, Layer, ParamSpec
from ssmtrain.layers.init import constant, linear_default

DEVICES = {"cuda"}
"""Where a product of 16-bit matrices can be written in fp32."""


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
        if not torch.compiler.is_compiling() and mixes(x, self.weight):
            if (reader := reader_of(x, self.weight)) is not None:
                with torch.autocast(x.device.type, enabled=False):
                    return read(x, reader, self.bias)
            return _Mixed.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, for one other reader, and its map.

        The other reader's gradient of x is written over by the sum of both, so it must be an op that makes it
        anew, as the kernels do.
        """
        if not torch.compiler.is_compiling() and mixes(x, self.weight):
            return _Beside.apply(x, self.weight, self.bias)
        return x, self(x)


def mixes(x: Tensor, weight: Tensor) -> bool:
    """Whether autocast would round an fp32 weight, and with it the gradient."""
    device = x.device.type
    return (
        device in DEVICES
        and torch.is_autocast_enabled(device)
        and torch.is_grad_enabled()
        and weight.requires_grad
        and weight.dtype == torch.float32
        and torch.get_autocast_dtype(device) != torch.float32
        and x.dtype != torch.float64
    )


class _Mixed(torch.autograd.Function):
    """What autocast makes of F.linear, but that the weight's gradient stays fp32, as the product was summed:
    autocast rounds it to 16 bits and converts it again, in a pass over all parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        device = x.device.type
        low = torch.get_autocast_dtype(device)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        x, weight = x.to(low), narrow(weight, low)
        ctx.save_for_backward(x, weight)
        with torch.autocast(device, enabled=False):
            return F.linear(x, weight, None if bias is None else bias.to(low))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = (grad @ weight).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        return dx, *_of_weight_and_bias(ctx, x, grad)


class _Beside(torch.autograd.Function):
    """As `_Mixed`, and x; the product that makes the gradient of x adds it to the other reader's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return x, _Mixed.forward(ctx, x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, other: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return other, None, None
        x, weight = ctx.saved_tensors
        if other is not None and other.dtype == grad.dtype and other.is_contiguous():
            other.view(-1, other.shape[-1]).addmm_(grad.flatten(0, -2), weight)
        else:
            dx = (grad @ weight).to(ctx.dtypes[0])
            other = dx if other is None else other + dx
        return other, *_of_weight_and_bias(ctx, x, grad)


def _of_weight_and_bias(ctx: Any, x: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    _, of_bias = ctx.dtypes
    rows = grad.flatten(0, -2)  # (T, out)
    d_weight = outer(rows, x.flatten(0, -2), torch.float32) if ctx.needs_input_grad[1] else None
    d_bias = rows.sum(0, dtype=torch.float32).to(of_bias) if of_bias is not None else None
    return d_weight, d_bias
