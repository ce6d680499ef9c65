"""Gated RMSNorm in torch: the definition, and the CPU path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_norm(
    x: Tensor, z: Tensor | None, weight: Tensor, *, eps: float, n_groups: int, norm_before_gate: bool
) -> Tensor:
    """Compute `kernels.gated_norm` (same arguments) from torch ops."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y, gate = x.to(dtype), None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        y = y * gate
    groups = y.unflatten(-1, (n_groups, -1))  # (..., G, E / G)
    y = F.rms_norm(groups, groups.shape[-1:], None, eps).flatten(-2) * weight.to(dtype)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)
