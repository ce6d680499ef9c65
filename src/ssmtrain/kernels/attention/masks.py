"""Which keys each query sees: a dense mask on the CPU, a block-sparse one for FlexAttention on the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Mask = Tensor | BlockMask
else:
    Mask = object


def attention_mask(
    doc_ids: Tensor | None,
    window: int | None,
    length: int,
    n_keys: int,
    q_offset: int = 0,
    *,
    causal: bool = True,
    device: torch.device | str | None = None,
) -> Mask | None:
    """Build the mask of `length` queries, at positions from q_offset on, over `n_keys` keys; None: none.

    doc_ids (B, n_keys) numbers the keys' documents. On the CPU the mask is bool (B or 1, 1, L, S), True where
    the query sees the key; on a GPU it is a FlexAttention BlockMask. The device is that of doc_ids, else
    `device`, else the CPU. ValueError when the queries or doc_ids do not fit the keys.
    """
    if not 0 <= q_offset <= n_keys - length:
        raise ValueError(f"{length} queries from position {q_offset} on do not fit {n_keys} keys")
    if doc_ids is not None and doc_ids.shape[1] != n_keys:
        raise ValueError(f"doc_ids must number all {n_keys} keys, not {doc_ids.shape[1]}")
    if window is not None and window >= n_keys:
        window = None
    if doc_ids is None and window is None and (not causal or length == n_keys):
        return None
    where = doc_ids.device if doc_ids is not None else torch.device(device or "cpu")
    if where.type == "cuda":
        from ssmtrain.kernels.attention.flex import block_mask

        return block_mask(doc_ids, window, length, n_keys, q_offset, causal, where)
    return dense_mask(doc_ids, window, length, n_keys, q_offset, causal, where)


def dense_mask(
    doc_ids: Tensor | None,
    window: int | None,
    length: int,
    n_keys: int,
    q_offset: int,
    causal: bool,
    device: torch.device,
) -> Tensor:
    """Return the mask as a bool tensor (B or 1, 1, L, S), True where the query sees the key."""
    key = torch.arange(n_keys, device=device)
    query = key[q_offset : q_offset + length].unsqueeze(1)  # (L, 1)
    seen = torch.ones(length, n_keys, dtype=torch.bool, device=device)
    if causal:
        seen &= key <= query
    if window is not None:
        seen &= (query - key).abs() < window
    seen = seen[None, None]  # (1, 1, L, S)
    if doc_ids is not None:
        own = doc_ids[:, q_offset : q_offset + length, None] == doc_ids[:, None, :]  # (B, L, S)
        seen = seen & own.unsqueeze(1)
    return seen
