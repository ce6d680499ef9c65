"""The state that enters each chunk, and going back the gradient of the state that leaves it.

One program walks the chunks of a document with its part of the state in registers, in fp32, and writes the
state down once a chunk, rounded to what the matrix units will read. Both directions are the same walk:
S <- decay S + (w x)^T B from the first chunk on, dS <- decay dS + (w dy)^T C from the last one back.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def edges(logs, chunk, h, block, H, Q: tl.constexpr, BK: tl.constexpr, live):
    """Return the running log decays before and at the end of a block of BK tokens, counted from a chunk on."""
    at = logs + ((chunk + block // (Q // BK)) * H + h) * Q + (block % (Q // BK)) * BK
    begin = tl.load(at - 1, mask=live & (block % (Q // BK) > 0), other=0.0)
    return begin, tl.load(at + BK - 1, mask=live, other=0.0)


@triton.jit
def walk(
    source,
    keys,
    logs,
    late,
    states,
    enter,
    leave,
    docs,
    s_source,
    s_keys,
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
    BACK: tl.constexpr,
    PACKED: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_ENTER: tl.constexpr,
    HAS_LEAVE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk the chunks of one document: a (BP, BN) part of the state of one head.

    source (tokens, H, P) is x, or dy going back; keys (tokens, G, N) is B, or C. Writes states (chunks, H, P,
    N); starts from enter (n_docs, H, P, N), ends in leave. Takes BK tokens at a time.
    """
    pid = tl.program_id(0)
    pieces_n = tl.cdiv(N, BN)
    pieces = tl.cdiv(P, BP) * pieces_n
    piece = pid % pieces
    h = (pid // pieces) % H
    d = pid // (pieces * H)
    p = (piece // pieces_n) * BP + tl.arange(0, BP)
    n = (piece % pieces_n) * BN + tl.arange(0, BN)
    q = tl.arange(0, Q)
    if PACKED:
        first = tl.load(docs + 2 * d)
        chunk = tl.load(docs + 2 * d + 1)
        size = (tl.load(docs + 2 * d + 2) - first).to(tl.int32)
    else:
        first = d.to(tl.int64) * length
        chunk = d.to(tl.int64) * per_row
        size = length
    count = tl.cdiv(size, Q)
    part = p[:, None] * N + n[None, :]
    within = (p < P)[:, None] & (n < N)[None, :]
    whole = P * N
    acc = tl.zeros((BP, BN), tl.float32)
    if HAS_ENTER:
        acc += tl.load(enter + (d.to(tl.int64) * H + h) * whole + part, mask=within, other=0.0)
    k = tl.arange(0, BK)
    BLOCKS: tl.constexpr = Q // BK
    source += h * P + first * s_source
    keys += (h // per_group) * N + first * s_keys
    part_source = k[:, None] * s_source + p[None, :]
    part_keys = k[:, None] * s_keys + n[None, :]
    # The scalars of a block are loaded while the block before it is worked on.
    begin, end = edges(logs, chunk, h, count * BLOCKS - 1 if BACK else 0, H, Q, BK, size > 0)
    for i in range(count * BLOCKS):
        block = count * BLOCKS - 1 - i if BACK else i
        ahead = block - 1 if BACK else block + 1
        inside = (ahead >= 0) & (ahead < count * BLOCKS)
        next_begin, next_end = edges(logs, chunk, h, ahead, H, Q, BK, inside)
        c = chunk + block // BLOCKS
        b = block % BLOCKS
        rows = (c * H + h) * Q + b * BK
        edge = (b == BLOCKS - 1) if BACK else (b == 0)
        place = (c * H + h) * whole + part
        live = (k < size - block * BK)[:, None]
        if BACK:
            weight = tl.exp2(tl.load(logs + rows + k) - begin)
        else:
            weight = tl.exp2(end - tl.load(late + rows + k))
        shift = block.to(tl.int64) * BK
        if EVEN:
            s = tl.load(source + shift * s_source + part_source)
            m = tl.load(keys + shift * s_keys + part_keys)
        else:
            s = tl.load(source + shift * s_source + part_source, mask=live & (p < P)[None, :], other=0.0)
            m = tl.load(keys + shift * s_keys + part_keys, mask=live & (n < N)[None, :], other=0.0)
        weighted = (s.to(tl.float32) * weight[:, None]).to(OPERAND)
        if edge:
            tl.store(states + place, acc.to(states.dtype.element_ty), mask=within)
        acc = tl.dot(tl.trans(weighted), m.to(OPERAND), acc * tl.exp2(end - begin), input_precision=PRECISION)
        begin, end = next_begin, next_end
    if HAS_LEAVE:
        tl.store(leave + (d.to(tl.int64) * H + h) * whole + part, acc, mask=within)
