"""The scan as two ops that torch.compile takes whole.

Traced through, its loop over chunks would be unrolled: minutes of compiling for nothing, since what it runs
is matrix products already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmtrain.kernels.op import op
from ssmtrain.kernels.ssd.blocks import kept_states
from ssmtrain.kernels.ssd.chunked import scan, scan_back

_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D"

_scan = op(
    "ssd_scan",
    schema=f"({_INPUTS}, Tensor? initial, Tensor? doc_ids, int n_docs, int chunk)"
    " -> (Tensor, Tensor, Tensor)",
)(scan)
_scan_back = op(
    "ssd_scan_back",
    schema=f"(Tensor grad_y, Tensor grad_final, {_INPUTS}, Tensor? doc_ids, Tensor entering, int chunk)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)(scan_back)


@_scan.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    doc_ids: Tensor | None,
    n_docs: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of `scan`."""
    batch, length, heads, head_dim = x.shape
    groups, n = B.shape[2:]
    kept = kept_states(batch, length, chunk, n_docs)
    entering = x.new_empty(kept, groups, heads // groups * head_dim, n)
    return x.new_empty(x.shape), x.new_empty(n_docs, heads, head_dim, n), entering


@_scan_back.register_fake
def _(
    grad_y: Tensor,
    grad_final: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    doc_ids: Tensor | None,
    entering: Tensor,
    chunk: int,
) -> tuple[Tensor, ...]:
    """Shapes and strides of `scan_back`."""
    grad_dt = dt.new_empty(dt.transpose(1, 2).shape).transpose(1, 2)
    grad_B, grad_C = (t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (B, C))
    return (
        x.new_empty(x.shape),
        grad_dt,
        torch.empty_like(A),
        grad_B,
        grad_C,
        torch.empty_like(A),
        x.new_empty(grad_final.shape),
    )
