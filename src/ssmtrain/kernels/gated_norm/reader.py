"""The product that reads the norm at a branch's entry, whose weight has its gradient from there.

The product's backward pass leaves the gradient of its result in a Reader that the norm knows too, and keeps
no norm; the norm's, which autograd calls next, makes the norm once more and the weight's gradient of both
(`projected.stream_read`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmtrain.kernels.narrow import narrow

MARK = "_ssmtrain_reader"


@dataclass
class Reader:
    """The product that reads a norm, as the norm's backward pass knows it. It refers to neither's tensors but
    for that while: the graph, which holds it, would hold itself."""

    weight: Tensor
    """(out, E)"""
    grad: Tensor | None = None
    """(T, out): of the product's result, from its backward pass to the norm's."""
    used: bool = False


def reader_of(y: Tensor, projection: Tensor) -> Reader | None:
    """What waits at a norm for the product with this weight, once; None at other tensors."""
    found: Reader | None = getattr(y, MARK, None)
    if found is None or found.used or found.weight is not projection:
        return None
    return found if torch.is_grad_enabled() else None


def read(y: Tensor, reader: Reader, bias: Tensor | None) -> Tensor:
    """F.linear(y, reader.weight, bias) in y's dtype, which keeps nothing but the weight."""
    reader.used = True
    return _Read.apply(y, bias, reader)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor | None, reader: Reader) -> Tensor:
        low = narrow(reader.weight, y.dtype)
        ctx.reader, ctx.of_bias = reader, None if bias is None else bias.dtype
        ctx.save_for_backward(low)
        return F.linear(y, low, None if bias is None else bias.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (low,) = ctx.saved_tensors
        rows = ctx.reader.grad = grad.flatten(0, -2)  # (T, out)
        d_bias = None if ctx.of_bias is None else rows.sum(0, dtype=torch.float32).to(ctx.of_bias)
        return grad @ low, d_bias, None
