"""One pass over a sequence on Hopper: a head's state stays in registers while its outputs are written.

The kernels over chunks write a state per chunk to memory and read it back. Here one program carries the state
of one head through up to W tokens, K at a time, and takes the outputs as it goes: x is read once and y
written once. What makes that fast is an order that Triton's compiler does not find by itself, so it is
written in Gluon, Triton's dialect with explicit layouts: the loads of the next block are under way during all
of this one, and the products of a block run on the matrix units while the decays of its pairs are taken.

With a the log decay up to a token, b the same less the log of its step size, a block of K tokens and the
state S before it give

    out = exp2(a - begin) C S^T + tril(C B^T * exp2(a_t - b_s)) x
    S <- exp2(end - begin) S + (exp2(end - b) x)^T B

The gradient of x is the same pass from the end, with dy for x, B and C swapped, and -b for a, -a for b.
docs/kernels/ssd.md has the derivation.

A document longer than W is cut into pieces of W tokens from its own start, so that where it lies in the batch
does not change its bits; `leave` and `enter` carry the state from piece to piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ssmtrain.kernels import tuned
from ssmtrain.kernels.ahead import aligned, launch

if TYPE_CHECKING:
    from ssmtrain.kernels.ssd.triton import Shape, Steps

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
    raise ImportError("Gluon as it is used here came with Triton 3.6")

BLOCK = 64
"""Tokens of a block, K: the rows of one matrix product of a warp group."""

barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def document(docs, d, length, per_row, K: gl.constexpr, PACKED: gl.constexpr):
    """Return the first token, chunk and block of document d."""
    if PACKED:
        first = gl.load(docs + 3 * d)
        chunk = gl.load(docs + 3 * d + 1)
        block = gl.load(docs + 3 * d + 2).to(gl.int32)
    else:
        first = d.to(gl.int64) * length
        chunk = d.to(gl.int64) * per_row
        block = d * ((length + K - 1) // K)
    return first, chunk, block


@gluon.jit
def first_piece(
    t, tokens, n_docs, doc_ids, docs, length, per_row, K: gl.constexpr, W: gl.constexpr, PACKED: gl.constexpr
):
    """Return document and block of the first piece that starts at token t or later."""
    inside = gl.minimum(t, tokens - 1)
    if PACKED:
        d = gl.load(doc_ids + inside).to(gl.int32)
    else:
        d = (inside // length).to(gl.int32)
    first, _, block = document(docs, d, length, per_row, K, PACKED)
    after, _, next_block = document(docs, d + 1, length, per_row, K, PACKED)
    pieces = ((inside - first + W - 1) // W).to(gl.int32)
    if first + pieces.to(gl.int64) * W < after:
        block += pieces * (W // K)
    else:
        d += 1
        block = next_block
    if t >= tokens:
        # Past the last document that there is; n_docs may be more.
        if PACKED:
            d = gl.load(doc_ids + (tokens - 1)).to(gl.int32) + 1
        else:
            d = gl.to_tensor(n_docs)
        _, _, block = document(docs, d, length, per_row, K, PACKED)
    return d, block


@gluon.jit
def copy_tile(to, base, stride: gl.constexpr, i, j, size):
    """Begin to copy `size` rows into shared memory; zeros below them."""
    async_copy.async_copy_global_to_shared(
        to, base + (i[:, None] * stride + j[None, :]), mask=(i < size)[:, None] & (j >= 0)[None, :]
    )


@gluon.jit
def copy_edges(to, log, has_before, END: gl.constexpr, K: gl.constexpr, line: gl.constexpr):
    """Begin to copy the log decay before a block in its chunk, or 0, and as second that at its END."""
    q = gl.arange(0, K, line)
    before = (q == 0) & has_before
    if END:
        async_copy.async_copy_global_to_shared(to, log + gl.where(q == 0, -1, K - 2), mask=before | (q == 1))
    else:
        async_copy.async_copy_global_to_shared(to, log - 1, mask=before)


@gluon.jit
def one_pass(
    source,
    keys,
    readers,
    D,
    logs,
    late,
    out,
    states,
    enter,
    leave,
    decays,
    initial,
    final,
    doc_ids,
    docs,
    tokens,
    n_docs,
    length,
    per_row,
    H,
    per_group,
    s_source: gl.constexpr,
    s_keys: gl.constexpr,
    s_readers: gl.constexpr,
    s_out: gl.constexpr,
    P: gl.constexpr,
    N: gl.constexpr,
    Q: gl.constexpr,
    K: gl.constexpr,
    W: gl.constexpr,
    BACK: gl.constexpr,
    OUT: gl.constexpr,
    KEEP: gl.constexpr,
    LEAVE: gl.constexpr,
    HAS_D: gl.constexpr,
    HAS_INITIAL: gl.constexpr,
    HAS_FINAL: gl.constexpr,
    PACKED: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Carry one head's state through the pieces that start in one window of W tokens.

    Forward, source is x, keys B and readers C; BACK, dy, C and B, from the last token to the first. OUT
    writes out (tokens, H, P); KEEP writes states (chunks, H, P, N), those that enter each chunk in the
    direction of the walk. A document begins with `initial` and ends with `final` (n_docs, H, P, N); one that
    began in another window, with `enter` (windows, H, P, N). LEAVE instead takes only the piece that goes on
    in the next window, from a state of zero, and writes `leave` (windows, H, P, N), and to decays (windows,
    H) the decay of what entered, 0 where nothing did.
    """
    GROUPS: gl.constexpr = WARPS // 4
    by_state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, N // GROUPS, 16])
    by_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, P // GROUPS, 16])
    by_pair: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, K // GROUPS, 16])
    into_out: gl.constexpr = gl.DotOperandLayout(0, by_out, 2)
    into_state: gl.constexpr = gl.DotOperandLayout(0, by_state, 2)
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [256 // P, P // 8], [WARPS, 1], [1, 0])
    LANES: gl.constexpr = min(32, N // 8)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PER: gl.constexpr = Q // K
    STEP: gl.constexpr = -1 if BACK else 1

    window = gl.program_id(0) // H
    h = gl.program_id(0) % H
    t = window.to(gl.int64) * W
    d, begin_block = first_piece(t, tokens, n_docs, doc_ids, docs, length, per_row, K, W, PACKED)
    d_end, end_block = first_piece(t + W, tokens, n_docs, doc_ids, docs, length, per_row, K, W, PACKED)
    if LEAVE:
        if BACK:
            d = gl.minimum(d, n_docs - 1)
            _, _, block = document(docs, d, length, per_row, K, PACKED)
            _, _, next_block = document(docs, d + 1, length, per_row, K, PACKED)
            end_block = gl.minimum(gl.minimum(begin_block + W // K, next_block), end_block)
            goes_on = (begin_block > block) & (end_block > begin_block)
            entered = end_block < next_block
        else:
            d = d_end
            _, _, block = document(docs, gl.minimum(d, n_docs - 1), length, per_row, K, PACKED)
            goes_on = (d < n_docs) & (end_block > block)
            begin_block = end_block - W // K
            entered = begin_block > block
        end_block = gl.where(goes_on, end_block, begin_block)
    elif BACK:
        # The last block's document: the one that the next window's first piece continues, or the one before.
        _, _, block = document(docs, d_end, length, per_row, K, PACKED)
        d = gl.where(end_block > block, d_end, d_end - 1)
    count = end_block - begin_block
    if count <= 0:
        return
    first, chunk, block = document(docs, d, length, per_row, K, PACKED)
    after, _, _ = document(docs, d + 1, length, per_row, K, PACKED)
    # The block: its number in its document, first token, size and chunk. Documents, chunks and blocks lie
    # without gaps, so that no more than this lives through the loop, where registers are short.
    j = (end_block - 1 if BACK else begin_block) - block
    token = first + j.to(gl.int64) * K
    rest = (after - token).to(gl.int32)  # of the document
    size = gl.minimum(rest, K)
    here = chunk.to(gl.int32) + j // PER

    source += h * P
    keys += (h // per_group) * N
    readers += (h // per_group) * N
    out += h * P
    logs += h * Q + gl.arange(0, K, line)
    late += h * Q + gl.arange(0, K, line)
    i = gl.arange(0, K, gl.SliceLayout(1, narrow))
    p = gl.arange(0, P, gl.SliceLayout(0, narrow))
    k = gl.arange(0, K, gl.SliceLayout(1, wide))
    n = gl.arange(0, N, gl.SliceLayout(0, wide))
    row = gl.arange(0, K, gl.SliceLayout(1, by_pair))
    column = gl.arange(0, K, gl.SliceLayout(0, by_pair))
    part = (
        gl.arange(0, P, gl.SliceLayout(1, by_state))[:, None] * N
        + gl.arange(0, N, gl.SliceLayout(0, by_state))[None, :]
    )
    kept = gl.arange(0, P, gl.SliceLayout(1, wide))[:, None] * N + n[None, :]
    if HAS_D:
        skip = gl.load(D + h).to(gl.float32)

    sources = gl.allocate_shared_memory(gl.bfloat16, [2, K, P], tile)
    keyss = gl.allocate_shared_memory(gl.bfloat16, [2, K, N], tile)
    fades = gl.allocate_shared_memory(gl.float32, [2, K], flat)
    edges = gl.allocate_shared_memory(gl.float32, [2, K], flat)
    if OUT:
        rises = gl.allocate_shared_memory(gl.float32, [2, K], flat)
        readerss = gl.allocate_shared_memory(gl.bfloat16, [2, K, N], tile)
        outs = gl.allocate_shared_memory(gl.bfloat16, [K, P], tile)
    if OUT or KEEP:
        held = gl.allocate_shared_memory(gl.bfloat16, [P, N], tile)

    starts = rest <= K if BACK else j == 0
    S = gl.zeros([P, N], gl.float32, by_state)
    if HAS_INITIAL:
        if starts:
            S = gl.load(initial + (d.to(gl.int64) * H + h) * (P * N) + part)
    if not LEAVE:
        if not starts:
            S = gl.load(enter + (window.to(gl.int64) * H + h) * (P * N) + part)
    if OUT or KEEP:
        held.store(S.to(gl.bfloat16))
    total = gl.full([1], 0.0, gl.float32, gl.SliceLayout(1, by_state))

    at = (here.to(gl.int64) * H) * Q + (j % PER) * K
    copy_tile(sources.index(0), source + token * s_source, s_source, i, p, size)
    copy_tile(keyss.index(0), keys + token * s_keys, s_keys, k, n, size)
    if OUT:
        copy_tile(readerss.index(0), readers + token * s_readers, s_readers, k, n, size)
    async_copy.async_copy_global_to_shared(fades.index(0), (logs if BACK else late) + at)
    if OUT:
        async_copy.async_copy_global_to_shared(rises.index(0), (late if BACK else logs) + at)
    copy_edges(edges.index(0), logs + at, j % PER > 0, not OUT, K, line)
    async_copy.commit_group()
    past_size = size * 0
    for b in range(count):
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        now = b % 2
        X, Y = sources.index(now), keyss.index(now)
        c, before, last = fades.index(now), edges.index(now).slice(0, 1), edges.index(now).slice(1, 1)
        if OUT:
            R, a = readerss.index(now), rises.index(now)
            last = (c if BACK else a).slice(K - 1, 1)
            pair = warpgroup_mma(
                R, Y.permute((1, 0)), gl.zeros([K, K], gl.float32, by_pair), use_acc=False, is_async=True
            )
        if KEEP:
            if (j % PER == PER - 1) | starts if BACK else j % PER == 0:
                gl.store(states + (here.to(gl.int64) * H + h) * (P * N) + kept, held.load(wide))

        # Where the next block lies.
        closes = j == 0 if BACK else rest <= K
        this = d
        stays = (-j if BACK else K - rest) >> 31  # 0 or -1
        past = token + size if BACK else token - past_size
        past_mask = (i < past_size)[:, None] & (p >= 0)[None, :]
        past_size = size
        more = b + 1 < count
        if closes & more:
            d += STEP
            here += STEP
            first, _, _ = document(docs, d if BACK else d + 1, length, per_row, K, PACKED)
            if BACK:
                rest = (token - first).to(gl.int32)
                j = (rest - 1) // K
                token = first + j.to(gl.int64) * K
                size = rest - j * K
            else:
                token += rest
                rest = (first - token).to(gl.int32)
                j = 0
        elif BACK:
            token -= K
            size = K
            if j % PER == 0:
                here -= 1
            j -= 1
        else:
            token += size
            rest -= K
            j += 1
            if j % PER == 0:
                here += 1
        starts = closes
        if not BACK:
            size = gl.minimum(rest, K)
        if more:
            at = (here.to(gl.int64) * H) * Q + (j % PER) * K
            copy_tile(sources.index(1 - now), source + token * s_source, s_source, i, p, size)
            copy_tile(keyss.index(1 - now), keys + token * s_keys, s_keys, k, n, size)
            if OUT:
                copy_tile(readerss.index(1 - now), readers + token * s_readers, s_readers, k, n, size)
            async_copy.async_copy_global_to_shared(fades.index(1 - now), (logs if BACK else late) + at)
            if OUT:
                async_copy.async_copy_global_to_shared(rises.index(1 - now), (late if BACK else logs) + at)
            copy_edges(edges.index(1 - now), logs + at, j % PER > 0, not OUT, K, line)
        async_copy.commit_group()

        if OUT:
            # The outputs of the block before, whose way through shared memory has had time.
            gl.store(
                out + past * s_out + (i[:, None] * s_out + p[None, :]), outs.load(narrow), mask=past_mask
            )
        b_s = c.load(gl.SliceLayout(0, into_state))
        if BACK:
            weight = gl.exp2(b_s - before.load(gl.SliceLayout(0, into_state)))
        else:
            weight = gl.exp2(last.load(gl.SliceLayout(0, into_state)) - b_s)
        weighted = (X.permute((1, 0)).load(into_state).to(gl.float32) * weight[None, :]).to(gl.bfloat16)
        decay = last.load(gl.SliceLayout(1, by_state)) - before.load(gl.SliceLayout(1, by_state))
        if LEAVE:
            total += decay
        S = S * gl.exp2(decay)[:, None]
        if OUT:
            acc = warpgroup_mma(
                R, held.permute((1, 0)), gl.zeros([K, P], gl.float32, by_out), use_acc=False, is_async=True
            )
            moved = warpgroup_mma(weighted, Y, S, is_async=True)
            pair = warpgroup_mma_wait(2, deps=[pair])
            a_t = a.load(gl.SliceLayout(1, by_pair))
            b_s = c.load(gl.SliceLayout(0, by_pair))
            if BACK:
                pair = gl.where(
                    column[None, :] >= row[:, None], pair * gl.exp2(b_s[None, :] - a_t[:, None]), 0.0
                )
                scale = gl.exp2(last.load(gl.SliceLayout(1, by_out)) - a.load(gl.SliceLayout(1, by_out)))
            else:
                pair = gl.where(
                    row[:, None] >= column[None, :], pair * gl.exp2(a_t[:, None] - b_s[None, :]), 0.0
                )
                scale = gl.exp2(a.load(gl.SliceLayout(1, by_out)) - before.load(gl.SliceLayout(1, by_out)))
            mix = gl.convert_layout(pair.to(gl.bfloat16), into_out)
            acc = warpgroup_mma_wait(1, deps=[acc])
            acc = warpgroup_mma(mix, X, acc * scale[:, None], is_async=True)
            S, weighted = warpgroup_mma_wait(1, deps=[moved, weighted])
            # Past this, the products of all warps have read `held`, which the compiler does not ask.
            barrier()
        else:
            S, weighted = warpgroup_mma_wait(0, deps=[warpgroup_mma(weighted, Y, S, is_async=True), weighted])
        if HAS_FINAL:
            if closes:
                gl.store(final + (this.to(gl.int64) * H + h) * (P * N) + part, S)
        # Zero where a document ends, by a mask of bits: a branch would move the accumulator to other
        # registers and back, and a product with 0 would leave NaN.
        S = (S.to(gl.int32, bitcast=True) & stays).to(gl.float32, bitcast=True)
        if HAS_INITIAL:
            if closes & more:
                S = gl.load(initial + (d.to(gl.int64) * H + h) * (P * N) + part)
        if OUT or KEEP:
            if HAS_D and OUT:
                own = X.load(by_out)
            held.store(S.to(gl.bfloat16))
        if OUT:
            acc, mix = warpgroup_mma_wait(0, deps=[acc, mix])
            if HAS_D:
                acc += skip * own.to(gl.float32)
            outs.store(acc.to(gl.bfloat16))
    if OUT:
        barrier()
        past = token + size if BACK else token - past_size
        gl.store(
            out + past * s_out + (i[:, None] * s_out + p[None, :]),
            outs.load(narrow),
            mask=(i < past_size)[:, None] & (p >= 0)[None, :],
        )
    if LEAVE:
        gl.store(leave + (window.to(gl.int64) * H + h) * (P * N) + part, S)
        one = gl.arange(0, 1, gl.SliceLayout(1, by_state))
        gl.store(decays + window.to(gl.int64) * H + h + one, gl.where(entered, gl.exp2(total), 0.0))


@triton.jit
def join(enter, leave, decays, windows, H, size, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """Write the states that enter the windows, from what each window makes of a state of zero."""
    h = tl.program_id(1)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    carried = tl.zeros((BLOCK,), tl.float32)
    for s in range(windows - 1):
        w = tl.full((), s, tl.int64)
        if BACK:
            w = windows - 1 - w
        to = w - 1 if BACK else w + 1
        decay = tl.load(decays + w * H + h)
        left = tl.load(leave + (w * H + h) * size + e, mask=e < size, other=0.0)
        # What entered a window whose decay is 0 may never have been written.
        carried = left + tl.where(decay > 0, decay * carried, 0.0)
        tl.store(enter + (to * H + h) * size + e, carried, mask=e < size)


def window_length(heads: int) -> int:
    """Return W: shorter for few heads, which would leave multiprocessors idle.

    Not a matter of how many tokens there are, so that a document has the same bits in any company.
    """
    return 4096 if heads >= 64 else 2048 if heads >= 16 else 1024


def fits(shape: Shape, chunk: int, *tensors: Tensor) -> bool:
    """Return whether the pass takes these tensors (B, L, ..), as `triton.scan` has prepared them."""
    return (
        shape.dtype == torch.bfloat16
        and shape.P == 64
        and shape.N in (64, 128, 256)
        and chunk % BLOCK == 0
        and all(aligned(t) and t.stride(1) % 8 == 0 for t in tensors)
        and tuned.architecture(tensors[0].device) == "sm_90"
    )


def run(
    shape: Shape,
    at: Steps,
    source: Tensor,
    keys: Tensor,
    readers: Tensor | None,
    D: Tensor | None,
    doc_ids: Tensor | None,
    initial: Tensor | None,
    final: Tensor | None,
    *,
    back: bool,
    keep: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the outputs, when there are readers, and, to keep, the states (chunks, H, P, N), else empty.

    Forward of x, B and C, or back of d_y, C and B; `final` is written, and `out` if given.
    """
    chunks = at.chunks
    W = window_length(shape.heads)
    tokens = shape.batch * shape.length
    windows = triton.cdiv(tokens, W)
    size = shape.P * shape.N
    states = source.new_empty((chunks.n, shape.heads, shape.P, shape.N) if keep else 0)
    if out is None:
        out = source.new_empty(source.shape if readers is not None else 0)
    split = shape.length > W
    lead = (windows, shape.heads) if split else (0,)
    enter, leave = (source.new_empty(*lead, size, dtype=torch.float32) for _ in range(2))
    decays = source.new_empty(lead, dtype=torch.float32)
    ids = None if doc_ids is None else doc_ids.contiguous()

    def go(readers: Tensor | None, final: Tensor | None, keep: bool, leaves: bool) -> None:
        warps = 8 if shape.N > 128 and readers is not None else 4
        launch(
            one_pass,
            (windows * shape.heads,),
            source,
            keys,
            source if readers is None else readers,
            D,
            at.logs,
            at.late,
            out,
            states,
            enter,
            leave,
            decays,
            initial,
            final,
            ids,
            chunks.docs,
            tokens,
            chunks.n_docs,
            shape.length,
            chunks.per_row,
            shape.heads,
            shape.per_group,
            s_source=source.stride(1),
            s_keys=keys.stride(1),
            s_readers=0 if readers is None else readers.stride(1),
            s_out=shape.heads * shape.P if readers is None else out.stride(1),
            P=shape.P,
            N=shape.N,
            Q=chunks.size,
            K=BLOCK,
            W=W,
            BACK=back,
            OUT=readers is not None,
            KEEP=keep,
            LEAVE=leaves,
            HAS_D=D is not None and readers is not None,
            HAS_INITIAL=initial is not None,
            HAS_FINAL=final is not None,
            PACKED=chunks.packed,
            WARPS=warps,
            num_warps=warps,
            # Without outputs three programs fit a multiprocessor.
            **({"maxnreg": 168} if readers is None and shape.N <= 128 else {}),
        )

    if split:
        go(None, None, keep=False, leaves=True)
        launch(
            join,
            (triton.cdiv(size, 1024), shape.heads),
            enter,
            leave,
            decays,
            windows,
            shape.heads,
            size,
            BACK=back,
            BLOCK=1024,
        )
    go(readers, final, keep, leaves=False)
    return out, states
