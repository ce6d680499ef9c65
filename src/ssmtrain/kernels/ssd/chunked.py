"""The chunked scan with its own backward pass.

Inside a chunk the scan is a masked matrix product, between chunks it hands on a state (Dao & Gu 2024,
sec. 6). Both passes walk over blocks (`blocks.py`) and recompute what is cheap (`chunk.py`): only the inputs
and the states that enter the chunks are kept. The gradient of a decay, the sum over all pairs of tokens it
lies between, is taken without subtracting large equal terms: a token's own pair, which no decay touches,
never enters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmtrain.kernels.scratch import Scratch
from ssmtrain.kernels.ssd.blocks import Block, kept_states, plan
from ssmtrain.kernels.ssd.chunk import Chunk, Tokens, floor, spans

CACHE = 640 * 1024
"""Bytes per thread that one array of a block may take on a CPU: about a third of a core's cache."""


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
        run = torch.ops.ssmtrain.ssd_scan if torch.compiler.is_compiling() else scan
        y, final, entering = run(x, dt, A, B, C, D, initial, doc_ids, n_docs, chunk)
        ctx.save_for_backward(x, dt, A, B, C, D, doc_ids, entering)
        ctx.chunk, ctx.has_initial = chunk, initial is not None
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor, grad_final: Tensor):
        """Gradients of x, dt, A, B, C, D and the initial states."""
        run = torch.ops.ssmtrain.ssd_scan_back if torch.compiler.is_compiling() else scan_back
        x, dt, A, B, C, D, doc_ids, entering = ctx.saved_tensors
        grads = run(grad_y, grad_final, x, dt, A, B, C, D, doc_ids, entering, ctx.chunk)
        grad_D = None if D is None else grads[5]
        return *grads[:5], grad_D, grads[6] if ctx.has_initial else None, None, None, None


def scan(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan as ChunkedScan.forward; returns y, final states, and the states that enter the blocks."""
    batch, length, heads, head_dim = x.shape
    groups, n = B.shape[2:]
    tokens = _tokens(x, dt, A, B, C)
    entering = x.new_empty(kept_states(batch, length, chunk, n_docs), groups, heads // groups * head_dim, n)
    final = x.new_empty(n_docs, heads, head_dim, n)  # as it is returned: autograd minds views
    leaving = final.view(n_docs, *entering.shape[1:])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out, buffer = _group_heads(y, groups), Scratch(x)
    for block in plan(batch, length, chunk, doc_ids, _rows_at_once(x, n, chunk)):
        state = entering[block.kept]
        if block.first:
            if initial is None:
                state.zero_()
            else:
                state.copy_(initial[block.docs].reshape(state.shape))
        part = Chunk(tokens.at(block), D, buffer)
        part.outputs(state, out[block.rows, :, block.time])
        part.take_in(state, leaving[block.docs] if block.last else entering[_next(block)])
    return y, final, entering


def scan_back(
    grad_y: Tensor,
    grad_final: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    doc_ids: Tensor | None,
    entering: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, dt, A, B, C, D (zeros without D) and the initial states, given or not."""
    batch, length = x.shape[:2]
    groups, n = B.shape[2:]
    tokens = _tokens(x, dt, A, B, C)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grads = Tokens(_group_heads(grad_x, groups), *(torch.empty_like(t) for t in tokens[1:]))
    grad_D, grad_initial = torch.zeros_like(A), torch.empty_like(grad_final)
    grad_out, buffer = _group_heads(grad_y, groups), Scratch(x)
    sums = spans(min(chunk, length), x)
    for block in reversed(plan(batch, length, chunk, doc_ids, _rows_at_once(x, n, chunk))):
        state = entering[block.kept]
        grad_state = buffer("grad state", *state.shape)
        if block.last:
            grad_state.copy_(grad_final[block.docs].reshape(state.shape))
        part = Chunk(tokens.at(block), D, buffer)
        part.back(state, grad_state, grad_out[block.rows, :, block.time], grads.at(block), grad_D, sums)
        if block.first:
            grad_initial[block.docs] = grad_state.view(grad_initial[block.docs].shape)
    # Where a log decay was cut, it has no slope.
    grad_logs = torch.where(tokens.logs > floor(x.dtype), grads.logs, 0.0)
    grad_A = (grad_logs * tokens.steps).sum((0, 3)).flatten()
    grad_steps = grads.steps.addcmul_(grad_logs, A.view(groups, -1, 1))
    grad_dt = grad_steps.flatten(1, 2).transpose(1, 2)  # (B, L, H)
    grad_B, grad_C = grads.keys.transpose(1, 2), grads.queries.transpose(1, 2)
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_initial


def _tokens(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tokens:
    """Lay out the scan's inputs by group."""
    groups = B.shape[2]
    steps = _group_heads(dt, groups).movedim(2, 3).contiguous()  # (B, G, H/G, L)
    logs = (steps * A.view(groups, -1, 1)).clamp_(min=floor(x.dtype))
    keys, queries = (t.transpose(1, 2).contiguous() for t in (B, C))  # (B, G, L, N)
    return Tokens(_group_heads(x, groups), steps, logs, keys, queries)


def _group_heads(tokens: Tensor, groups: int) -> Tensor:
    """View tokens (B, L, H, ...) as (B, G, L, H/G, ...)."""
    return tokens.unflatten(2, (groups, -1)).transpose(1, 2)


def _rows_at_once(x: Tensor, n: int, chunk: int) -> int:
    """Return how many rows a block takes: all, unless it is the cache that bounds the speed."""
    if x.device.type != "cpu":
        return x.shape[0]
    heads, head_dim = x.shape[2:]
    per_row = heads * max(chunk * chunk, chunk * head_dim, head_dim * n) * x.element_size()
    return max(1, CACHE * torch.get_num_threads() // per_row)


def _next(block: Block) -> slice:
    """Return where the states that leave a block are kept when its documents go on."""
    size = block.kept.stop - block.kept.start
    return slice(block.kept.stop, block.kept.stop + size)
