"""The chunked scan with its own backward pass.

Inside a chunk the scan is a masked matrix product, between chunks it hands on a state (Dao & Gu 2024, sec. 6).
Both passes walk over blocks (`blocks.py`) and recompute what is cheap: only the inputs and the states that enter
the chunks are kept. The gradient of a decay, the sum over all pairs of tokens it lies between, is taken without
subtracting large equal terms: a token's own pair, which no decay touches, never enters.

Layouts in a block: per head (R, H, Q, .) for products inside the chunk, per group (R, G, Q, .) for products with
B ("keys") and C ("queries"), which are never repeated to heads; R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmtrain.kernels.ssd.blocks import Block, plan

CACHE = 320 * 1024
"""Bytes that one array of a block may take on a CPU: several of them then share a core's second-level cache."""


class _Chunk(NamedTuple):
    """A block's views and what its steps say about decay."""

    x: Tensor
    """(R, Q, H, P)"""
    heads: Tensor
    """x per head, (R * H, Q, P)"""
    steps: Tensor
    """(R, H, Q)"""
    keys: Tensor
    """(R * G, Q, N)"""
    queries: Tensor
    """(R * G, Q, N)"""
    scores: Tensor
    """(R, G, 1, Q, Q) queries times keys, zero above the diagonal"""
    decay: Tensor
    """(R, H, Q, Q) decay from token j to token i, 1 above the diagonal"""
    since: Tensor
    """(R, H, Q) decay from the chunk's start through each token"""
    weight: Tensor
    """(R, H, Q) step times the decay from each token to the chunk's end"""
    rest: Tensor
    """(R, H, Q) decay from each token to the chunk's end"""
    through: Tensor
    """(R, H, 1, 1) decay over the whole chunk"""


class ChunkedScan(torch.autograd.Function):
    """y = scan(x, dt, A, B, C) + D x, and each document's final state."""

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
        doc_ids: Tensor | None,
        n_docs: int,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """Scan x (B, L, H, P), dt (B, L, H), B and C (B, L, G, N), D (H,); returns y like x, states."""
        batch, length, heads, head_dim = x.shape
        n = B.shape[3]
        steps, keys, queries = (t.transpose(1, 2).contiguous() for t in (dt, B, C))
        blocks = plan(batch, length, chunk, doc_ids, _rows_at_once(x, n, chunk))
        logs = _log_decays(steps, A)
        entering = x.new_empty(blocks[-1].kept.stop, heads, head_dim, n)
        final = x.new_empty(n_docs, heads, head_dim, n)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for block in blocks:
            if block.first:
                if initial is None:
                    entering[block.kept] = 0.0
                else:
                    entering[block.kept] = initial[block.docs]
            state = entering[block.kept]  # (R, H, P, N)
            part = _open(block, x, steps, keys, queries, logs)
            after = final[block.docs] if block.last else entering[_next(block)]
            _outputs(part, state, D, y[block.rows, block.time])
            torch.mul(state, part.through, out=after)
            fed = _scaled(part.x, part.weight, part.queries.shape[0])
            after.view(fed.shape[0], -1, n).baddbmm_(fed.transpose(1, 2), part.keys)
        ctx.save_for_backward(x, steps, logs, A, keys, queries, D, entering)
        ctx.blocks, ctx.n_docs, ctx.has_initial = blocks, n_docs, initial is not None
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor, grad_final: Tensor):
        """Gradients of x, dt, A, B, C, D and the initial states."""
        x, steps, logs, A, keys, queries, D, entering = ctx.saved_tensors
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_keys, grad_queries = torch.empty_like(keys), torch.empty_like(queries)
        grad_steps, grad_logs = torch.empty_like(steps), torch.empty_like(steps)
        grad_D = None if D is None else torch.zeros_like(D)
        grad_initial = torch.empty_like(grad_final) if ctx.has_initial else None
        grad_state = grad_final
        for block in reversed(ctx.blocks):
            if block.last:
                grad_state = grad_final[block.docs].clone()
            where = (block.rows, slice(None), block.time)
            part = _open(block, x, steps, keys, queries, logs)
            grad_out = grad_y[block.rows, block.time]  # (R, Q, H, P)
            between = _back_between(part, entering[block.kept], grad_state, grad_out)
            inside = _back_inside(part, D, grad_out, grad_D)
            torch.addcmul(
                inside.x.movedim(1, 2),
                _by_token(between.fed, part.x.shape),
                part.weight.transpose(1, 2).unsqueeze(-1),
                out=grad_x[block.rows, block.time],
            )
            grad_keys[where] = between.keys.add_(inside.keys).view(grad_keys[where].shape)
            grad_queries[where] = between.queries.add_(inside.queries).view(grad_queries[where].shape)
            grad_steps[where] = torch.addcmul(inside.steps, part.rest, between.to_end)
            # A decay at token k lies between every source before k and every reader from k on.
            ending = part.weight * between.to_end
            reach = _sum_from(inside.reach + between.from_start).add_(ending.cumsum(-1)).sub_(ending)
            grad_logs[where] = reach.add_(between.over_chunk.unsqueeze(-1))
            if block.first and grad_initial is not None:
                grad_initial[block.docs] = grad_state
        grad_logs = torch.where(logs > _floor(x.dtype), grad_logs, 0.0)
        grad_A = (grad_logs * steps).sum((0, 2))
        grad_steps.addcmul_(grad_logs, A[:, None])
        turned = (g.transpose(1, 2) for g in (grad_steps, grad_keys, grad_queries))
        grad_dt, grad_B, grad_C = turned
        return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_initial, None, None, None


class _Between(NamedTuple):
    """Gradients through the states that enter and leave a chunk."""

    queries: Tensor
    keys: Tensor
    fed: Tensor
    """(R * G, Q, H / G * P) of the weighted inputs that the state takes in"""
    from_start: Tensor
    """(R, H, Q) share of each reader in the gradient of the entering state's decay"""
    to_end: Tensor
    """(R, H, Q) of each token's weight"""
    over_chunk: Tensor
    """(R, H) of the log of the whole chunk's decay, by way of the entering state"""


class _Inside(NamedTuple):
    """Gradients through the pairs of tokens inside a chunk."""

    x: Tensor
    queries: Tensor
    keys: Tensor
    steps: Tensor
    reach: Tensor
    """(R, H, Q) pairs that a token reads less pairs that it feeds, its own pair in neither"""


def _back_between(part: _Chunk, entering: Tensor, grad_state: Tensor, grad_out: Tensor) -> _Between:
    """Pull grad_out (R, Q, H, P) back through the states; grad_state (R, H, P, N) becomes the entering state's."""
    groups, _, n = part.keys.shape
    states, grads = entering.view(groups, -1, n), grad_state.view(groups, -1, n)  # (R * G, H / G * P, N)
    heard = _scaled(grad_out, part.since, groups)  # (R * G, Q, H / G * P)
    grad_queries = heard @ states
    fed = _scaled(part.x, part.weight, groups)
    grad_keys = fed @ grads
    grad_fed = part.keys @ grads.transpose(1, 2)
    over_chunk = (grad_state * entering).sum((2, 3)) * part.through[..., 0, 0]
    grad_state.mul_(part.through)
    grads.baddbmm_(heard.transpose(1, 2), part.queries)
    seen = part.queries @ states.transpose(1, 2)
    from_start = _per_head(heard.mul_(seen), part.steps.shape)
    to_end = _per_head(_scaled(part.x, None, groups).mul_(grad_fed), part.steps.shape)
    return _Between(grad_queries, grad_keys, grad_fed, from_start, to_end, over_chunk)


def _back_inside(part: _Chunk, D: Tensor | None, grad_out: Tensor, grad_D: Tensor | None) -> _Inside:
    """Pull grad_out (R, Q, H, P) back through the chunk's own pairs, adding to grad_D (H,)."""
    rows, heads, q = part.steps.shape
    by_group = (rows, part.scores.shape[1], -1, q, q)
    grad_heads = grad_out.movedim(2, 1).reshape(part.heads.shape)  # (R * H, Q, P)
    mix = _mix(part, D).view(-1, q, q)
    grad_x = (mix.transpose(1, 2) @ grad_heads).view(rows, heads, q, -1)
    pairs = (grad_heads @ part.heads.transpose(1, 2)).view(rows, heads, q, q)
    if grad_D is not None:
        grad_D += pairs.diagonal(0, 2, 3).sum((0, 2))
    pairs.mul_(part.decay)
    shares = (pairs.view(by_group) * part.scores).view(pairs.shape)
    diagonal = shares.diagonal(0, 2, 3)
    own = diagonal.clone()  # (R, H, Q)
    diagonal.zero_()
    later = shares.sum(2)  # (R, H, Q): token j in all later outputs
    earlier = (shares @ part.steps.unsqueeze(-1)).squeeze(-1)  # output i from all earlier tokens
    pairs.mul_(part.steps.unsqueeze(2))
    grad_scores = pairs.view(by_group).sum(2).tril_().view(-1, q, q)  # (R * G, Q, Q)
    reach = earlier.addcmul_(part.steps, later, value=-1)
    return _Inside(
        grad_x, grad_scores @ part.keys, grad_scores.transpose(1, 2) @ part.queries, own.add_(later), reach
    )


def _floor(dtype: torch.dtype) -> float:
    """Return a log decay whose exponential is 0; below it, sums would only lose digits."""
    return -746.0 if dtype == torch.float64 else -104.0


def _log_decays(steps: Tensor, A: Tensor) -> Tensor:
    """Log decay of each token, steps (B, H, L) times A (H,), no lower than the floor."""
    return (steps * A[:, None]).clamp_(min=_floor(steps.dtype))


def _rows_at_once(x: Tensor, n: int, chunk: int) -> int:
    """Return how many rows a block takes."""
    if x.device.type != "cpu":
        return x.shape[0]
    per_row = x.shape[2] * max(chunk * chunk, chunk * x.shape[3], x.shape[3] * n) * x.element_size()
    return max(1, CACHE // per_row)


def _next(block: Block) -> slice:
    """Return where the states that leave a block are kept when its documents go on."""
    size = block.kept.stop - block.kept.start
    return slice(block.kept.stop, block.kept.stop + size)


def _open(block: Block, x: Tensor, steps: Tensor, keys: Tensor, queries: Tensor, logs: Tensor) -> _Chunk:
    """Take a block's views and compute its decays and scores."""
    here = x[block.rows, block.time]  # (R, Q, H, P)
    rows, q, heads, _ = here.shape
    step, log, key, query = (t[block.rows, :, block.time] for t in (steps, logs, keys, queries))
    key, query = key.flatten(0, 1), query.flatten(0, 1)  # (R * G, Q, N)
    total = log.cumsum(-1)  # (R, H, Q)
    # Differences are cut at 0 before the exponential, which would overflow above the diagonal.
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).clamp_(max=0.0).exp_()
    scores = torch.bmm(query, key.transpose(1, 2)).tril_().view(rows, -1, 1, q, q)
    rest = (total[..., -1:] - total).exp_()
    since = total.exp()
    per_head = here.movedim(2, 1).reshape(rows * heads, q, -1)
    through = since[..., -1:].unsqueeze(-1)
    return _Chunk(here, per_head, step, key, query, scores, decay, since, step * rest, rest, through)


def _mix(part: _Chunk, D: Tensor | None) -> Tensor:
    """Return the matrix (R, H, Q, Q) that maps a chunk's x to its y, D included."""
    rows, heads, q = part.steps.shape
    groups = part.scores.shape[1]
    mix = (part.decay.view(rows, groups, -1, q, q) * part.scores).view(part.decay.shape)
    mix.mul_(part.steps.unsqueeze(2))
    if D is not None:
        mix.diagonal(0, 2, 3).add_(D[:, None])
    return mix


def _outputs(part: _Chunk, state: Tensor, D: Tensor | None, out: Tensor) -> None:
    """Write y of a block (R, Q, H, P): the chunk's own inputs and the state (R, H, P, N) that enters."""
    rows, heads, q = part.steps.shape
    groups, _, n = part.queries.shape
    inside = torch.bmm(_mix(part, D).view(-1, q, q), part.heads).view(rows, heads, q, -1)
    seen = torch.bmm(part.queries, state.view(groups, -1, n).transpose(1, 2))  # (R * G, Q, H / G * P)
    since = part.since.transpose(1, 2).unsqueeze(-1)
    torch.addcmul(inside.movedim(1, 2), _by_token(seen, out.shape), since, out=out)


def _scaled(tokens: Tensor, scale: Tensor | None, groups: int) -> Tensor:
    """Turn tokens (R, Q, H, P), times scale (R, H, Q), into rows of each group (R * G, Q, H / G * P)."""
    rows, q, heads, head_dim = tokens.shape
    split = (rows, groups // rows, -1, q)
    out = torch.empty(
        (*split[:2], q, heads * rows // groups, head_dim), dtype=tokens.dtype, device=tokens.device
    )
    source = tokens.unflatten(2, (split[1], -1)).movedim(2, 1)  # (R, G, Q, H / G, P)
    if scale is None:
        out.copy_(source)
    else:
        torch.mul(source, scale.reshape(split).transpose(2, 3).unsqueeze(-1), out=out)
    return out.view(groups, q, -1)


def _by_token(rows: Tensor, shape: torch.Size) -> Tensor:
    """View rows of each group (R * G, Q, H / G * P) as tokens (R, Q, H, P)."""
    if rows.shape[0] == shape[0]:
        return rows.view(shape)
    return rows.view(shape[0], -1, shape[1], rows.shape[2] // shape[3], shape[3]).movedim(1, 2).flatten(2, 3)


def _per_head(rows: Tensor, shape: torch.Size) -> Tensor:
    """Sum rows of each group (R * G, Q, H / G * P) over P, into (R, H, Q)."""
    r, heads, q = shape
    groups = rows.shape[0]
    return rows.view(groups, q, heads * r // groups, -1).sum(-1).transpose(1, 2).reshape(shape)


def _sum_from(values: Tensor) -> Tensor:
    """Sum (..., Q) from each token to the chunk's end."""
    return values.flip(-1).cumsum(-1).flip(-1)
