"""Gated RMSNorm in torch, the definition and the CPU path: pieces that stay in a core's cache, nothing but
inputs and one scale per group kept for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmtrain.kernels.scratch import Scratch

CACHE = 512 * 1024
"""Bytes per thread of one piece on a CPU: the few arrays that an op touches then fit a core's cache."""


def gated_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    n_groups: int,
    norm_before_gate: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute `kernels.gated_norm` (same arguments)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    width = x.shape[-1]
    rows, gates = x.reshape(-1, width), None if z is None else z.reshape(-1, width)  # (T, E)
    y = GatedNorm.apply(rows, gates, weight.to(dtype), eps, n_groups, norm_before_gate, out_dtype or x.dtype)
    return y.view(x.shape)


def add_branch(x: Tensor, branch: Tensor | None, scale: float) -> Tensor:
    """x + scale * branch (None: nothing), rounded once to the wider dtype of both."""
    return x if branch is None else torch.add(x, branch, alpha=scale)


class GatedNorm(torch.autograd.Function):
    """norm(x * silu(z)) * weight, or norm(x) * weight * silu(z)."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        z: Tensor | None,
        weight: Tensor,
        eps: float,
        n_groups: int,
        norm_first: bool,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Norm x (T, E) with gate z (T, E) and weight (E,), which sets the dtype inside; returns y (T, E)."""
        y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
        scales = weight.new_empty(x.shape[0], n_groups, 1)
        buffer = Scratch(weight)
        for part in _pieces(x):
            inner, scale = buffer.load("x", x[part]), scales[part]
            if z is not None:
                gate = _silu(buffer.load("z", z[part]), buffer("gate", *inner.shape))
                if not norm_first:
                    inner = torch.mul(inner, gate, out=buffer("inner", *inner.shape))
            groups = _split(inner, n_groups)
            length = torch.linalg.vector_norm(groups, dim=2, keepdim=True)
            torch.rsqrt(length.square_().div_(groups.shape[2]).add_(eps), out=scale)
            out = y[part] if y.dtype == weight.dtype else buffer("y", *inner.shape)
            torch.mul(groups, scale, out=_split(out, n_groups))
            out.mul_(weight)
            if z is not None and norm_first:
                out.mul_(gate)
            if y.dtype != weight.dtype:
                y[part] = out
        ctx.save_for_backward(x, z, weight, scales)
        ctx.norm_first = norm_first
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        """Gradients of x, z and weight."""
        x, z, weight, scales = ctx.saved_tensors
        grad_x = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        grad_z = None if z is None else torch.empty_like(grad_x)
        grad_weight = torch.zeros_like(weight)
        buffer = Scratch(weight)
        for part in _pieces(x):
            plain, grad = buffer.load("x", x[part]), buffer.load("grad", grad_y[part])
            shape, normed = plain.shape, buffer("normed", *plain.shape)
            if z is None:
                _norm_back(normed.copy_(plain), grad, weight, scales[part], grad_weight, grad_x[part], buffer)
                continue
            logit = buffer.load("z", z[part])
            gate = _silu(logit, buffer("gate", *shape))
            grad_gate = buffer("grad gate", *shape)
            if ctx.norm_first:
                normed.copy_(plain)
                gated = torch.mul(grad, gate, out=buffer("gated", *shape))
                _norm_back(normed, gated, weight, scales[part], grad_weight, grad_x[part], buffer)
                torch.mul(plain, weight, out=grad_gate).mul_(grad)
                _split(grad_gate, scales.shape[1]).mul_(scales[part])
            else:
                torch.mul(plain, gate, out=normed)
                inner = buffer("grad inner", *shape)
                _norm_back(normed, grad, weight, scales[part], grad_weight, inner, buffer)
                torch.mul(inner, plain, out=grad_gate)
                torch.mul(inner, gate, out=grad_x[part])
            assert grad_z is not None
            torch.ops.aten.silu_backward.grad_input(grad_gate, logit, grad_input=grad_z[part])
        return (
            grad_x.to(x.dtype),
            None if grad_z is None else grad_z.to(z.dtype),
            grad_weight,
            None,
            None,
            None,
            None,
        )


def _norm_back(
    inner: Tensor,
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    grad_weight: Tensor,
    out: Tensor,
    buffer: Scratch,
) -> None:
    """Write to out (T, E) the gradient of the norm's input; adds to grad_weight (E,), overwrites inner."""
    n_groups = scale.shape[1]
    normed = _split(inner, n_groups).mul_(scale)  # (T, G, E / G)
    share = torch.mul(grad, inner, out=buffer("share", *grad.shape))
    grad_weight += share.sum(0)
    mean = _split(share.mul_(weight), n_groups).mean(2, keepdim=True)  # (T, G, 1)
    torch.mul(grad, weight, out=out).sub_(normed.mul_(mean).flatten(1))
    _split(out, n_groups).mul_(scale)


def _silu(logit: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.silu.out(logit, out=out)


def _split(values: Tensor, n_groups: int) -> Tensor:
    """View (T, E) as groups of channels (T, G, E / G)."""
    return values.unflatten(1, (n_groups, -1))


def _pieces(x: Tensor) -> Iterator[slice]:
    """Cut x (T, E) into runs of rows."""
    in_cache = x.device.type == "cpu" and not torch.compiler.is_compiling()  # a compiler fuses the ops itself
    rows = max(1, CACHE * torch.get_num_threads() // (4 * x.shape[1])) if in_cache else x.shape[0]
    for start in range(0, x.shape[0], rows):
        yield slice(start, start + rows)
