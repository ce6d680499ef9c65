"""Causal depthwise convolution in torch: K shifted multiply-adds, the definition and the CPU path.

Every row is first convolved as if it were one document with nothing before it. Where that is not so, at the
first K - 1 tokens of the other documents, the outputs are computed again from gathered windows and put in
their place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmtrain.kernels.causal_conv1d.rows import RowConv


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
    """Compute `kernels.causal_conv1d` (same arguments)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    taps, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
    past = None if initial_state is None else initial_state.to(dtype).transpose(1, 2)  # (n_docs, K, C)
    y = RowConv.apply(x, taps, shift, activation == "silu")
    if doc_ids is None and past is None and not return_final_state:
        return y, None
    starts, lengths = _documents(doc_ids, n_docs, x)
    inputs = x.flatten(0, 1)  # (B * L, C)
    if doc_ids is not None or past is not None:
        slots = torch.arange(taps.shape[1] - 1, device=x.device).repeat(n_docs)
        docs = torch.arange(n_docs, device=x.device).repeat_interleave(taps.shape[1] - 1)
        # A document shorter than its slots fills the rest with its last token again, which takes no gradient.
        offset = torch.minimum(slots, lengths[docs] - 1)
        tokens = starts[docs] + offset
        heads = (_windows(inputs, past, tokens, offset, docs, taps) * taps.t()).sum(1)  # (T, C)
        heads = _finish(heads, shift, activation).to(y.dtype)
        heads = torch.where((slots == offset).unsqueeze(1), heads, heads.detach())
        y = y.flatten(0, 1).index_copy(0, tokens, heads).view(y.shape)
    if not return_final_state:
        return y, None
    docs = torch.arange(n_docs, device=x.device)
    return y, _windows(inputs, past, starts + lengths - 1, lengths - 1, docs, taps).transpose(1, 2)


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None
) -> Tensor:
    """Compute `kernels.causal_conv1d_step` (same arguments)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    state.copy_(torch.cat([state[..., 1:], x.to(state.dtype).unsqueeze(-1)], -1))
    y = (state.to(dtype) * weight.to(dtype)).sum(-1)  # (B, C)
    return _finish(y, None if bias is None else bias.to(dtype), activation).to(x.dtype)


def _finish(y: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = y if bias is None else y + bias
    return F.silu(y) if activation == "silu" else y


def _documents(doc_ids: Tensor | None, n_docs: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each document starts in the flat batch, and its length (n_docs,)."""
    batch, length = x.shape[:2]
    if doc_ids is None:
        starts = torch.arange(0, batch * length, length, device=x.device)
        return starts, torch.full_like(starts, length)
    flat = doc_ids.flatten().long()
    lengths = torch.zeros(n_docs, dtype=torch.long, device=x.device)
    lengths = lengths.scatter_add(0, flat, torch.ones_like(flat))
    return lengths.cumsum(0) - lengths, lengths  # documents are row-major: one after another when flat


def _windows(
    inputs: Tensor, past: Tensor | None, tokens: Tensor, offset: Tensor, docs: Tensor, taps: Tensor
) -> Tensor:
    """Gather the K inputs up to and with each token (T,), oldest first, (T, K, C).

    inputs (B * L, C); offset (T,) counts from the start of the token's document, docs (T,) names it; what
    lies before the document comes from its past (n_docs, K, C), or is zero.
    """
    width = taps.shape[1]
    back = torch.arange(width - 1, -1, -1, device=inputs.device)
    inside = offset[:, None] >= back  # (T, K)
    index = (tokens[:, None] - back).clamp(min=0).flatten()
    window = inputs.index_select(0, index).to(taps.dtype).view(-1, width, inputs.shape[1])
    if past is None:
        before = torch.zeros((), dtype=taps.dtype, device=inputs.device)
    else:
        column = (width + offset[:, None] - back).clamp(max=width - 1)
        before = past.flatten(0, 1).index_select(0, (docs[:, None] * width + column).flatten())
        before = before.view(window.shape)
    return torch.where(inside.unsqueeze(-1), window, before)
