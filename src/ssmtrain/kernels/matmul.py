"""Matrix products whose result is as wide as the sums that it is made of."""

from __future__ import annotations

import torch
from torch import Tensor

STRIP, TILE = 128, 256
"""Rows and columns of a tile in cuBLAS's fastest products on Hopper."""
FEW = 8
"""Rounds of tiles, of which a last one that is nearly empty is worth another product."""


def mm(a: Tensor, b: Tensor, wide: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b in `wide`, (M, K) by (K, N), in `out` if given; a GPU sums and returns it without rounding."""
    if a.dtype == wide:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide, out=out)
    product = a @ b
    return product.to(wide) if out is None else out.copy_(product)


def outer(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a^T b in `wide`, (T, M) by (T, N): a weight's gradient, of far more rows than it has.

    A multiprocessor makes a tile of it at a time, for a long while. Where the last round has few tiles, on
    Hopper, those are left to a product of their own, which is cut along T: 6 to 8 % less for Mamba-2's
    weights of 8,512 x 2,048 and 10,576 x 2,560.
    """
    rows = whole_rounds(a.shape[1], b.shape[1], _multiprocessors(a)) if a.dtype != wide else a.shape[1]
    if rows == a.shape[1]:
        return mm(a.t(), b, wide)
    found = a.new_empty((a.shape[1], b.shape[1]), dtype=wide)
    for part in (slice(rows), slice(rows, None)):
        mm(a[:, part].t(), b, wide, out=found[part])
    return found


def whole_rounds(M: int, N: int, multiprocessors: int | None) -> int:
    """Rows of an M x N product that are made in whole rounds of tiles; M where more than half of the last
    round has work, rounds are many, or there is but one; None multiprocessors: M."""
    if multiprocessors is None:
        return M
    wide = -(-N // TILE)
    rounds, left = divmod(-(-M // STRIP) * wide, multiprocessors)
    if not 0 < rounds <= FEW or not 0 < left <= multiprocessors // 2:
        return M
    return rounds * multiprocessors // wide * STRIP


def _multiprocessors(a: Tensor) -> int | None:
    """How many a Hopper GPU has, where the tensor is on one."""
    if not a.is_cuda or torch.cuda.get_device_capability(a.device) != (9, 0):
        return None
    return torch.cuda.get_device_properties(a.device).multi_processor_count
