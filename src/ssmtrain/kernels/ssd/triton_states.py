"""The state that enters each chunk, and going back the gradient of the state that leaves it.

One program walks the chunks of a document with its part of the state in registers, in fp32, and writes the
state down once a chunk, rounded to what the matrix units will read. Both directions are the same walk:
S <- decay S + (w x)^T B from the first chunk on, dS <- decay dS + (w dy)^T C from the last one back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmtrain.kernels.ssd.triton_chunks import ANY_SIZE


@triton.jit
def edges(logs, chunk, h, block, H, Q: tl.constexpr, BK: tl.constexpr, live):
    """Return the running log decays before and at the end of a block of BK tokens, counted from a chunk."""
    at = logs + ((chunk + block // (Q // BK)) * H + h) * Q + (block % (Q // BK)) * BK
    begin = tl.load(at - 1, mask=live & (block % (Q // BK) > 0), other=0.0)
    return begin, tl.load(at + BK - 1, mask=live, other=0.0)


@triton.jit(do_not_specialize=ANY_SIZE)
def walk(
    x,
    B,
    dy,
    C,
    logs,
    late,
    states,
    dstates,
    initial,
    final,
    dfinal,
    dinitial,
    docs,
    s_x,
    s_B,
    s_dy,
    s_C,
    length,
    per_row,
    H,
    per_group,
    P,
    N,
    Q: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    PACKED: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk the chunks of one document, BK tokens at a time: a (BP, BN) part of the state of one head.

    Programs with second index 0 go forward and write states (chunks, H, P, N), those that enter; those with 1
    go back and write dstates, gradients of those that leave. One launch holds both, so that no multiprocessor
    waits for the last walks of one direction before the other begins.
    """
    pid = tl.program_id(0)
    back = tl.program_id(1) == 1
    pieces_n = tl.cdiv(N, BN)
    pieces = tl.cdiv(P, BP) * pieces_n
    piece = pid % pieces
    h = (pid // pieces) % H
    d = pid // (pieces * H)
    p = (piece // pieces_n) * BP + tl.arange(0, BP)
    n = (piece % pieces_n) * BN + tl.arange(0, BN)
    if PACKED:
        first = tl.load(docs + 3 * d)
        chunk = tl.load(docs + 3 * d + 1)
        size = (tl.load(docs + 3 * d + 3) - first).to(tl.int32)
    else:
        first = d.to(tl.int64) * length
        chunk = d.to(tl.int64) * per_row
        size = length
    if back:
        source, keys, out, decays, s_source, s_keys = dy, C, dstates, logs, s_dy, s_C
    else:
        source, keys, out, decays, s_source, s_keys = x, B, states, late, s_x, s_B
    BLOCKS: tl.constexpr = Q // BK
    blocks = tl.cdiv(size, Q) * BLOCKS
    part = p[:, None] * N + n[None, :]
    within = (p < P)[:, None] & (n < N)[None, :]
    whole = P * N
    ends = (d.to(tl.int64) * H + h) * whole + part
    acc = tl.zeros((BP, BN), tl.float32)
    if HAS_INITIAL:
        acc += tl.load(initial + ends, mask=within & (pid >= 0) & (not back), other=0.0)
    if HAS_DFINAL:
        acc += tl.load(dfinal + ends, mask=within & back, other=0.0)
    k = tl.arange(0, BK)
    source += h * P + first * s_source
    keys += (h // per_group) * N + first * s_keys
    part_source = k[:, None] * s_source + p[None, :]
    part_keys = k[:, None] * s_keys + n[None, :]
    # The scalars of a block are loaded while the block before it is worked on.
    begin, end = edges(logs, chunk, h, tl.where(back, blocks - 1, 0), H, Q, BK, size > 0)
    for i in range(blocks):
        block = tl.where(back, blocks - 1 - i, i)
        ahead = tl.where(back, block - 1, block + 1)
        next_begin, next_end = edges(logs, chunk, h, ahead, H, Q, BK, (ahead >= 0) & (ahead < blocks))
        c = chunk + block // BLOCKS
        b = block % BLOCKS
        decay = tl.load(decays + (c * H + h) * Q + b * BK + k)
        weight = tl.exp2(tl.where(back, decay - begin, end - decay))
        shift = block.to(tl.int64) * BK
        if EVEN:
            s = tl.load(source + shift * s_source + part_source)
            m = tl.load(keys + shift * s_keys + part_keys)
        else:
            live = (k < size - block * BK)[:, None]
            s = tl.load(source + shift * s_source + part_source, mask=live & (p < P)[None, :], other=0.0)
            m = tl.load(keys + shift * s_keys + part_keys, mask=live & (n < N)[None, :], other=0.0)
        if b == tl.where(back, BLOCKS - 1, 0):
            tl.store(out + (c * H + h) * whole + part, acc.to(out.dtype.element_ty), mask=within)
        weighted = (s.to(tl.float32) * weight[:, None]).to(OPERAND)
        acc = tl.dot(tl.trans(weighted), m.to(OPERAND), acc * tl.exp2(end - begin), input_precision=PRECISION)
        begin, end = next_begin, next_end
    if HAS_FINAL:
        tl.store(final + ends, acc, mask=within & (not back))
    if HAS_INITIAL:
        tl.store(dinitial + ends, acc, mask=within & back)
