"""Selective scan (S6), the recurrence of Mamba-1 (Gu & Dao 2023, sections 3.2 and 3.3).

For each channel e and state n, with step sizes dt = clamp(softplus(dt + dt_bias), dt_limit):

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,    y_t = (sum_n C_t h_t + D u_t) * silu(z_t)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmtrain.kernels.backend import chosen
from ssmtrain.kernels.digits import keep
from ssmtrain.kernels.selective_scan import reference

NO_LIMIT = (0.0, float("inf"))


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = NO_LIMIT,
    doc_ids: Tensor | None = None,
    n_docs: int | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scan rows u, dt, z (B, L, E) with A (E, N) negative, B, C (B, L, N), D, dt_bias (E,) -> y, final state.

    y is like u; states (n_docs, E, N) are fp32 (float64 for float64 u), one per document, and differentiable;
    the final state is None unless asked for. ValueError where shapes disagree or doc_ids do not number n_docs
    documents.
    """
    _check(u, dt, A, B, C, D, z, dt_bias, doc_ids, n_docs, initial_state)
    keep("selective_scan", A=A, D=D, dt_bias=dt_bias)
    if chosen("selective_scan", u.device.type) == "triton":
        from ssmtrain.kernels.selective_scan.triton import selective_scan as run
    else:
        run = reference.selective_scan
    with torch.autocast(u.device.type, enabled=False):
        return run(
            u,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            doc_ids=doc_ids,
            n_docs=n_docs,
            initial_state=initial_state,
            return_final_state=return_final_state,
        )


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = NO_LIMIT,
) -> Tensor:
    """Advance state (B, E, N) in place by one token: u, dt, z (B, E), B and C (B, N) -> y (B, E) like u."""
    if chosen("selective_scan", u.device.type) == "triton":
        from ssmtrain.kernels.selective_scan.triton import selective_scan_step as run
    else:
        run = reference.selective_scan_step
    return run(state, u, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit)


def _check(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    doc_ids: Tensor | None,
    n_docs: int | None,
    initial_state: Tensor | None,
) -> None:
    batch, length, channels = u.shape
    n = A.shape[-1]
    if (doc_ids is None and n_docs not in (None, batch)) or (doc_ids is not None and n_docs is None):
        raise ValueError(f"n_docs is {n_docs}: give it with doc_ids, and without them leave it out")
    expected = {
        "dt": (dt, (batch, length, channels)),
        "A": (A, (channels, n)),
        "B": (B, (batch, length, n)),
        "C": (C, (batch, length, n)),
        "D": (D, (channels,)),
        "z": (z, (batch, length, channels)),
        "dt_bias": (dt_bias, (channels,)),
        "doc_ids": (doc_ids, (batch, length)),
        "initial_state": (initial_state, (n_docs or batch, channels, n)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} with u {tuple(u.shape)}, not {tuple(tensor.shape)}")
