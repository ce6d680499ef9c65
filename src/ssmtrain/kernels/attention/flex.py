"""Attention over documents and windows on the GPU: FlexAttention, which skips the blocks that nobody sees."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

BLOCK = 128
"""Queries and keys per block of the mask."""


def block_mask(
    doc_ids: Tensor | None,
    window: int | None,
    length: int,
    n_keys: int,
    q_offset: int,
    causal: bool,
    device: torch.device,
) -> BlockMask:
    """Build the BlockMask of dense_mask's arguments without ever making the dense mask.

    Documents are numbered along the row, so a block's first and last key tell whether it can touch, or is
    wholly inside, a block of queries' document.
    """
    first_q, last_q = _edges(length, device)  # (nq, 1) each, as positions among the keys
    first_q, last_q = (edge.unsqueeze(1) + q_offset for edge in (first_q, last_q))
    first_k, last_k = _edges(n_keys, device)  # (nk,)
    # Blocks that the end of a row cuts short are never whole.
    some = torch.ones(first_q.shape[0], first_k.shape[0], dtype=torch.bool, device=device)
    whole = (last_q - first_q == BLOCK - 1) & (last_k - first_k == BLOCK - 1)
    if causal:
        some &= first_k <= last_q
        whole &= last_k <= first_q
    if window is not None:
        some &= (first_q - last_k < window) & (first_k - last_q < window)
        whole &= (last_q - first_k < window) & (last_k - first_q < window)
    some, whole = some[None], whole[None]  # (1, nq, nk)
    if doc_ids is not None:
        low_q, high_q = doc_ids[:, first_q], doc_ids[:, last_q]  # (B, nq, 1)
        low_k, high_k = doc_ids[:, None, first_k], doc_ids[:, None, last_k]  # (B, 1, nk)
        some = some & (low_k <= high_q) & (low_q <= high_k)
        whole = whole & (low_q == high_q) & (low_k == high_k) & (low_q == low_k)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole & some),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(doc_ids, window, q_offset, causal),
        seq_lengths=(length, n_keys),
    )


def can_run(q: Tensor) -> bool:
    """Whether FlexAttention takes q (B, Hq, L, hd): 16 features, a block of queries, not float64."""
    # Below one block of queries torch 2.11 finds no kernel once it has seen two lengths.
    return q.is_cuda and q.dtype != torch.float64 and q.shape[-1] >= 16 and q.shape[-2] >= BLOCK


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """Attend from q (B, Hq, L, hd) to k, v (B, Hkv, S, hd) where the mask allows -> (B, Hq, L, hd)."""
    if torch.is_autocast_enabled(q.device.type):
        # Unlike scaled_dot_product_attention, FlexAttention leaves its inputs as they are under autocast.
        low = torch.get_autocast_dtype(q.device.type)
        q, k, v = (tensor.to(low) for tensor in (q, k, v))
    options: dict[str, Any] = {"block_mask": mask, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, **options)
    # Validation, generation and several kinds of block each bring shapes of their own. Beyond the limit torch
    # would go on uncompiled, with the full score matrix: that must not happen unseen.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        return _compiled()(q, k, v, **options)


def to_dense(mask: BlockMask) -> Tensor:
    """Expand a BlockMask to a bool tensor (B, 1, L, S), for what FlexAttention cannot take."""
    batch, _, length, n_keys = mask.shape
    return create_mask(mask.mask_mod, batch, 1, length, n_keys, device=str(mask.kv_indices.device))


@cache
def _compiled() -> Any:
    # Uncompiled, FlexAttention forms the full score matrix.
    return torch.compile(flex_attention)


def _edges(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last position of each block of n positions."""
    first = torch.arange(0, n, BLOCK, device=device)
    return first, (first + BLOCK - 1).clamp_max(n - 1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of blocks and their indices, those present first: (B, nq, nk) -> (B, 1, nq), (B, 1, nq, nk)."""
    present = blocks.to(torch.int32).unsqueeze(1)
    order = torch.argsort(present, dim=-1, descending=True, stable=True)
    return present.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _mask_mod(doc_ids: Tensor | None, window: int | None, q_offset: int, causal: bool) -> Any:
    def sees(b: Tensor, h: Tensor, q_index: Tensor, key: Tensor) -> Tensor:
        query = q_index + q_offset
        seen = query == query
        if causal:
            seen = seen & (key <= query)
        if window is not None:
            seen = seen & (query - key < window) & (key - query < window)
        if doc_ids is not None:
            seen = seen & (doc_ids[b, query] == doc_ids[b, key])
        return seen

    return sees
