"""SSD in torch: matrix products inside chunks and a short loop over chunks, the definition and the CPU path."""

from __future__ import annotations

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmtrain.kernels.ssd.layout import Layout, document_chunks, to_chunks, to_tokens

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
    length = x.shape[1]
    q = min(chunk_size or CHUNK, length)
    steps = step_sizes(dt.to(dtype), dt_bias, dt_softplus, dt_limit)  # (B, L, H)
    parts = [x.to(dtype), steps, B.to(dtype), C.to(dtype)]
    layout = None
    if doc_ids is not None:
        layout = document_chunks(doc_ids, n_docs, q)
        parts = [to_chunks(part, layout) for part in parts]
        parts[1] = parts[1] * layout.valid.flatten(1).unsqueeze(-1)
    elif length % q:
        tail = q - length % q
        parts = [F.pad(part, (0, 0) * (part.dim() - 2) + (0, tail)) for part in parts]
    chunks = [part.unflatten(1, (-1, q)) for part in parts]  # (B, c, Q, ...)
    y, final = _scan(*chunks, A.to(dtype), initial_state, layout)
    y = y.flatten(1, 2)
    y = y[:, :length] if layout is None else to_tokens(y, layout, length)  # (B, L, H, P)
    if D is not None:
        y = y + x.to(dtype) * (D.to(dtype) if D.dim() == 2 else D.to(dtype).unsqueeze(-1))
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


def _scan(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, initial: Tensor | None, layout: Layout | None
) -> tuple[Tensor, Tensor]:
    """Scan chunks x (B, c, Q, H, P), dt (B, c, Q, H), B and C (B, c, Q, G, N); returns y like x and final states."""
    batch, n_chunks, q, heads, head_dim = x.shape
    groups, n = B.shape[3:]
    # exp(-104) is 0 in fp32 (exp(-746) in float64): the floor changes nothing but keeps sums small, hence exact.
    floor = -746.0 if x.dtype == torch.float64 else -104.0
    total = (dt * A).clamp(min=floor).movedim(2, 3).cumsum(-1)  # (B, c, H, Q)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).clamp(max=0.0).exp()  # (B, c, H, Q, Q)
    scores = (C.movedim(2, 3) @ B.permute(0, 1, 3, 4, 2)).tril()  # (B, c, G, Q, Q)
    mix = scores.unsqueeze(3) * decay.unflatten(2, (groups, -1))  # (B, c, G, H / G, Q, Q)
    u = (x * dt.unsqueeze(-1)).movedim(2, 3)  # (B, c, H, Q, P)
    y = mix.flatten(2, 3) @ u  # (B, c, H, Q, P)
    rest = (total[..., -1:] - total).exp().unsqueeze(-1)  # (B, c, H, Q, 1)
    wide = (u * rest).unflatten(2, (groups, -1)).movedim(4, 3).flatten(4)  # (B, c, G, Q, H / G * P)
    added = (wide.transpose(-1, -2) @ B.movedim(2, 3)).view(batch, n_chunks, heads, head_dim, n)
    through = total[..., -1].exp()[..., None, None]  # (B, c, H, 1, 1)
    entering, final = _carry(added, through, initial, layout)
    carried = entering.view(batch, n_chunks, groups, -1, n)  # (B, c, G, H / G * P, N)
    seen = (C.movedim(2, 3) @ carried.transpose(-1, -2)).unflatten(-1, (-1, head_dim))  # (B, c, G, Q, H/G, P)
    y = y + seen.movedim(3, 4).flatten(2, 3) * total.exp().unsqueeze(-1)
    return y.movedim(2, 3), final


def _carry(
    added: Tensor, through: Tensor, initial: Tensor | None, layout: Layout | None
) -> tuple[Tensor, Tensor]:
    """Pass states along the chunks; returns the state that enters each chunk (B, c, H, P, N) and final states."""
    state = torch.zeros_like(added[:, 0])
    if initial is not None and layout is None:
        state = initial.to(added.dtype)
    entering, leaving = [], []
    for k in range(added.shape[1]):
        if layout is not None:
            restart = layout.restart[:, k, None, None, None]
            fresh = 0.0 if initial is None else initial.to(added.dtype)[layout.document[:, k]]
            state = torch.where(restart, fresh, state)
        entering.append(state)
        state = torch.addcmul(added[:, k], through[:, k], state)
        leaving.append(state)
    if layout is None:
        return torch.stack(entering, 1), state
    return torch.stack(entering, 1), torch.stack(leaving, 1).flatten(0, 1)[layout.last]
