"""The causal depthwise convolution one token at a time in float64: the oracle of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv1d_oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: str | None = "silu",
    doc_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Slide each document's window token by token; returns y and the final windows (n_docs, C, K)."""
    batch, length, _ = x.shape
    if doc_ids is None:
        doc_ids = torch.arange(batch)[:, None].expand(batch, length)
    n_docs = int(doc_ids.max()) + 1
    if initial_state is None:
        initial_state = x.new_zeros(n_docs, *weight.shape)
    windows = list(initial_state.unbind(0))
    rows = []
    for row in range(batch):
        outputs = []
        for t in range(length):
            doc = int(doc_ids[row, t])
            windows[doc] = torch.cat([windows[doc][:, 1:], x[row, t, :, None]], 1)
            y = (windows[doc] * weight).sum(1)
            y = y if bias is None else y + bias
            outputs.append(y * torch.sigmoid(y) if activation == "silu" else y)
        rows.append(torch.stack(outputs))
    return torch.stack(rows), torch.stack(windows)
