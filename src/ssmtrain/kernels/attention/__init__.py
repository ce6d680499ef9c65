"""Softmax attention with grouped key/value heads, over documents, windows and caches."""

from __future__ import annotations

from torch import Tensor

from ssmtrain.kernels.attention import reference
from ssmtrain.kernels.attention.masks import Mask, attention_mask
from ssmtrain.kernels.backend import chosen

__all__ = ["Mask", "attention", "attention_mask"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    mask: Mask | None = None,
    doc_ids: Tensor | None = None,
    q_offset: int = 0,
) -> Tensor:
    """Attend from q (B, L, Hq, hd) to k, v (B, S, Hkv, hd), Hkv dividing Hq -> y (B, L, Hq, hd) like q.

    Query i stands at position q_offset + i of the keys and, when causal, sees no later key; with a window w
    it sees itself and the w - 1 keys before; with doc_ids (B, S) only its own document. `mask`, made once by
    attention_mask from the same arguments, saves making it again. The scale defaults to hd ** -0.5.
    """
    if chosen("attention", q.device.type) == "triton":
        from ssmtrain.kernels.attention.triton import attention as run
    else:
        run = reference.attention
    return run(
        q, k, v, scale=scale, causal=causal, window=window, mask=mask, doc_ids=doc_ids, q_offset=q_offset
    )
