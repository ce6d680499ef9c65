"""Decays, step biases, skips, norms and routers keep fp32: in bf16 they would train no further.

An optimiser's step of 1e-4 moves log(A) = 2.7 by less than half of bf16's last digit. A strategy may cast
parameters behind a model's back, so what counts is what an op receives.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)


def keep(op: str, **tensors: Tensor | None) -> None:
    """ValueError naming what reaches an op with fewer digits than fp32."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in WIDE:
            raise ValueError(f"{op}: {name} is {tensor.dtype}; it must stay torch.float32")
