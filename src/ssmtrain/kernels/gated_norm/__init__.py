"""Gated RMSNorm: the norm between a Mamba-2 mixer's scan and its output projection."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmtrain.kernels import backend
from ssmtrain.kernels.gated_norm import reference


def gated_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    n_groups: int = 1,
    norm_before_gate: bool = False,
) -> Tensor:
    """RMSNorm with a SiLU gate, each of n_groups groups of channels normalised by itself (Dao & Gu 2024,
    sec. 7).

    x, z (..., E), z None for no gate; weight (E,). norm(x * silu(z)) * weight or, with norm_before_gate,
    norm(x) * weight * silu(z). Computed in fp32 (float64 stays); the result has x's shape and dtype.
    ValueError when n_groups does not divide E or shapes disagree.
    """
    width = x.shape[-1]
    if width % n_groups or weight.shape != (width,):
        raise ValueError(f"gated_norm: width {width}, n_groups {n_groups}, weight {tuple(weight.shape)}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"gated_norm: x {tuple(x.shape)} and z {tuple(z.shape)} differ")
    if backend.chosen("gated_norm", x.device.type) == "triton":
        from ssmtrain.kernels.gated_norm.triton import gated_norm as run
    else:
        run = reference.gated_norm
    with torch.autocast(x.device.type, enabled=False):
        return run(x, z, weight, eps=eps, n_groups=n_groups, norm_before_gate=norm_before_gate)
