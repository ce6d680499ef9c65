"""The chunked scan with its own backward pass.

Inside a chunk the scan is a masked matrix product, between chunks a short loop over states (Dao & Gu 2024,
sec. 6). Written by hand for two reasons. Autograd would keep and sweep many (Q, Q) arrays per head. And the
gradient of a decay, as the sum over all pairs of tokens it lies between, is taken here without subtracting large
equal terms: a token's own pair, which no decay touches, never enters.

Layouts: per head (B, c, H, Q, .) for products inside a chunk, per group (B, c, G, Q, .) for products with B and C,
which are never repeated to heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmtrain.kernels.ssd.layout import Layout


class _Decays(NamedTuple):
    """What steps and A say about a chunk."""

    total: Tensor
    """(B, c, H, Q) log decay from the chunk's start through each token."""
    rest: Tensor
    """(B, c, H, Q) decay from each token to the chunk's end."""
    through: Tensor
    """(B, c, H, 1, 1) decay over the whole chunk."""


class ChunkedScan(torch.autograd.Function):
    """y = scan(x, dt, A, B, C) + D x and final states, over chunks that hold one document each."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial: Tensor | None,
        layout: Layout | None,
    ) -> tuple[Tensor, Tensor]:
        """Scan x (B, c, Q, H, P), dt (B, c, Q, H), B and C (B, c, Q, G, N), D (H,); returns y like x, states."""
        batch, n_chunks, q, heads, head_dim = x.shape
        groups = B.shape[3]
        steps = dt.movedim(3, 2).contiguous()  # (B, c, H, Q)
        keys, queries = B.movedim(3, 2).contiguous(), C.movedim(3, 2).contiguous()  # (B, c, G, Q, N)
        decays = _decays(steps, A)
        decay, mix = _mix(decays, steps, keys, queries, D)
        y = mix @ x.movedim(3, 2).contiguous()  # (B, c, H, Q, P)
        fed = _by_group(x, steps * decays.rest, groups)  # (B, c, G, Q, H / G * P)
        added = (fed.transpose(3, 4) @ keys).view(batch, n_chunks, heads, head_dim, -1)
        entering, final = _carry(added, decays.through, initial, layout)
        seen = queries @ entering.view(batch, n_chunks, groups, -1, B.shape[4]).transpose(3, 4)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        since = decays.total.exp().movedim(3, 2).unsqueeze(-1)  # (B, c, Q, H, 1)
        torch.addcmul(y.movedim(3, 2), _by_token(seen, heads), since, out=out)
        ctx.save_for_backward(x, steps, A, keys, queries, D, *decays, decay, mix, entering, seen)
        ctx.layout, ctx.has_initial = layout, initial is not None
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor, grad_final: Tensor):
        """Gradients of x, dt, A, B, C, D and the initial states."""
        x, steps, A, keys, queries, D, *rest_saved, decay, mix, entering, seen = ctx.saved_tensors
        decays = _Decays(*rest_saved)
        batch, n_chunks, q, heads, head_dim = x.shape
        groups, n = keys.shape[2], keys.shape[4]
        grouped = (batch, n_chunks, groups, -1, n)
        # Between chunks.
        heard = _by_group(grad_y, decays.total.exp(), groups)  # (B, c, G, Q, H / G * P)
        local = (heard.transpose(3, 4) @ queries).view(entering.shape)
        grad_leaving, grad_initial = _carry_back(local, decays.through, grad_final, ctx.layout, ctx.has_initial)
        grad_queries = heard @ entering.view(grouped)  # (B, c, G, Q, N)
        grad_fed = keys @ grad_leaving.view(grouped).transpose(3, 4)  # (B, c, G, Q, H / G * P)
        weight = steps * decays.rest
        grad_keys = _by_group(x, weight, groups) @ grad_leaving.view(grouped)
        from_start = _by_head(heard.mul_(seen), heads)  # (B, c, H, Q)
        to_end = _by_head(grad_fed * _by_group(x, None, groups), heads)
        over_chunk = decays.through.flatten(2) * _dot(grad_leaving, entering)  # (B, c, H)
        # Inside chunks.
        grad_heads = grad_y.movedim(3, 2).contiguous()  # (B, c, H, Q, P)
        grad_mix = grad_heads @ x.movedim(3, 2).contiguous().transpose(3, 4)  # (B, c, H, Q, Q)
        grad_x = torch.empty_like(seen).view(x.shape)
        direct = (mix.transpose(3, 4) @ grad_heads).movedim(3, 2)  # (B, c, Q, H, P)
        torch.addcmul(direct, _by_token(grad_fed, heads), weight.movedim(3, 2).unsqueeze(-1), out=grad_x)
        grad_D = None if D is None else grad_mix.diagonal(0, 3, 4).sum((0, 1, 3))
        scores = (queries @ keys.transpose(3, 4)).tril_()  # (B, c, G, Q, Q)
        pairs = grad_mix.mul_(decay).view(batch, n_chunks, groups, -1, q, q)  # (B, c, G, H / G, Q, Q)
        shares = (pairs * scores.unsqueeze(3)).view(grad_mix.shape)
        own = shares.diagonal(0, 3, 4).clone()  # (B, c, H, Q)
        shares.diagonal(0, 3, 4).zero_()
        later = shares.sum(3)  # (B, c, H, Q): token j in all later outputs
        earlier = (shares @ steps.unsqueeze(-1)).squeeze(-1)  # output i from all earlier tokens
        grad_scores = pairs.mul_(steps.view(batch, n_chunks, groups, -1, 1, q)).sum(3).tril_()
        grad_queries += grad_scores @ keys
        grad_keys += grad_scores.transpose(3, 4) @ queries
        # A decay at token k lies between every source before k and every reader from k on.
        ending = weight * to_end
        reach = _sum_from(earlier - steps * later + from_start) + (ending.cumsum(-1) - ending)
        grad_log = reach + over_chunk.unsqueeze(-1)
        grad_log = torch.where(steps * A[:, None] > _floor(x.dtype), grad_log, 0.0)
        grad_steps = own + later + decays.rest * to_end + grad_log * A[:, None]
        grad_A = (grad_log * steps).sum((0, 1, 3))
        return (
            grad_x,
            grad_steps.movedim(2, 3),
            grad_A,
            grad_keys.movedim(2, 3),
            grad_queries.movedim(2, 3),
            grad_D,
            grad_initial,
            None,
        )


def _floor(dtype: torch.dtype) -> float:
    """Return a log decay whose exponential is 0; below it, sums would only lose digits."""
    return -746.0 if dtype == torch.float64 else -104.0


def _decays(steps: Tensor, A: Tensor) -> _Decays:
    """Sum log decays inside each chunk: steps (B, c, H, Q), A (H,)."""
    total = (steps * A[:, None]).clamp_(min=_floor(steps.dtype)).cumsum(-1)
    end = total[..., -1:]
    return _Decays(total, (end - total).exp(), end.exp().unsqueeze(-1))


def _mix(
    decays: _Decays, steps: Tensor, keys: Tensor, queries: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the decay between tokens (B, c, H, Q, Q), 1 above the diagonal, and the matrix that maps x to y."""
    batch, n_chunks, heads, q = steps.shape
    groups = keys.shape[2]
    total = decays.total
    # Differences are cut at 0 before the exponential, which would overflow above the diagonal.
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).clamp_(max=0.0).exp_()
    scores = (queries @ keys.transpose(3, 4)).tril_()  # (B, c, G, Q, Q)
    mix = (decay.view(batch, n_chunks, groups, -1, q, q) * scores.unsqueeze(3)).view(decay.shape)
    mix.mul_(steps.unsqueeze(3))
    if D is not None:
        mix.diagonal(0, 3, 4).add_(D[:, None])
    return decay, mix


def _carry(
    added: Tensor, through: Tensor, initial: Tensor | None, layout: Layout | None
) -> tuple[Tensor, Tensor]:
    """Pass states along the chunks; returns the state that enters each chunk (B, c, H, P, N) and final states."""
    entering = torch.empty_like(added)
    state = torch.zeros_like(added[:, 0])
    if layout is None and initial is not None:
        state = initial
    leaving = None if layout is None else torch.empty_like(added)
    for k in range(added.shape[1]):
        if layout is not None:
            restart = layout.restart[:, k, None, None, None]
            fresh = torch.zeros_like(state) if initial is None else initial[layout.document[:, k]]
            state = torch.where(restart, fresh, state)
        entering[:, k] = state
        state = torch.addcmul(added[:, k], through[:, k], state)
        if leaving is not None:
            leaving[:, k] = state
    if layout is None:
        return entering, state
    return entering, leaving.flatten(0, 1)[layout.last]


def _carry_back(
    local: Tensor, through: Tensor, grad_final: Tensor, layout: Layout | None, has_initial: bool
) -> tuple[Tensor, Tensor | None]:
    """Pass gradients of states back along the chunks.

    local (B, c, H, P, N): gradient of each entering state from its own chunk's outputs. Returns the gradient of
    each leaving state, like local, and of the initial states.
    """
    grad_leaving = torch.empty_like(local)
    if layout is None:
        state = grad_final
        for k in reversed(range(local.shape[1])):
            grad_leaving[:, k] = state
            state = torch.addcmul(local[:, k], through[:, k], state)
        return grad_leaving, state if has_initial else None
    ends = torch.zeros_like(local)
    ends.flatten(0, 1)[layout.last] = grad_final
    grad_initial = torch.zeros_like(grad_final) if has_initial else None
    state = torch.zeros_like(local[:, 0])
    for k in reversed(range(local.shape[1])):
        state = state + ends[:, k]
        grad_leaving[:, k] = state
        state = torch.addcmul(local[:, k], through[:, k], state)
        restart = layout.restart[:, k, None, None, None]
        if grad_initial is not None:
            grad_initial.index_add_(0, layout.document[:, k], torch.where(restart, state, 0.0))
        state = torch.where(restart, 0.0, state)
    return grad_leaving, grad_initial


def _by_group(tokens: Tensor, scale: Tensor | None, groups: int) -> Tensor:
    """Turn (B, c, Q, H, P), scaled by (B, c, H, Q), into rows of each group (B, c, G, Q, H / G * P)."""
    batch, n_chunks, q, heads, head_dim = tokens.shape
    shape = (batch, n_chunks, groups, q, heads // groups, head_dim)
    out = torch.empty(shape, dtype=tokens.dtype, device=tokens.device)
    rows = tokens.unflatten(3, (groups, -1)).movedim(3, 2)
    if scale is None:
        out.copy_(rows)
    else:
        torch.mul(rows, scale.unflatten(2, (groups, -1)).transpose(3, 4).unsqueeze(-1), out=out)
    return out.flatten(4)


def _by_token(rows: Tensor, heads: int) -> Tensor:
    """View rows of each group (B, c, G, Q, H / G * P) as (B, c, Q, H, P)."""
    groups = rows.shape[2]
    if groups == 1:
        return rows.squeeze(2).unflatten(-1, (heads, -1))
    return rows.unflatten(-1, (heads // groups, -1)).movedim(2, 3).flatten(3, 4)


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """Sum rows of each group (B, c, G, Q, H / G * P) over P, into (B, c, H, Q)."""
    per_head = rows.unflatten(-1, (heads // rows.shape[2], -1)).sum(-1)  # (B, c, G, Q, H / G)
    return per_head.transpose(3, 4).flatten(2, 3)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of states (B, c, H, P, N) over P and N."""
    return (a.flatten(3).unsqueeze(3) @ b.flatten(3).unsqueeze(4)).flatten(2)


def _sum_from(values: Tensor) -> Tensor:
    """Sum (..., Q) from each token to the chunk's end."""
    return values.flip(-1).cumsum(-1).flip(-1)
