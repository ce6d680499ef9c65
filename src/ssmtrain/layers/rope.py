"""Rotary positions (Su et al. 2021), half-split as in Llama, restarting in each document."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmtrain.layers.base import Context


def positions(ctx: Context, length: int, device: torch.device) -> Tensor:
    """Position (B or 1, L) int64 of each token within its document."""
    index = torch.arange(length, device=device)[None]
    if ctx.doc_ids is None:
        return index + ctx.offset
    starts = torch.zeros_like(ctx.doc_ids, dtype=torch.int64)
    starts[:, 1:] = torch.where(ctx.doc_ids[:, 1:] != ctx.doc_ids[:, :-1], index[:, 1:], 0)
    return index - starts.cummax(dim=1).values


def tables(ctx: Context, length: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (B or 1, L, 1, dim / 2) fp32 of position * theta^(-2i/dim), cached in the context."""
    key = ("rope", dim, theta)
    made = (ctx.offset, length)
    found = ctx.cache.get(key)
    if found is None or found[0] != made:
        # Angles in float64: in fp32 they are wrong in the third digit at position 100,000.
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
        angles = positions(ctx, length, device)[..., None, None] * theta**-exponent  # (B, L, 1, dim/2)
        found = (made, angles.cos().float(), angles.sin().float())
        ctx.cache[key] = found
    return found[1], found[2]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dim features of x (B, L, H, hd) in pairs (i, i + dim/2); the rest pass through."""
    half = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    a, b, rest = x[..., :half].to(dtype), x[..., half : 2 * half].to(dtype), x[..., 2 * half :]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
