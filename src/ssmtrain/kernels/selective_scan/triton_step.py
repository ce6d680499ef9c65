"""One token of the selective scan: the state is read and written once, nothing else is of any size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmtrain.kernels.op import op
from ssmtrain.kernels.selective_scan import reference
from ssmtrain.kernels.selective_scan.triton_forward import power
from ssmtrain.kernels.ssd.triton_chunks import LOG2E, step_size


@triton.jit
def _one_token(
    state, u, dt, A, B, C, D, z, bias, y,
    s_u, s_dt, s_B, s_C, s_z, E, N, low, high,
    BE: tl.constexpr, BN: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Update BE channels of a row's state (B, E, N) in place and write their y (B, E)."""
    blocks = tl.cdiv(E, BE)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    e, n = tl.program_id(0) % blocks * BE + tl.arange(0, BE), tl.arange(0, BN)
    inside = (e < E)[:, None] & (n < N)[None, :]
    raw = tl.load(dt + b * s_dt + e, mask=e < E, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    step, _ = step_size(raw, low, high, SOFTPLUS)
    x = tl.load(u + b * s_u + e, mask=e < E, other=0.0).to(tl.float32)
    keys = tl.load(B + b * s_B + n, mask=n < N, other=0.0).to(tl.float32)
    reads = tl.load(C + b * s_C + n, mask=n < N, other=0.0).to(tl.float32)
    rates = tl.load(A + e[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    at = state + (b * E + e)[:, None] * N + n[None, :]
    decay = power(rates * (step[:, None] * LOG2E), True)
    new = tl.load(at, mask=inside, other=0.0).to(tl.float32) * decay + (step * x)[:, None] * keys[None, :]
    tl.store(at, new.to(state.dtype.element_ty), mask=inside)
    out = tl.sum(new * reads[None, :], 1)
    if D is not None:
        out += tl.load(D + e, mask=e < E, other=0.0).to(tl.float32) * x
    if z is not None:
        gate = tl.load(z + b * s_z + e, mask=e < E, other=0.0).to(tl.float32)
        out *= gate / (1.0 + tl.exp2(gate * -LOG2E))
    tl.store(y + b * E + e, out.to(y.dtype.element_ty), mask=e < E)


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> Tensor:
    """Compute `kernels.selective_scan_step` (same arguments); float64 by the reference."""
    if torch.float64 in (u.dtype, state.dtype) or not state.is_contiguous():
        return reference.selective_scan_step(
            state, u, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit
        )
    return _step(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, *dt_limit)


@op(
    "selective_scan_step",
    mutates_args=("state",),
    schema="(Tensor(a!) state, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
    " Tensor? dt_bias, bool softplus, float low, float high) -> Tensor",
)
def _step(state, u, dt, A, B, C, D, z, dt_bias, softplus, low, high):
    batch, channels, N = state.shape
    u, dt, B, C, z = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (u, dt, B, C, z))
    A, D, dt_bias = (None if t is None else t.contiguous() for t in (A, D, dt_bias))
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    BN = triton.next_power_of_2(N)
    BE = max(1, 2048 // BN)
    _one_token[(batch * triton.cdiv(channels, BE),)](
        *(state, u, dt, A, B, C, D, z, dt_bias, y),
        *(t.stride(0) for t in (u, dt, B, C)),
        *(0 if z is None else z.stride(0), channels, N, low, high),
        BE=BE,
        BN=BN,
        SOFTPLUS=softplus,
    )
    return y


@_step.register_fake
def _(state, u, *rest):
    """Shape of `_step`'s y."""
    return u.new_empty(u.shape)
