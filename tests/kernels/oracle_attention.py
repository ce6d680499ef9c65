"""Attention as a softmax over each query's own list of keys, in float64: the oracle of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    doc_ids: Tensor | None = None,
    q_offset: int = 0,
) -> Tensor:
    """Attend from q (B, L, Hq, hd) to k, v (B, S, Hkv, hd) query by query, listing the keys each one sees."""
    share = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    rows = []
    for row in range(q.shape[0]):
        outputs = []
        for i in range(q.shape[1]):
            at = q_offset + i
            seen = range(k.shape[1])
            if causal:
                seen = [key for key in seen if key <= at]
            if window is not None:
                seen = [key for key in seen if abs(at - key) < window]
            if doc_ids is not None:
                seen = [key for key in seen if doc_ids[row, key] == doc_ids[row, at]]
            keys = k[row, list(seen)].repeat_interleave(share, 1)  # (seen, Hq, hd)
            values = v[row, list(seen)].repeat_interleave(share, 1)
            scores = scale * (q[row, i] * keys).sum(-1)  # (seen, Hq)
            weights = scores.exp() / scores.exp().sum(0)
            outputs.append((weights[..., None] * values).sum(0))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def make_inputs(length: int, n_keys: int, *, heads: int = 4, kv_heads: int = 2, dim: int = 8, batch: int = 2):
    """Random float64 q (B, L, Hq, hd), k and v (B, S, Hkv, hd)."""
    generator = torch.Generator().manual_seed(length + n_keys)
    shapes = {
        "q": (batch, length, heads, dim),
        "k": (batch, n_keys, kv_heads, dim),
        "v": (batch, n_keys, kv_heads, dim),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
