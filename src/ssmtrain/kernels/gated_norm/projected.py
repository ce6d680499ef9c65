"""A norm and the matrix product behind it, whose backward passes share a reading of memory.

The product's weight has its gradient from the norm's result, which is forgotten to save memory. To make it
again for that is to read all that it is made of once more; but the norm's own backward pass, which comes
next, has that in registers. So the product's gradient to the norm is computed first, the norm's backward
pass writes the norm beside its gradients, and the weight's gradient comes last.

For the gated norm between a scan and the output projection that is one function. The norm at a branch's entry
stands in another module than the product that reads it, and its backward pass also waits for the stream's
gradient, so there are two: `stream_read` here, which is given the product's weight, and `reader.read`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmtrain.kernels.gated_norm import triton
from ssmtrain.kernels.gated_norm.reader import MARK, Reader
from ssmtrain.kernels.matmul import outer
from ssmtrain.kernels.narrow import narrow
from ssmtrain.kernels.parts import place_of


def projected_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    n_groups: int,
    norm_before_gate: bool,
) -> Tensor:
    """F.linear(gated_norm(x, z, weight), projection, bias), the product in x's dtype.

    x, z (..., E); weight (E,); projection (D, E) and bias (D,) in any dtype, in which they have their
    gradients: an fp32 projection's is the sum unrounded. Returns (..., D). Triton only.
    """
    options = eps, n_groups, norm_before_gate
    return _Projected.apply(x, z, weight.float().contiguous(), projection, bias, *options)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        projection: Tensor,
        bias: Tensor | None,
        *options: Any,
    ) -> Tensor:
        y, scales = triton._norm(x, z, weight, *options, None)
        low = narrow(projection, y.dtype)
        ctx.place, ctx.options = place_of(z), options[1:]
        ctx.dtypes = projection.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x, z, weight, scales, low)
        return F.linear(y, low, None if bias is None else bias.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, scales, low = ctx.saved_tensors
        of_projection, of_bias = ctx.dtypes
        rows = grad.flatten(0, -2)  # (T, D)
        dy = (rows @ low).view(x.shape)
        y = x.new_empty(x.shape)
        room = None if ctx.place is None else ctx.place.room()
        dx, dz, d_weight = triton._norm_back.body(dy, x, z, weight, scales, *ctx.options, room, y)
        del dy
        d_projection = outer(rows, y.flatten(0, -2), of_projection)
        d_bias = None if of_bias is None else rows.sum(0, dtype=torch.float32).to(of_bias)
        return dx, dz, d_weight, d_projection, d_bias, None, None, None


def stream_read(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    projection: Tensor,
    *,
    scale: float,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """As stream_norm, of a norm that F.linear(norm, projection) will `read`.

    x (..., E), branch like x or None, weight (E,), projection (out, E), whose gradient comes from here, in
    its own dtype, without rounding between. Triton only.
    """
    reader, fixed = Reader(projection), weight.float().contiguous()
    stream, y = _StreamRead.apply(x, branch, fixed, projection, scale, eps, out_dtype, reader)
    setattr(y, MARK, reader)
    return stream, y


class _StreamRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        projection: Tensor,
        scale: float,
        eps: float,
        out_dtype: torch.dtype | None,
        reader: Reader,
    ) -> tuple[Tensor, Tensor]:
        ctx.reader, ctx.of_projection = reader, projection.dtype
        stream, y = triton._StreamNorm.forward(ctx, x, branch, weight, scale, eps, out_dtype)
        ctx.low = y.dtype
        return stream, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_stream: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, ctx.reader.grad = ctx.reader.grad, None
        again = d_projection = None
        if rows is not None and dy is not None:
            again = dy.new_empty(dy.shape, dtype=ctx.low)
        dx, d_branch, d_weight = triton.stream_grads(ctx, d_stream, dy, again)
        if again is not None:
            d_projection = outer(rows, again.flatten(0, -2), ctx.of_projection)
        return dx, d_branch, d_weight, d_projection, None, None, None, None
