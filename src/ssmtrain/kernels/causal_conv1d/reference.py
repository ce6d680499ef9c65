"""Causal depthwise convolution in torch: K shifted multiply-adds, the definition and the CPU path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    doc_ids: Tensor | None,
    n_docs: int,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute `kernels.causal_conv1d` (same arguments) from torch ops."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    length, taps = x.shape[1], weight.shape[1]
    inputs, w = x.to(dtype), weight.to(dtype)
    past = None if initial_state is None else initial_state.to(dtype).transpose(1, 2)  # (n_docs, K, C)
    if doc_ids is None:
        if past is None:
            padded = F.pad(inputs, (0, 0, taps, 0))
        else:
            padded = torch.cat([past, inputs], 1)  # (B, K + L, C)
        y = sum(padded[:, 1 + k : 1 + k + length] * w[:, k] for k in range(taps))
        final = padded[:, length:].transpose(1, 2) if return_final_state else None
    else:
        y, final = _packed(inputs, w, doc_ids, n_docs, past, return_final_state)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), final


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None
) -> Tensor:
    """Compute `kernels.causal_conv1d_step` (same arguments) from torch ops."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    state.copy_(torch.cat([state[..., 1:], x.to(state.dtype).unsqueeze(-1)], -1))
    y = (state.to(dtype) * weight.to(dtype)).sum(-1)  # (B, C)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype)


def _packed(
    inputs: Tensor, w: Tensor, doc_ids: Tensor, n_docs: int, past: Tensor | None, return_final: bool
) -> tuple[Tensor, Tensor | None]:
    """Convolve rows of several documents: taps that reach over a boundary read that document's past instead."""
    batch, length, channels = inputs.shape
    taps = w.shape[1]
    offset = _offsets(doc_ids)  # (B, L)
    y = inputs * w[:, taps - 1]
    for back in range(1, taps):
        shifted = F.pad(inputs, (0, 0, back, 0))[:, :length]
        inside = (offset >= back).unsqueeze(-1)  # (B, L, 1)
        if past is None:
            y = y + torch.where(inside, shifted, 0.0) * w[:, taps - 1 - back]
        else:
            column = (taps + offset - back).clamp(0, taps - 1)
            before = past[doc_ids.long(), column]  # (B, L, C)
            y = y + torch.where(inside, shifted, before) * w[:, taps - 1 - back]
    if not return_final:
        return y, None
    flat = doc_ids.reshape(-1).long()
    lengths = torch.bincount(flat, minlength=n_docs)
    ends = lengths.cumsum(0)  # documents are row-major, so they lie one after another in the flat batch
    back = torch.arange(taps - 1, -1, -1, device=inputs.device)
    inside = (lengths[:, None] > back).unsqueeze(-1)  # (n_docs, K, 1)
    index = (ends[:, None] - 1 - back).clamp(min=0)
    window = torch.where(inside, inputs.reshape(batch * length, channels)[index], 0.0)  # (n_docs, K, C)
    if past is not None:
        # A document shorter than the window keeps the newest part of its past.
        column = (lengths[:, None] + taps - 1 - back).clamp(0, taps - 1)
        kept = past.gather(1, column.unsqueeze(-1).expand(-1, -1, channels))
        window = torch.where(inside, window, kept)
    return y, window.transpose(1, 2)


def _offsets(doc_ids: Tensor) -> Tensor:
    """Return each token's distance from its document's first token in the row (B, L)."""
    time = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand_as(doc_ids)
    first = torch.ones_like(doc_ids, dtype=torch.bool)
    first[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return time - torch.where(first, time, 0).cummax(1).values
