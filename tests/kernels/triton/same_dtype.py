"""SSD from torch ops whose matrix products take operands of the input dtype, the measure of a kernel's error.

`reference.ssd` multiplies in fp32 whatever it is given, which no kernel on bf16 matrix units can match. Here
each operand of each product, both ways, is rounded to the dtype of x first: x, B, C, the decays times
C B^T, the state as it is read, and the gradients of all these. So is C B^T, as torch's products of 16 bits
are. Products are added up in fp32; step sizes, their sums, exponentials and the state between chunks are
fp32. Every document runs alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import spans
from ssmtrain.kernels.ssd.reference import step_sizes

CHUNK = 128


class _Product(torch.autograd.Function):
    """a @ b of rounded operands; so are its gradients'."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        a, b = a.to(dtype), b.to(dtype)
        ctx.save_for_backward(a, b)
        return a.float() @ b.float()

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, b = ctx.saved_tensors
        grad = grad.to(a.dtype).float()
        return grad @ b.float().mT, a.float().mT @ grad, None


def ssd(
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
    chunk_size: int | None,
    doc_ids: Tensor | None,
    n_docs: int,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute `kernels.ssd` (same arguments); a 1-D D, no z."""
    assert z is None and (D is None or D.dim() == 1)
    steps = step_sizes(dt.float(), dt_bias, dt_softplus, dt_limit)  # (B, L, H)
    if initial_state is None:
        initial_state = A.new_zeros(n_docs, *x.shape[2:], B.shape[3], dtype=torch.float32)
    if doc_ids is None:
        y, final = _scan(x, steps, A.float(), B, C, initial_state)
    else:
        rows: list[list[Tensor]] = [[] for _ in range(x.shape[0])]
        states = []
        for document, (row, start, end) in enumerate(spans(doc_ids.cpu())):
            here = slice(row, row + 1), slice(start, end)
            part, state = _scan(
                x[here], steps[here], A.float(), B[here], C[here], initial_state[document : document + 1]
            )
            rows[row].append(part)
            states.append(state)
        y, final = torch.cat([torch.cat(parts, 1) for parts in rows]), torch.cat(states)
    if D is not None:
        y = y + D.float()[:, None] * x.float()
    return y.to(x.dtype), final if return_final_state else None


def _scan(x: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P), fp32, and the final states (B, H, P, N) of documents of one length."""
    batch, length, heads, head_dim = x.shape
    groups, n = B.shape[2:]
    q = min(CHUNK, length)
    count, dtype = -(-length // q), x.dtype
    pad = count * q - length

    def cut(t: Tensor) -> Tensor:
        """(B, L, ...) as (B, chunks, Q, G, ...), zeros past the end."""
        t = F.pad(t.float(), (*[0, 0] * (t.dim() - 2), 0, pad)).unflatten(1, (count, q))
        return t if t.shape[3] == groups else t.unflatten(3, (groups, -1))

    u = (cut(x) if heads > groups else cut(x).unsqueeze(4)).permute(0, 1, 3, 4, 2, 5)  # (B, c, G, h, Q, P)
    step = (cut(steps) if heads > groups else cut(steps).unsqueeze(4)).permute(0, 1, 3, 4, 2)
    keys, queries = (cut(t).permute(0, 1, 3, 2, 4) for t in (B, C))  # (B, c, G, Q, N)
    logs = (step * A.view(groups, -1, 1)).cumsum(-1)  # (B, c, G, h, Q)
    past = torch.ones(q, q, dtype=torch.bool, device=x.device).tril_()
    decay = (logs.unsqueeze(-1) - logs.unsqueeze(-2)).masked_fill(~past, -torch.inf).exp()
    gram = _Product.apply(queries, keys.mT, dtype).to(dtype).float().unsqueeze(3)  # (B, c, G, 1, Q, Q)
    y = _Product.apply(gram * decay * step.unsqueeze(-2), u, dtype)
    weight = (step * (logs[..., -1:] - logs).exp()).unsqueeze(-1)
    fed = (u * weight).mT.flatten(3, 4)  # (B, c, G, h * P, Q)
    fed = _Product.apply(fed, keys, dtype)  # (B, c, G, h * P, N)
    through = logs[..., -1:].exp().expand(-1, -1, -1, -1, head_dim).flatten(3, 4).unsqueeze(-1)
    state = state.float().reshape(batch, groups, -1, n)
    entering = []
    for chunk in range(count):
        entering.append(state)
        state = through[:, chunk] * state + fed[:, chunk]
    seen = _Product.apply(queries, torch.stack(entering, 1).mT, dtype)  # (B, c, G, Q, h * P)
    seen = seen.unflatten(4, (-1, head_dim)).permute(0, 1, 2, 4, 3, 5)  # (B, c, G, h, Q, P)
    y = y + seen * logs.exp().unsqueeze(-1)
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, count * q, heads, head_dim)[:, :length]
    return y, state.reshape(batch, heads, head_dim, n)
