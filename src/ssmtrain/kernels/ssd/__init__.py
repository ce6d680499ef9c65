"""State space duality: the scan of Mamba-2, computed in chunks."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ssmtrain.kernels import backend
from ssmtrain.kernels.digits import keep
from ssmtrain.kernels.ssd import reference


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float | None] = (0.0, inf),
    chunk_size: int | None = None,
    doc_ids: Tensor | None = None,
    n_docs: int | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scan h = exp(dt A) h + dt B x, y = C h + D x, optionally times silu(z) (Dao & Gu 2024, sec. 6,
    listing 1).

    x, z (B, L, H, P); dt (B, L, H), to which dt_bias (H,) is added, then softplus, then the limits; A (H,)
    negative; B, C (B, L, G, N), each group shared by H / G neighbouring heads; D (H,) or (H, P). doc_ids
    (B, L) with n_docs: the state restarts at each document. States (n_docs, H, P, N) are fp32 (float64 for
    float64 x). chunk_size changes speed only; None lets the implementation choose. Returns (y like x, final
    state or None); differentiable in all tensors, states included. ValueError on shapes that disagree.
    """
    _check(x, dt, A, B, C, D, z, chunk_size)
    keep("ssd", A=A, D=D, dt_bias=dt_bias)
    batch = x.shape[0]
    docs = batch if doc_ids is None else n_docs
    if docs is None:
        raise ValueError("ssd: doc_ids needs n_docs")
    state_shape = (docs, *x.shape[2:], B.shape[-1])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"ssd: initial_state {tuple(initial_state.shape)}, not {state_shape}")
    if docs == batch:
        doc_ids = None  # ids never span rows, so every row is one document
    if backend.chosen("ssd", x.device.type) == "triton":
        from ssmtrain.kernels.ssd.triton import ssd as run
    else:
        run = reference.ssd
    with torch.autocast(x.device.type, enabled=False):
        return run(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            chunk_size=chunk_size,
            doc_ids=doc_ids,
            n_docs=docs,
            initial_state=initial_state,
            return_final_state=return_final_state,
        )


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float | None] = (0.0, inf),
) -> Tensor:
    """One token of `ssd`: updates state (B, H, P, N) in place and returns y like x.

    x, z (B, H, P); dt (B, H); B, C (B, G, N); the rest as in `ssd`.
    """
    if backend.chosen("ssd", x.device.type) == "triton":
        from ssmtrain.kernels.ssd.triton import ssd_step as run
    else:
        run = reference.ssd_step
    with torch.autocast(x.device.type, enabled=False):
        return run(
            state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit
        )


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    chunk_size: int | None,
) -> None:
    """Raise ValueError, naming the argument, when shapes disagree."""
    batch, length, heads, head_dim = x.shape
    if dt.shape != (batch, length, heads) or A.shape != (heads,):
        raise ValueError(f"ssd: x {tuple(x.shape)} with dt {tuple(dt.shape)} and A {tuple(A.shape)}")
    if B.shape != C.shape or B.shape[:2] != (batch, length) or heads % B.shape[2]:
        raise ValueError(f"ssd: x {tuple(x.shape)} with B {tuple(B.shape)} and C {tuple(C.shape)}")
    if D is not None and D.shape not in ((heads,), (heads, head_dim)):
        raise ValueError(f"ssd: D is (H,) or (H, P), not {tuple(D.shape)}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"ssd: z {tuple(z.shape)} is not like x {tuple(x.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"ssd: chunk_size must be at least 1, not {chunk_size}")
