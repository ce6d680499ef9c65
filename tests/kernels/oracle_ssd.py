"""The scan of Mamba-2 one step at a time in float64: the oracle of its kernels, sharing no code with them."""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_oracle(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    doc_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run h = exp(dt A) h + dt x B^T, y = h C + D x, times silu(z), by token; returns y and final states."""
    batch, length, heads, head_dim = x.shape
    if doc_ids is None:
        doc_ids = torch.arange(batch)[:, None].expand(batch, length)
    n_docs = int(doc_ids.max()) + 1
    if initial_state is None:
        initial_state = x.new_zeros(n_docs, heads, head_dim, B.shape[-1])
    group = torch.arange(heads) // (heads // B.shape[2])
    step = dt if dt_bias is None else dt + dt_bias
    if dt_softplus:
        step = torch.logaddexp(step, torch.zeros_like(step))
    step = step.clamp(*dt_limit)
    before = torch.cat([torch.full_like(doc_ids[:, :1], -1), doc_ids[:, :-1]], 1)
    ids = doc_ids.tolist()
    state, outputs, finals = torch.zeros_like(initial_state[:batch]), [], [None] * n_docs
    for t in range(length):
        starts = doc_ids[:, t] != before[:, t]
        if starts.any():
            fresh = initial_state[doc_ids[:, t].long()]
            state = torch.where(starts[:, None, None, None], fresh, state)
        decay = torch.exp(step[:, t] * A)[..., None, None]
        fed = (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, group][:, :, None]
        state = decay * state + fed
        outputs.append((state * C[:, t, group][:, :, None]).sum(-1))
        for row in range(batch):
            if t == length - 1 or ids[row][t] != ids[row][t + 1]:
                finals[ids[row][t]] = state[row]
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    if z is not None:
        y = y * z * torch.sigmoid(z)
    return y, torch.stack(finals)
