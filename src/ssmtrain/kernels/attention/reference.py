"""Attention through torch: scaled_dot_product_attention, or FlexAttention for sparse masks on the GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmtrain.kernels.attention.masks import Mask, attention_mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    mask: Mask | None,
    doc_ids: Tensor | None,
    q_offset: int,
) -> Tensor:
    """See ssmtrain.kernels.attention."""
    length = q.shape[1]
    if mask is None and length == 1 and causal and doc_ids is None:
        # Decoding one token: what it sees is a slice of the cache, and no mask is needed.
        first = 0 if window is None else max(0, q_offset + 1 - window)
        k, v = k[:, first : q_offset + 1], v[:, first : q_offset + 1]
        causal = False
    elif mask is None:
        mask = attention_mask(doc_ids, window, length, k.shape[1], q_offset, causal=causal, device=q.device)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, L or S, hd)
    if mask is not None and not isinstance(mask, Tensor):
        from ssmtrain.kernels.attention import flex

        if flex.can_run(q):
            return flex.attend(q, k, v, mask, scale).transpose(1, 2)
        mask = flex.to_dense(mask)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and (mask is not None or not _half(q)):
        # The GPU's memory-efficient kernel has no groups, and the flash one neither masks nor full precision.
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        grouped = False
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
    )
    return y.transpose(1, 2)  # (B, L, Hq, hd)


def _half(q: Tensor) -> bool:
    """Whether attention of q runs in a 16-bit dtype, of its own or of autocast."""
    dtype = q.dtype
    if torch.is_autocast_enabled(q.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
    return dtype in (torch.bfloat16, torch.float16)
