"""Grouped matrix product: each expert's weight on its own run of rows."""

from __future__ import annotations

from torch import Tensor

from ssmtrain.kernels.backend import chosen
from ssmtrain.kernels.grouped_gemm import reference


def grouped_gemm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply x (T, Din), rows sorted by expert, by weight (E, Dout, Din) -> y (T, Dout).

    counts (E,), integers that sum to T, says how many rows each expert has; none is fine. Runs in autocast's
    dtype where autocast is on.
    """
    if chosen("grouped_gemm", x.device.type) == "triton":
        from ssmtrain.kernels.grouped_gemm.triton import grouped_gemm as run
    else:
        run = reference.grouped_gemm
    return run(x, weight, counts)
