"""Short causal depthwise convolution with optional SiLU, over packed documents."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmtrain.kernels import backend
from ssmtrain.kernels.causal_conv1d import reference


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    doc_ids: Tensor | None = None,
    n_docs: int | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Convolve each channel with its own K taps, over the present and the K - 1 inputs before it (Gu & Dao
    2023).

    x (B, L, C), any strides; weight (C, K), tap K - 1 on the present input; bias (C,); activation "silu" or
    None. doc_ids (B, L) with n_docs: the window restarts at each document. States (n_docs, C, K) hold the
    last K inputs, oldest first, zeros where there were none; they and everything else are differentiable.
    Returns (y like x, final state in fp32 or None). ValueError on shapes that disagree.
    """
    batch, _, channels = x.shape
    docs = batch if doc_ids is None else n_docs
    if weight.shape[0] != channels or not 2 <= weight.shape[1] <= 4:
        raise ValueError(
            f"causal_conv1d: x {tuple(x.shape)} needs weight (C, 2..4), got {tuple(weight.shape)}"
        )
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation is 'silu' or None, not {activation!r}")
    if docs is None:
        raise ValueError("causal_conv1d: doc_ids needs n_docs")
    if initial_state is not None and initial_state.shape != (docs, *weight.shape):
        raise ValueError(
            f"causal_conv1d: initial_state {tuple(initial_state.shape)}, not {(docs, *weight.shape)}"
        )
    if docs == batch:
        doc_ids = None  # ids never span rows, so every row is one document
    if backend.chosen("causal_conv1d", x.device.type) == "triton":
        from ssmtrain.kernels.causal_conv1d.triton import causal_conv1d as run
    else:
        run = reference.causal_conv1d
    with torch.autocast(x.device.type, enabled=False):
        return run(
            x,
            weight,
            bias,
            activation=activation,
            doc_ids=doc_ids,
            n_docs=docs,
            initial_state=initial_state,
            return_final_state=return_final_state,
        )


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu"
) -> Tensor:
    """One token of `causal_conv1d`: x (B, C) joins the window state (B, C, K) in place; returns y (B, C)."""
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d_step: activation is 'silu' or None, not {activation!r}")
    if backend.chosen("causal_conv1d", x.device.type) == "triton":
        from ssmtrain.kernels.causal_conv1d.triton import causal_conv1d_step as run
    else:
        run = reference.causal_conv1d_step
    with torch.autocast(x.device.type, enabled=False):
        return run(state, x, weight, bias, activation=activation)
