"""RMSNorm (Zhang & Sennrich 2019): y = x / rms(x) * weight, computed in fp32.

What reads a norm is nearly always a Linear, which autocast has cast its input. A norm of an fp32 stream
therefore rounds to autocast's dtype itself: the same numbers, without an fp32 array written and read between.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmtrain.kernels.digits import keep
from ssmtrain.kernels.gated_norm import add_branch, fuses, gated_norm, stream_norm
from ssmtrain.layers.base import Layer, ParamSpec
from ssmtrain.layers.forget import forget, forgets
from ssmtrain.layers.init import constant
from ssmtrain.layers.linear import Linear, mixes


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """Normalise the last axis of x to unit root mean square, rounded from fp32 to out_dtype (None: x's)."""
    if weight is not None and not (x.is_cuda and torch.compiler.is_compiling()):
        # Half the time of torch's on the CPU, where that is not fused; on a GPU it takes x as it is. A
        # compiler fuses torch's with what stands around it.
        return gated_norm(x, None, weight, eps=eps, out_dtype=out_dtype)
    # torch's fused form upcasts bf16 inputs itself but insists on one dtype for input and weight.
    y = torch.rms_norm(x.float() if x.dtype != torch.float64 else x, (x.shape[-1],), weight, eps)
    return y.to(out_dtype or x.dtype)


class _Norm(Layer):
    weight: Tensor

    def __init__(self, width: int, eps: float = 1e-5, keep_fp32: bool = False) -> None:
        """With keep_fp32, an fp32 input stays fp32 under autocast: for readers that are no Linear."""
        super().__init__()
        self.eps, self.keep_fp32 = eps, keep_fp32
        self.declare("weight", (width,), ParamSpec(constant(1.0), decay=False, fp32=True))

    def out_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
        """Autocast's dtype where a norm of that dtype is to be rounded to it, else None."""
        if self.keep_fp32 or dtype != torch.float32 or not torch.is_autocast_enabled(device.type):
            return None
        return torch.get_autocast_dtype(device.type)


class RMSNorm(_Norm):
    """RMSNorm over the last axis with an fp32 weight that is never decayed."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., width); the result has x's dtype, or autocast's where x is fp32."""
        keep("norm", weight=self.weight)
        return rms_norm(x, self.weight, self.eps, self.out_dtype(x.device, x.dtype))


class Stream(NamedTuple):
    """The residual stream between two branches: the norm that reads the sum next is the one to add it up."""

    x: Tensor
    """(B, L, D)"""
    branch: Tensor | None = None
    """(B, L, D): what the last branch adds to x, times the residual multiplier; None: nothing."""

    def total(self, scale: float) -> Tensor:
        """x + scale * branch, in the wider dtype of both: fp32 under autocast, where branches are bf16."""
        return add_branch(self.x, self.branch, scale)


class StreamNorm(_Norm):
    """RMSNorm at the entry of a residual branch, where the stream goes on beside it."""

    def __init__(self, width: int, eps: float = 1e-5, keep_fp32: bool = False, scale: float = 1.0) -> None:
        """With scale, a branch that is still to be added to the stream is scaled by that."""
        super().__init__(width, eps, keep_fp32)
        self.scale = scale

    def forward(self, stream: Stream, reader: Linear | None = None) -> tuple[Tensor, Tensor]:
        """Return the stream's sum x (..., width), to be added to, and its norm, as RMSNorm's; see
        `stream_norm`. The reader is the Linear that alone reads the norm, where there is one."""
        keep("norm", weight=self.weight)
        x, branch = stream
        dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
        rest = self.weight, self.eps, self.out_dtype(x.device, dtype)
        if torch.compiler.is_compiling():
            x = stream.total(self.scale)
            return x, rms_norm(x, *rest)
        asked = reader.weight if reader is not None and self._shares(stream, reader, dtype) else None
        x, y = stream_norm(
            *(x, self.weight),
            branch=branch,
            scale=self.scale,
            eps=self.eps,
            out_dtype=rest[-1],
            reader=asked,
        )
        return x, forget(y, rms_norm, x, *rest)

    def _shares(self, stream: Stream, reader: Linear, dtype: torch.dtype) -> bool:
        """Whether the norm would be forgotten, and is what the reader multiplies."""
        x = stream.x
        low = torch.get_autocast_dtype(x.device.type)
        fits = (self.out_dtype(x.device, dtype) or dtype) == low
        return fits and forgets(x) and fuses(x) and mixes(x, reader.weight)
