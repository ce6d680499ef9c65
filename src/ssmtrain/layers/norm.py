"""RMSNorm (Zhang & Sennrich 2019): y = x / rms(x) * weight, computed in fp32.

What reads a norm is nearly always a Linear, which autocast has cast its input. A norm of an fp32 stream
therefore rounds to autocast's dtype itself: the same numbers, without an fp32 array written and read between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmtrain.kernels.gated_norm import gated_norm, stream_norm
from ssmtrain.layers.base import Layer, ParamSpec
from ssmtrain.layers.forget import forget
from ssmtrain.layers.init import constant


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

    def out_dtype(self, x: Tensor) -> torch.dtype | None:
        """Autocast's dtype where the norm of x is to be rounded to that, else None."""
        device = x.device.type
        if self.keep_fp32 or x.dtype != torch.float32 or not torch.is_autocast_enabled(device):
            return None
        return torch.get_autocast_dtype(device)


class RMSNorm(_Norm):
    """RMSNorm over the last axis with an fp32 weight that is never decayed."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., width); the result has x's dtype, or autocast's where x is fp32."""
        return rms_norm(x, self.weight, self.eps, self.out_dtype(x))


class StreamNorm(_Norm):
    """RMSNorm at the entry of a residual branch, where the stream goes on beside it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stream x (..., width), to be added to, and its norm, as RMSNorm's; see `stream_norm`."""
        rest = self.weight, self.eps, self.out_dtype(x)
        if torch.compiler.is_compiling():
            return x, rms_norm(x, *rest)
        stream, y = stream_norm(x, self.weight, eps=self.eps, out_dtype=rest[-1])
        return stream, forget(y, rms_norm, x, *rest)
