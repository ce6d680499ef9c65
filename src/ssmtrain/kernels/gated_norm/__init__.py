"""RMSNorm: gated, between a Mamba-2 mixer's scan and its output projection; plain, where a branch begins."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmtrain.kernels import backend
from ssmtrain.kernels.gated_norm import reference
from ssmtrain.kernels.gated_norm.reference import add_branch as add_branch


def gated_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    n_groups: int = 1,
    norm_before_gate: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """RMSNorm with a SiLU gate, each of n_groups groups of channels normalised by itself (Dao & Gu 2024,
    sec. 7).

    x, z (..., E), z None for no gate; weight (E,). norm(x * silu(z)) * weight or, with norm_before_gate,
    norm(x) * weight * silu(z). Computed in fp32 (float64 stays) and rounded once, to out_dtype (None: x's);
    the result has x's shape. ValueError when n_groups does not divide E or shapes disagree.
    """
    _check("gated_norm", x, weight, n_groups)
    if z is not None and z.shape != x.shape:
        raise ValueError(f"gated_norm: x {tuple(x.shape)} and z {tuple(z.shape)} differ")
    if backend.chosen("gated_norm", x.device.type) == "triton":
        from ssmtrain.kernels.gated_norm.triton import gated_norm as run
    else:
        run = reference.gated_norm
    with torch.autocast(x.device.type, enabled=False):
        return run(
            x,
            z,
            weight,
            eps=eps,
            n_groups=n_groups,
            norm_before_gate=norm_before_gate,
            out_dtype=out_dtype,
        )


def fuses(x: Tensor) -> bool:
    """Whether a norm of x can share its passes with what stands before or behind it."""
    # A compiler sees the parts, and fuses what it can.
    return not torch.compiler.is_compiling() and backend.chosen("gated_norm", x.device.type) == "triton"


def projected_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    n_groups: int = 1,
    norm_before_gate: bool = False,
) -> Tensor:
    """F.linear(gated_norm(x, z, weight), projection, bias), which keeps x and z alone for the backward pass.

    x, z (..., E), weight (E,), projection (D, E), bias (D,); returns (..., D) of x's dtype. Projection and
    bias have gradients of their own dtype, an fp32 projection's without rounding between. Only where
    `fuses`; errors as in `gated_norm`.
    """
    _check("projected_norm", x, weight, n_groups)
    from ssmtrain.kernels.gated_norm.projected import projected_norm as run

    with torch.autocast(x.device.type, enabled=False):
        return run(
            *(x, z, weight, projection, bias), eps=eps, n_groups=n_groups, norm_before_gate=norm_before_gate
        )


def stream_norm(
    x: Tensor,
    weight: Tensor,
    *,
    branch: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    reader: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of a residual stream that goes on beside it: returns x + scale * branch, and its norm * weight.

    x (..., E), branch like x or None, weight (E,); the stream, in the wider dtype of x and branch, has to be
    read on from what is returned. The Triton body adds in the pass that normalises, and in its backward pass
    adds up the gradients of both results. Precision, out_dtype and errors as in `gated_norm`; equal to a sum
    and a norm but for how often memory is read. With `reader`, the weight (out, E) of the product that reads
    the norm next by `reader.read`, the norm need not be kept for it; only where `fuses`.
    """
    _check("stream_norm", x, weight, 1)
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"stream_norm: x {tuple(x.shape)} and branch {tuple(branch.shape)} differ")
    if not fuses(x):
        stream = add_branch(x, branch, scale)
        return stream, gated_norm(stream, None, weight, eps=eps, out_dtype=out_dtype)
    with torch.autocast(x.device.type, enabled=False):
        if reader is not None:
            from ssmtrain.kernels.gated_norm.projected import stream_read

            return stream_read(x, branch, weight, reader, scale=scale, eps=eps, out_dtype=out_dtype)
        from ssmtrain.kernels.gated_norm.triton import stream_norm as run

        return run(x, weight, branch=branch, scale=scale, eps=eps, out_dtype=out_dtype)


def _check(op: str, x: Tensor, weight: Tensor, n_groups: int) -> None:
    width = x.shape[-1]
    if width % n_groups or weight.shape != (width,):
        raise ValueError(f"{op}: width {width}, n_groups {n_groups}, weight {tuple(weight.shape)}")
