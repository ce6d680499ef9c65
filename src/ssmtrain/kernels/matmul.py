"""Matrix products whose result is as wide as the sums that it is made of."""

from __future__ import annotations

import torch
from torch import Tensor


def mm(a: Tensor, b: Tensor, wide: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b in `wide`, (M, K) by (K, N), in `out` if given; a GPU sums and returns it without rounding."""
    if a.dtype == wide:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide, out=out)
    product = a @ b
    return product.to(wide) if out is None else out.copy_(product)
