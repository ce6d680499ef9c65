"""RMSNorm (Zhang & Sennrich 2019): y = x / rms(x) * weight, computed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmtrain.kernels.gated_norm import gated_norm
from ssmtrain.layers.base import Layer, ParamSpec
from ssmtrain.layers.init import constant


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise the last axis of x to unit root mean square in fp32; the result has x's dtype."""
    if weight is not None and not (x.is_cuda and torch.compiler.is_compiling()):
        # Half the time of torch's on the CPU, where that is not fused; on a GPU it takes x as it is. A
        # compiler fuses torch's with what stands around it.
        return gated_norm(x, None, weight, eps=eps)
    # torch's fused form upcasts bf16 inputs itself but insists on one dtype for input and weight.
    y = torch.rms_norm(x.float() if x.dtype != torch.float64 else x, (x.shape[-1],), weight, eps)
    return y.to(x.dtype)


class RMSNorm(Layer):
    """RMSNorm over the last axis with an fp32 weight that is never decayed."""

    weight: Tensor

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.declare("weight", (width,), ParamSpec(constant(1.0), decay=False, fp32=True))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., width); the result has x's dtype."""
        return rms_norm(x, self.weight, self.eps)
