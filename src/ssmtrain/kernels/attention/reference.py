"""Attention through torch's scaled_dot_product_attention."""

from __future__ import annotations

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
    length, n_keys = q.shape[1], k.shape[1]
    if length == 1 and causal and doc_ids is None and mask is None:
        # Decoding one token: what it sees is a slice of the cache, and no mask is needed.
        first = 0 if window is None else max(0, q_offset + 1 - window)
        k, v = k[:, first : q_offset + 1], v[:, first : q_offset + 1]
        causal = False
    elif mask is None:
        mask = attention_mask(doc_ids, window, length, n_keys, q_offset, causal=causal, device=q.device)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, L or S, hd)
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y.transpose(1, 2)  # (B, L, Hq, hd)
