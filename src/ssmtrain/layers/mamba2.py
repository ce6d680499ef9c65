"""Mamba-2 (Dao & Gu 2024): state space duality, one decay per head, gated RMSNorm before the output."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssmtrain.kernels.digits import keep
from ssmtrain.kernels.gated_norm import fuses, gated_norm, projected_norm
from ssmtrain.kernels.parts import parts
from ssmtrain.kernels.ssd import ssd, ssd_step
from ssmtrain.layers.base import Context, Layer, Mixer, MixerConfig, ParamSpec, State, StateBytes
from ssmtrain.layers.conv import CausalConv1d
from ssmtrain.layers.forget import forget, forgets
from ssmtrain.layers.init import constant, dt_bias, log_uniform
from ssmtrain.layers.linear import Linear, mixes

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Limit = tuple[Annotated[float, Field(ge=0.0)], PositiveFloat | None]

FLOPS_CHUNK = 256
"""Chunk length at which the SSD's FLOPs are counted, so that a kernel's own choice cannot move the figure."""


class Mamba2Config(MixerConfig):
    """Mamba-2's state space layer (SSD)."""

    kind: Literal["mamba2"] = "mamba2"
    d_state: Positive = 128
    """State size N of each channel."""
    head_dim: Positive = 64
    """Channels P of a head; a head has one decay and one step size."""
    expand: Positive = 2
    """Inner width as a multiple of d_model, when n_heads is absent."""
    n_heads: Positive | None = None
    """Heads; the inner width is then n_heads * head_dim. Absent: expand * d_model / head_dim."""
    n_groups: Positive = 1
    """Groups of heads that share B and C, and the groups of the gated norm."""
    d_conv: Annotated[int, Field(ge=2, le=4)] = 4
    """Width of the causal convolution over x, B and C, 2 to 4."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""
    bias: bool = False
    """Whether the in and out projections have biases."""
    chunk_size: Positive | None = None
    """Tokens per chunk of the scan; absent: the kernel's choice. Changes speed, not results."""
    norm_before_gate: bool = False
    """Normalise first and gate afterwards; otherwise the gated output is normalised."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the gated norm."""
    dt_limit: Annotated[Limit, Field(strict=False)] = (0.0, None)
    """Step sizes are clamped to this range after the softplus; null: no upper limit."""
    A_range: Annotated[tuple[PositiveFloat, PositiveFloat], Field(strict=False)] = (1.0, 16.0)
    """Range of the uniform draw of -A at initialisation."""
    dt_min: PositiveFloat = 1e-3
    """Smallest step size at initialisation."""
    dt_max: PositiveFloat = 0.1
    """Largest step size at initialisation."""
    dt_floor: PositiveFloat = 1e-4
    """Step sizes are clamped to at least this at initialisation."""

    def heads(self, d_model: int) -> int:
        """Number of heads H."""
        return self.n_heads or self.expand * d_model // self.head_dim

    def conv_width(self, d_model: int) -> int:
        """Channels of the convolution: x, B and C."""
        return self.heads(d_model) * self.head_dim + 2 * self.n_groups * self.d_state

    def build(self, d_model: int) -> Mamba2:
        """Make the module; parameters are left unwritten."""
        return Mamba2(self, d_model)

    def check(self, d_model: int) -> Iterable[tuple[str, str]]:
        """Yield (field, what is wrong and what would be right)."""
        width = self.expand * d_model
        if self.n_heads is None and width % self.head_dim:
            yield "head_dim", f"must divide the inner width expand * d_model = {width}, or set n_heads"
            return
        if self.n_heads is not None and self.expand != 2 and self.n_heads * self.head_dim != width:
            yield (
                "expand",
                f"n_heads * head_dim = {self.n_heads * self.head_dim} decides the inner width: leave it out",
            )
        if self.heads(d_model) % self.n_groups:
            yield "n_groups", f"must divide the number of heads, {self.heads(d_model)}"
        if self.dt_min > self.dt_max:
            yield "dt_min", f"must not exceed dt_max ({self.dt_max})"
        if self.dt_limit[1] is not None and self.dt_limit[0] >= self.dt_limit[1]:
            yield "dt_limit", "must be [low, high] with low < high, or high null"
        if self.A_range[0] > self.A_range[1]:
            yield "A_range", "must be [low, high] with low <= high"

    def num_params(self, d_model: int) -> int:
        """Parameters of the module."""
        H, conv = self.heads(d_model), self.conv_width(d_model)
        E = H * self.head_dim
        projections = d_model * (E + conv + H) + E * d_model + self.bias * (E + conv + H + d_model)
        return projections + conv * (self.d_conv + self.conv_bias) + 3 * H + E  # dt_bias, A_log, D; norm

    def flops(self, d_model: int, seq_len: int) -> int:
        """Forward FLOPs per token: projections, convolution and the causal half of a chunked SSD."""
        H, P, N, G = self.heads(d_model), self.head_dim, self.d_state, self.n_groups
        E, conv = H * P, self.conv_width(d_model)
        projections = 2 * d_model * (E + conv + H) + 2 * E * d_model
        scan = FLOPS_CHUNK * (G * N + H * P) + 4 * H * P * N
        return projections + 2 * self.d_conv * conv + scan

    def state_bytes(self, d_model: int, sessions: int, context: int) -> StateBytes:
        """Bytes of window (bf16) and state (fp32), whatever the context."""
        state = self.heads(d_model) * self.head_dim * self.d_state
        return StateBytes(
            conv=sessions * self.conv_width(d_model) * self.d_conv * 2, ssm=sessions * state * 4
        )


class GatedNorm(Layer):
    """RMSNorm of the gated output (or gate of the normalised one), in groups, with an fp32 weight."""

    weight: Tensor

    def __init__(self, width: int, n_groups: int, eps: float, norm_before_gate: bool) -> None:
        super().__init__()
        self.n_groups, self.eps, self.norm_before_gate = n_groups, eps, norm_before_gate
        self.declare("weight", (width,), ParamSpec(constant(1.0), decay=False, fp32=True))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Norm of x (..., E) gated by silu(z)."""
        keep("norm", weight=self.weight)

        def normed(x: Tensor, z: Tensor) -> Tensor:
            groups, order = self.n_groups, self.norm_before_gate
            return gated_norm(x, z, self.weight, eps=self.eps, n_groups=groups, norm_before_gate=order)

        return forget(normed(x, z), normed, x, z)

    def then(self, linear: Linear, x: Tensor, z: Tensor) -> Tensor:
        """linear(self(x, z)); what would be forgotten between is then made again at less cost."""
        low = torch.get_autocast_dtype(x.device.type)
        if not (forgets(x) and mixes(x, linear.weight) and x.dtype == z.dtype == low and fuses(x)):
            return linear(self(x, z))
        keep("norm", weight=self.weight)
        groups, order = self.n_groups, self.norm_before_gate
        return projected_norm(
            *(x, z, self.weight, linear.weight, linear.bias),
            eps=self.eps,
            n_groups=groups,
            norm_before_gate=order,
        )


class Mamba2(Mixer):
    """z, x, B, C, dt = in(u); x, B, C = silu(conv(.)); y = ssd(x, dt, A, B, C); out(norm(y * silu(z)))."""

    dt_bias: Tensor
    A_log: Tensor
    D: Tensor

    def __init__(self, config: Mamba2Config, d_model: int) -> None:
        super().__init__()
        H, conv = config.heads(d_model), config.conv_width(d_model)
        E = H * config.head_dim
        self.config = config
        self.n_heads, self.sizes = H, [(E,), (conv,), (H,)]
        BC = (config.n_groups, config.d_state)
        self.shapes = [(H, config.head_dim), BC, BC]
        low, high = config.dt_limit
        self.dt_limit = (low, math.inf if high is None else high)
        self.in_proj = Linear(d_model, E + conv + H, bias=config.bias)
        self.conv = CausalConv1d(conv, config.d_conv, bias=config.conv_bias)
        dt_init = dt_bias(config.dt_min, config.dt_max, config.dt_floor)
        self.declare("dt_bias", (H,), ParamSpec(dt_init, decay=False, fp32=True))
        self.declare("A_log", (H,), ParamSpec(log_uniform(*config.A_range), decay=False, fp32=True))
        self.declare("D", (H,), ParamSpec(constant(1.0), decay=False, fp32=True))
        self.norm = GatedNorm(E, config.n_groups, config.norm_eps, config.norm_before_gate)
        self.out_proj = Linear(E, d_model, bias=config.bias, residual=True)

    @property
    def entrance(self) -> Linear:
        """The projection."""
        return self.in_proj

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """Mix x (B, L, D) within each document; returns y (B, L, D) and, when carrying, the final state."""
        keep("mamba2", A_log=self.A_log)  # autocast widens what exp returns
        z, xBC, dt = parts(self.in_proj(x), self.sizes)  # (B, L, E), (B, L, E + 2GN), (B, L, H)
        xBC, window = self.conv(xBC, ctx, state["conv"] if state else None)
        x, B, C = parts(xBC, self.shapes)  # (B, L, H, P), (B, L, G, N), (B, L, G, N)
        y, ssm = ssd(
            x,
            dt,
            -torch.exp(self.A_log),
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_limit=self.dt_limit,
            chunk_size=self.config.chunk_size,
            doc_ids=ctx.doc_ids,
            n_docs=ctx.n_docs,
            initial_state=state["ssm"] if state else None,
            return_final_state=ctx.carry,
        )  # (B, L, H, P)
        y = self.norm.then(self.out_proj, y.flatten(-2), z)  # (B, L, D)
        return y, {"conv": window, "ssm": ssm} if ctx.carry else None

    def step_sizes(self, x: Tensor, ctx: Context) -> Tensor:
        """The step sizes (B, L, H) that the scan takes on x (B, L, D), fp32."""
        dt = self.in_proj(x)[..., -self.n_heads :]
        return F.softplus(dt.float() + self.dt_bias).clamp(*self.dt_limit)

    def init_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> State:
        """An empty window (batch, E + 2GN, K) in `dtype` and state (batch, H, P, N) in at least fp32."""
        shape = (batch, self.n_heads, self.config.head_dim, self.config.d_state)
        return {
            "conv": self.conv.init_window(batch, dtype, device),
            "ssm": torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device),
        }

    def step(self, x: Tensor, ctx: Context, state: State) -> Tensor:
        """Mix one token x (B, 1, D), updating the state in place; returns y (B, 1, D)."""
        z, xBC, dt = parts(self.in_proj(x[:, 0]), self.sizes)  # (B, E), (B, E + 2GN), (B, H)
        x, B, C = parts(self.conv.step(xBC, state["conv"]), self.shapes)  # (B, H, P), (B, G, N), (B, G, N)
        y = ssd_step(
            state["ssm"],
            x,
            dt,
            -torch.exp(self.A_log),
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_limit=self.dt_limit,
        )  # (B, H, P)
        return self.out_proj(self.norm(y.flatten(-2), z))[:, None]
