"""Selective scan in pure torch: step sizes, skip and gate around the recurrence, and the one-token step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmtrain.kernels.selective_scan.documents import Documents
from ssmtrain.kernels.selective_scan.recurrence import scan


def step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    """Return clamp(softplus(dt + bias), *limit), shaped and typed like dt; inf may meet a finite limit."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    if softplus:
        dt = F.softplus(dt)
    low, high = limit
    # softplus is already above zero; an unused clamp would cost a pass and a saved tensor.
    if high != float("inf") or low > (0.0 if softplus else float("-inf")):
        dt = dt.clamp(low, high)
    return dt


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    doc_ids: Tensor | None,
    n_docs: int | None,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """See ssmtrain.kernels.selective_scan; the state never leaves fp32 (float64 for float64 u)."""
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    docs = Documents.find(doc_ids, n_docs, u.shape[0], u.shape[1])
    x = u.to(wide)  # (B, L, E)
    delta = step_sizes(dt.to(wide), dt_bias, dt_softplus, dt_limit)  # (B, L, E)
    start = None if initial_state is None else initial_state.to(wide).transpose(1, 2)  # (n_docs, N, E)
    y, final = scan(x, delta, A.to(wide).t(), B.to(wide), C.to(wide), start, docs)
    if D is not None:
        y = y + D.to(wide) * x
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(u.dtype), final.transpose(1, 2) if return_final_state else None


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> Tensor:
    """See ssmtrain.kernels.selective_scan; computes in the state's dtype."""
    wide = state.dtype
    x = u.to(wide)  # (B, E)
    delta = step_sizes(dt.to(wide), dt_bias, dt_softplus, dt_limit)  # (B, E)
    state.mul_(torch.exp(delta.unsqueeze(-1) * A.to(wide)))  # (B, E, N)
    state.addcmul_((delta * x).unsqueeze(-1), B.to(wide).unsqueeze(1))
    y = (state * C.to(wide).unsqueeze(1)).sum(-1)  # (B, E)
    if D is not None:
        y = y + D.to(wide) * x
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(u.dtype)
