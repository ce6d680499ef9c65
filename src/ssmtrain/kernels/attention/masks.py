"""Which keys each query sees: a dense mask on the CPU, a block-sparse one for FlexAttention on the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Mask = Any
"""What attention_mask returns: a bool tensor (B or 1, 1, L, S), or a FlexAttention BlockMask on the GPU."""


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
    """Build the mask of `length` queries at q_offset over `n_keys` keys, or None where none is needed.

    doc_ids (B, n_keys) numbers the keys' documents; the device is theirs, else `device`, else the CPU.
    """
    where = doc_ids.device if doc_ids is not None else torch.device(device or "cpu")
    if doc_ids is None and window is None and (not causal or (length == n_keys and q_offset == 0)):
        return None
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
        seen &= query - key < window
        if not causal:
            seen &= key - query < window
    seen = seen[None, None]  # (1, 1, L, S)
    if doc_ids is not None:
        own = doc_ids[:, q_offset : q_offset + length, None] == doc_ids[:, None, :]  # (B, L, S)
        seen = seen & own.unsqueeze(1)
    return seen
