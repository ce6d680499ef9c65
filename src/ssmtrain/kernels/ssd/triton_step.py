"""One token of the scan: the state is read and written once, nothing else is of any size."""

from __future__ import annotations

from math import inf

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ssmtrain.kernels.op import op
from ssmtrain.kernels.ssd import reference
from ssmtrain.kernels.ssd.triton_chunks import LOG2E, step_size


@triton.jit
def _one_token(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    bias,
    y,
    s_x,
    s_dt,
    s_B,
    s_C,
    H,
    per_group,
    P,
    N,
    low,
    high,
    BP: tl.constexpr,
    BN: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Update BP channels of one head's state (B, H, P, N) in place and write their y (B, H, P)."""
    b = tl.program_id(0).to(tl.int64) // H
    h = tl.program_id(0) % H
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    raw = tl.load(dt + b * s_dt + h).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + h).to(tl.float32)
    step, _ = step_size(raw, low, high, SOFTPLUS)
    decay = tl.exp2(step * tl.load(A + h).to(tl.float32) * LOG2E)
    u = tl.load(x + b * s_x + h * P + p, mask=p < P, other=0.0).to(tl.float32)
    k = tl.load(B + b * s_B + (h // per_group) * N + n, mask=n < N, other=0.0).to(tl.float32)
    r = tl.load(C + b * s_C + (h // per_group) * N + n, mask=n < N, other=0.0).to(tl.float32)
    at = state + (b * H + h) * P * N + p[:, None] * N + n[None, :]
    inside = (p < P)[:, None] & (n < N)[None, :]
    new = tl.load(at, mask=inside, other=0.0).to(tl.float32) * decay + (step * u)[:, None] * k[None, :]
    tl.store(at, new.to(state.dtype.element_ty), mask=inside)
    out = tl.sum(new * r[None, :], 1)
    if HAS_D:
        out += tl.load(D + h).to(tl.float32) * u
    tl.store(y + (b * H + h) * P + p, out.to(y.dtype.element_ty), mask=p < P)


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float | None],
) -> Tensor:
    """Compute `kernels.ssd_step` (same arguments)."""
    if torch.float64 in (x.dtype, state.dtype) or not state.is_contiguous():
        return reference.ssd_step(
            state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit
        )
    inner_d = D if D is not None and D.dim() == 1 else None
    high = inf if dt_limit[1] is None else dt_limit[1]
    y = _step(state, x, dt, A, B, C, inner_d, dt_bias, dt_softplus, dt_limit[0], high)
    return skip_and_gate(y, x, None if inner_d is not None else D, z)


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """Add D x to y (.., H, P) for a D (H, P), which the kernels do not take, and gate by silu(z)."""
    if D is not None:
        y = (y + x * D.float()).to(x.dtype)
    if z is not None:
        y = (y * F.silu(z.float())).to(x.dtype)
    return y


@op(
    "ssd_step",
    mutates_args=("state",),
    schema="(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias,"
    " bool softplus, float low, float high) -> Tensor",
)
def _step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    batch, heads, head_dim, n = state.shape
    x, dt, B, C = (t if t[0].is_contiguous() else t.contiguous() for t in (x, dt, B, C))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    BN = triton.next_power_of_2(n)
    BP = min(triton.next_power_of_2(head_dim), max(1, 2048 // BN))
    _one_token[(batch * heads, triton.cdiv(head_dim, BP))](
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias,
        y,
        x.stride(0),
        dt.stride(0),
        B.stride(0),
        C.stride(0),
        heads,
        heads // B.shape[1],
        head_dim,
        n,
        low,
        high,
        BP=BP,
        BN=BN,
        HAS_D=D is not None,
        HAS_BIAS=dt_bias is not None,
        SOFTPLUS=softplus,
    )
    return y


@_step.register_fake
def _(state, x, dt, A, B, C, D, dt_bias, softplus, low, high):
    """Shape of y."""
    return x.new_empty(x.shape)
