"""SSD in torch, the definition and the CPU path: matrix products inside chunks, a short loop over chunks."""

from __future__ import annotations

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmtrain.kernels.ssd import compiled  # noqa: F401  (registers the ops that torch.compile sees)
from ssmtrain.kernels.ssd.chunked import ChunkedScan

CHUNK = 64
"""Chunk length when none is asked for: the fastest on a CPU core at N = P = 64."""


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float | None],
    chunk_size: int | None,
    doc_ids: Tensor | None,
    n_docs: int,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute `kernels.ssd` (same arguments) in chunks."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps = step_sizes(dt.to(dtype), dt_bias, dt_softplus, dt_limit)  # (B, L, H)
    inner_d = D.to(dtype) if D is not None and D.dim() == 1 else None
    initial = None if initial_state is None else initial_state.to(dtype)
    y, final = ChunkedScan.apply(
        x.to(dtype),
        steps,
        A.to(dtype),
        B.to(dtype),
        C.to(dtype),
        inner_d,
        initial,
        doc_ids,
        n_docs,
        min(chunk_size or CHUNK, x.shape[1]),
    )
    if D is not None and inner_d is None:
        y = y + x.to(dtype) * D.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), final if return_final_state else None


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float | None],
) -> Tensor:
    """Compute `kernels.ssd_step` (same arguments) from torch ops."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    heads = x.shape[1] // B.shape[1]
    u, step = x.to(dtype), step_sizes(dt.to(dtype), dt_bias, dt_softplus, dt_limit)  # (B, H, P), (B, H)
    b, c = (m.to(dtype).repeat_interleave(heads, 1) for m in (B, C))  # (B, H, N)
    decay = torch.exp(step * A.to(dtype))
    state.mul_(decay[..., None, None]).add_((u * step.unsqueeze(-1)).unsqueeze(-1) * b.unsqueeze(2))
    y = (state.to(dtype) @ c.unsqueeze(-1)).squeeze(-1)  # (B, H, P)
    if D is not None:
        y = y + u * (D.to(dtype) if D.dim() == 2 else D.to(dtype).unsqueeze(-1))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)


def step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float | None]) -> Tensor:
    """Turn raw dt (..., H) into step sizes: bias, softplus, limits."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    if softplus:
        dt = F.softplus(dt)
    low, high = limit[0], inf if limit[1] is None else limit[1]
    if low > 0 or high < inf or not softplus:
        dt = dt.clamp(low, high)
    return dt
