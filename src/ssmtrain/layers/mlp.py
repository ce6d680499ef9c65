"""The dense feed-forward layer: SwiGLU (Shazeer 2020), GELU, or squared ReLU (So et al. 2021)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssmtrain.layers.base import Context, Ffn, FfnConfig, Stats
from ssmtrain.layers.forget import forget
from ssmtrain.layers.linear import Linear

Positive = Annotated[int, Field(gt=0)]
Activation = Literal["swiglu", "gelu", "relu2"]


def widths(activation: Activation) -> int:
    """How many times the hidden width the in-projection makes: 2 for swiglu (gate, then value), else 1."""
    return 2 if activation == "swiglu" else 1


def activate(h: Tensor, activation: Activation) -> Tensor:
    """Hidden activations (..., F) of the in-projection's output h (..., widths * F)."""
    if activation == "swiglu":
        gate, value = h.chunk(2, dim=-1)
        return forget(F.silu(gate), F.silu, gate) * value
    return F.gelu(h) if activation == "gelu" else F.relu(h).square()


class MlpConfig(FfnConfig):
    """Dense feed-forward layer."""

    kind: Literal["mlp"] = "mlp"
    hidden: Positive
    """Hidden width."""
    activation: Activation = "swiglu"
    """swiglu (gated SiLU, three matrices), gelu or relu2 (squared ReLU), two matrices each."""
    bias: bool = False
    """Whether the projections have biases."""

    def build(self, d_model: int) -> Mlp:
        """Make the module; parameters are left unwritten."""
        return Mlp(self, d_model)

    def num_params(self, d_model: int) -> int:
        """Parameters of the module."""
        inner = widths(self.activation) * self.hidden
        return d_model * (inner + self.hidden) + self.bias * (inner + d_model)

    def flops(self, d_model: int, seq_len: int) -> int:
        """Forward FLOPs per token of the projections: 6 d f for swiglu, 4 d f otherwise."""
        return 2 * d_model * (widths(self.activation) + 1) * self.hidden


class Mlp(Ffn):
    """out(activation(in(x)))."""

    def __init__(self, config: MlpConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.in_proj = Linear(d_model, widths(config.activation) * config.hidden, bias=config.bias)
        self.out_proj = Linear(config.hidden, d_model, bias=config.bias, residual=True)

    @property
    def entrance(self) -> Linear:
        """The projection."""
        return self.in_proj

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Stats]:
        """Mix x (B, L, D) over channels; returns y (B, L, D) and no statistics."""
        h = self.in_proj(x)  # (B, L, 2F) or (B, L, F)
        return self.out_proj(activate(h, self.config.activation)), {}
