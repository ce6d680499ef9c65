"""The short causal depthwise convolution with SiLU that Mamba layers put before their scan."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmtrain.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from ssmtrain.layers.base import Context, Layer, ParamSpec
from ssmtrain.layers.forget import forget
from ssmtrain.layers.init import constant, linear_default


class CausalConv1d(Layer):
    """silu(conv(x) + bias) over (B, L, C), one filter of `width` taps per channel; bias zero at first."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.declare("weight", (channels, width), ParamSpec(linear_default(width)))
        self.register_parameter("bias", None)
        if bias:
            self.declare("bias", (channels,), ParamSpec(constant(0.0), decay=False))

    def forward(self, x: Tensor, ctx: Context, window: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Filter x (B, L, C) from window (documents, C, K) on; returns y and, if carried, the new window."""

        def filtered(x: Tensor, window: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return causal_conv1d(
                x,
                self.weight,
                self.bias,
                activation="silu",
                doc_ids=ctx.doc_ids,
                n_docs=ctx.n_docs,
                initial_state=window,
                return_final_state=ctx.carry,
            )

        y, new_window = filtered(x, window)
        y = forget(y, lambda *inputs: filtered(*inputs)[0], x, window)
        if new_window is not None:
            # A window holds inputs as they came, so their own dtype loses nothing.
            new_window = new_window.to(x.dtype if window is None else window.dtype)
        return y, new_window

    def init_window(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An empty window (batch, C, K)."""
        return torch.zeros(batch, *self.weight.shape, dtype=dtype, device=device)

    def step(self, x: Tensor, window: Tensor) -> Tensor:
        """Filter one token x (B, C), rolling the window (B, C, K) in place; returns y (B, C)."""
        return causal_conv1d_step(window, x, self.weight, self.bias, activation="silu")
