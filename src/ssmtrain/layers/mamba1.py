"""Mamba (Gu & Dao 2023): a selective scan behind a short convolution, gated; Jamba's inner norms optional."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssmtrain.kernels.digits import keep
from ssmtrain.kernels.parts import parts
from ssmtrain.kernels.selective_scan import selective_scan, selective_scan_step
from ssmtrain.layers.base import Context, Mixer, MixerConfig, ParamSpec, State, StateBytes
from ssmtrain.layers.conv import CausalConv1d
from ssmtrain.layers.forget import forget
from ssmtrain.layers.init import constant, dt_bias, log_arange, uniform
from ssmtrain.layers.linear import Linear
from ssmtrain.layers.norm import RMSNorm

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Mamba1Config(MixerConfig):
    """Mamba's selective state space layer (S6)."""

    kind: Literal["mamba1"] = "mamba1"
    d_state: Positive = 16
    """State size N of each channel."""
    d_conv: Annotated[int, Field(ge=2, le=4)] = 4
    """Width of the causal convolution, 2 to 4."""
    expand: Positive = 2
    """Inner width as a multiple of d_model."""
    dt_rank: Positive | None = None
    """Rank of the projection that makes the step sizes; absent: d_model / 16, rounded up."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""
    bias: bool = False
    """Whether the in and out projections have biases."""
    inner_norm: bool = False
    """RMSNorm on dt, B and C, as Jamba has it."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the inner norms."""
    dt_min: PositiveFloat = 1e-3
    """Smallest step size at initialisation."""
    dt_max: PositiveFloat = 0.1
    """Largest step size at initialisation."""
    dt_floor: PositiveFloat = 1e-4
    """Step sizes are clamped to at least this at initialisation."""

    def rank(self, d_model: int) -> int:
        """Rank R of the step-size projection."""
        return self.dt_rank or math.ceil(d_model / 16)

    def build(self, d_model: int) -> Mamba1:
        """Make the module; parameters are left unwritten."""
        return Mamba1(self, d_model)

    def check(self, d_model: int) -> Iterable[tuple[str, str]]:
        """Yield (field, what is wrong)."""
        if self.dt_min > self.dt_max:
            yield "dt_min", f"must not exceed dt_max ({self.dt_max})"
        if not self.inner_norm and self.norm_eps != type(self).model_fields["norm_eps"].default:
            yield "norm_eps", "has no effect without inner norms: set inner_norm to true or leave it out"

    def num_params(self, d_model: int) -> int:
        """Parameters of the module."""
        E, R, N = self.expand * d_model, self.rank(d_model), self.d_state
        projections = d_model * 2 * E + E * (R + 2 * N) + R * E + E * d_model
        conv = E * (self.d_conv + self.conv_bias)
        scan = E + E * N + E  # dt_bias, A_log, D
        return projections + conv + scan + self.bias * (2 * E + d_model) + self.inner_norm * (R + 2 * N)

    def flops(self, d_model: int, seq_len: int) -> int:
        """Forward FLOPs per token; the scan is 7N + 8 per channel (an exponential counts 1)."""
        E, R, N = self.expand * d_model, self.rank(d_model), self.d_state
        projections = 2 * (d_model * 2 * E + E * (R + 2 * N) + R * E + E * d_model)
        return projections + 2 * self.d_conv * E + E * (7 * N + 8)

    def state_bytes(self, d_model: int, sessions: int, context: int) -> StateBytes:
        """Bytes of window (bf16) and state (fp32), whatever the context."""
        E = self.expand * d_model
        return StateBytes(conv=sessions * E * self.d_conv * 2, ssm=sessions * E * self.d_state * 4)


class Mamba1(Mixer):
    """x, z = in(u); x = silu(conv(x)); dt, B, C = x_proj(x); y = scan(x) * silu(z); out(y)."""

    dt_bias: Tensor
    A_log: Tensor
    D: Tensor

    def __init__(self, config: Mamba1Config, d_model: int) -> None:
        super().__init__()
        E, R, N = config.expand * d_model, config.rank(d_model), config.d_state
        self.config = config
        self.inner, self.rank, self.d_state = E, R, N
        self.in_proj = Linear(d_model, 2 * E, bias=config.bias)
        self.conv = CausalConv1d(E, config.d_conv, bias=config.conv_bias)
        self.x_proj = Linear(E, R + 2 * N)
        self.inner_norm = config.inner_norm
        if config.inner_norm:
            self.dt_norm = RMSNorm(R, config.norm_eps)
            self.B_norm = RMSNorm(N, config.norm_eps)
            self.C_norm = RMSNorm(N, config.norm_eps)
        self.dt_proj = Linear(R, E, init=uniform(-(R**-0.5), R**-0.5))
        # The bias of dt_proj lives here: the scan adds it in fp32, before the softplus.
        dt_init = dt_bias(config.dt_min, config.dt_max, config.dt_floor)
        self.declare("dt_bias", (E,), ParamSpec(dt_init, decay=False, fp32=True))
        self.declare("A_log", (E, N), ParamSpec(log_arange, decay=False, fp32=True))
        self.declare("D", (E,), ParamSpec(constant(1.0), decay=False, fp32=True))
        self.out_proj = Linear(E, d_model, bias=config.bias, residual=True)

    @property
    def entrance(self) -> Linear:
        """The projection."""
        return self.in_proj

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (..., E), for the scan, and what depends on it: dt (..., E), B and C (..., N)."""
        x, selected = self.x_proj.beside(x)
        dt, B, C = selected.split([self.rank, self.d_state, self.d_state], dim=-1)
        if self.inner_norm:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        return x, forget(self.dt_proj(dt), self.dt_proj.forward, dt), B, C

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """Mix x (B, L, D) within each document; returns y (B, L, D) and, when carrying, the final state."""
        keep("mamba1", A_log=self.A_log)  # autocast widens what exp returns
        u, z = parts(self.in_proj(x), [(self.inner,), (self.inner,)])  # (B, L, E) each
        u, window = self.conv(u, ctx, state["conv"] if state else None)
        u, dt, B, C = self.select(u)  # (B, L, E) twice, (B, L, N) twice
        y, ssm = selective_scan(
            u,
            dt,
            -torch.exp(self.A_log),
            B,
            C,
            D=self.D,
            z=z,
            dt_bias=self.dt_bias,
            doc_ids=ctx.doc_ids,
            n_docs=ctx.n_docs,
            initial_state=state["ssm"] if state else None,
            return_final_state=ctx.carry,
        )  # (B, L, E)
        return self.out_proj(y), {"conv": window, "ssm": ssm} if ctx.carry else None

    def step_sizes(self, x: Tensor, ctx: Context) -> Tensor:
        """The step sizes (B, L, E) that the scan takes on x (B, L, D), fp32."""
        u, _ = self.conv(self.in_proj(x).chunk(2, dim=-1)[0], ctx, None)  # (B, L, E)
        return F.softplus(self.select(u)[1].float() + self.dt_bias)

    def init_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> State:
        """An empty window (batch, E, K) in `dtype` and state (batch, E, N) in at least fp32."""
        ssm_dtype = torch.promote_types(dtype, torch.float32)
        return {
            "conv": self.conv.init_window(batch, dtype, device),
            "ssm": torch.zeros(batch, self.inner, self.d_state, dtype=ssm_dtype, device=device),
        }

    def step(self, x: Tensor, ctx: Context, state: State) -> Tensor:
        """Mix one token x (B, 1, D), updating the state in place; returns y (B, 1, D)."""
        u, z = self.in_proj(x[:, 0]).chunk(2, dim=-1)  # (B, E) each
        u = self.conv.step(u, state["conv"])
        u, dt, B, C = self.select(u)
        A = -torch.exp(self.A_log)
        y = selective_scan_step(state["ssm"], u, dt, A, B, C, D=self.D, z=z, dt_bias=self.dt_bias)  # (B, E)
        return self.out_proj(y)[:, None]
