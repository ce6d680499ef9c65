"""The state that enters each chunk, and going back the gradient of the state that leaves it.

One program walks the chunks of a document with its part of the state in registers, in fp32, and writes the
state down once a chunk, rounded to what the matrix units will read. Both directions are the same walk:
S <- decay S + (w x)^T B from the first chunk on, dS <- decay dS + (w dy)^T C from the last one back.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def walk(
    source,
    keys,
    steps,
    logs,
    states,
    others,
    enter,
    leave,
    through,
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
    N); starts from enter (n_docs, H, P, N), ends in leave. Going back, also writes through (chunks, H,
    pieces): the inner product of dS with others, the state that enters the chunk, times the chunk's decay.
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
    inside = (p < P)[:, None] & (n < N)[None, :]
    whole = P * N
    acc = tl.zeros((BP, BN), tl.float32)
    if HAS_ENTER:
        acc += tl.load(enter + (d.to(tl.int64) * H + h) * whole + part, mask=inside, other=0.0)
    source += h * P + p[None, :] + (first + q)[:, None] * s_source
    keys += (h // per_group) * N + n[None, :] + (first + q)[:, None] * s_keys
    for i in range(count):
        j = count - 1 - i if BACK else i
        c = chunk + j
        live = (q < size - j * Q)[:, None]
        rows = (c * H + h) * Q
        log = tl.load(logs + rows + q)
        end = tl.load(logs + rows + Q - 1)
        if BACK:
            weight = tl.exp2(log)
        else:
            weight = tl.load(steps + rows + q) * tl.exp2(end - log)
        if EVEN:
            s = tl.load(source + j.to(tl.int64) * Q * s_source)
            k = tl.load(keys + j.to(tl.int64) * Q * s_keys)
        else:
            s = tl.load(source + j.to(tl.int64) * Q * s_source, mask=live & (p < P)[None, :], other=0.0)
            k = tl.load(keys + j.to(tl.int64) * Q * s_keys, mask=live & (n < N)[None, :], other=0.0)
        place = (c * H + h) * whole + part
        decay = tl.exp2(end)
        if BACK:
            other = tl.load(others + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(through + (c * H + h) * pieces + piece, decay * tl.sum(acc * other))
        tl.store(states + place, acc.to(states.dtype.element_ty), mask=inside)
        weighted = (s.to(tl.float32) * weight[:, None]).to(OPERAND)
        acc = tl.dot(tl.trans(weighted), k.to(OPERAND), acc * decay, input_precision=PRECISION)
    if HAS_LEAVE:
        tl.store(leave + (d.to(tl.int64) * H + h) * whole + part, acc, mask=inside)
