"""The selective scan one token at a time in float64: the oracle of its kernels, sharing no code with them."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_oracle(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    doc_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run h = exp(dt A) h + dt B u, y = (C h + D u) * silu(z) token by token; returns y and final states."""
    batch, length, channels = u.shape
    if doc_ids is None:
        doc_ids = torch.arange(batch)[:, None].expand(batch, length)
    n_docs = int(doc_ids.max()) + 1
    if initial_state is None:
        initial_state = u.new_zeros(n_docs, channels, A.shape[1])
    finals: list[Tensor | None] = [None] * n_docs
    outputs = []
    h = u.new_zeros(batch, channels, A.shape[1])
    tokens = zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True)
    for t, (u_t, dt_t, B_t, C_t) in enumerate(tokens):
        if dt_bias is not None:
            dt_t = dt_t + dt_bias
        if dt_softplus:
            dt_t = torch.logaddexp(dt_t, torch.zeros_like(dt_t))
        dt_t = dt_t.clamp(*dt_limit)
        if t == 0 or bool((doc_ids[:, t] != doc_ids[:, t - 1]).any()):
            new = torch.ones(batch, 1, 1, dtype=torch.bool)
            if t:
                new = (doc_ids[:, t] != doc_ids[:, t - 1])[:, None, None]
            h = torch.where(new, initial_state[doc_ids[:, t].long()], h)
        h = torch.exp(dt_t[:, :, None] * A) * h + (dt_t * u_t)[:, :, None] * B_t[:, None, :]
        for row in range(batch):
            if t == length - 1 or doc_ids[row, t] != doc_ids[row, t + 1]:
                finals[int(doc_ids[row, t])] = h[row]
        outputs.append((h * C_t[:, None, :]).sum(-1))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * z / (1 + torch.exp(-z))
    return y, torch.stack([final for final in finals if final is not None])


TENSORS = ("u", "dt", "A", "B", "C")
OPTIONAL = ("D", "z", "dt_bias", "initial_state")


def make_inputs(
    length: int,
    n_docs: int,
    optional: tuple[str, ...] = OPTIONAL,
    *,
    batch: int = 2,
    width: int = 3,
    n: int = 4,
) -> dict[str, Tensor]:
    """Random float64 inputs of moderate size; step sizes between about 0.1 and 2."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "u": normal(batch, length, width),
        "dt": normal(batch, length, width) - 1,
        "A": -normal(width, n).exp() * 0.3,
        "B": normal(batch, length, n),
        "C": normal(batch, length, n),
        "D": normal(width),
        "z": normal(batch, length, width),
        "dt_bias": normal(width),
        "initial_state": normal(n_docs, width, n),
    }
    return {name: inputs[name] for name in (*TENSORS, *optional)}
