"""The outputs of every chunk at once: the pairs of tokens inside it, and what it reads from its state.

y_t = exp(l_t) S C_t + sum over s <= t of (C_t . B_s) exp(l_t - l_s) dt_s x_s + D x_t. One program takes a
chunk and a run of heads that share B and C: their products are formed once, and each head costs two matrix
products, of its own decays with x and of C with its state.

A chunk is one block of tokens, or two. The pairs of a reader in the second with a source in the first decay by
exp(l_t - l_m) exp(l_m - l_s), m the last token of the first: a row factor and a column factor, no exponential
for each pair, and the row factor is the one with which the state's share is scaled as well. Both exponents
are negative, so nothing overflows, and what underflows is nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmtrain.kernels.ssd.triton_chunks import place


@triton.jit
def in_registers(a, k):
    """Return a (.., K), bf16, as the result of a product with the identity over k, exactly itself.

    The result of a product is a left operand of the next without a way through shared memory, whereas what
    was loaded stays there: 16 KiB of 227 that a third buffer for the loads ahead needs more.
    """
    eye = (k[:, None] == k[None, :]).to(a.dtype)
    return tl.dot(a, eye).to(a.dtype)


@triton.jit
def block_of(base, i, stride, columns, live, COLUMNS, TO: tl.constexpr):
    """Load rows i, `stride` elements apart, by columns, zero where not live, as matrix product operands."""
    mask = live[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(base + (i[:, None] * stride + columns[None, :]), mask=mask, other=0.0).to(TO)


@triton.jit
def outputs(
    x,
    B,
    C,
    D,
    logs,
    late,
    states,
    y,
    table,
    s_x,
    s_B,
    s_C,
    length,
    per_row,
    H,
    per_group,
    P,
    N,
    Q: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    HOLD: tl.constexpr,
    HAS_D: tl.constexpr,
    PACKED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write y (tokens, H, P) for one chunk and up to BH heads of one group."""
    TWO: tl.constexpr = Q == 2 * BM
    runs = tl.cdiv(per_group, BH)
    pid = tl.program_id(0)
    run = pid % runs
    group = (pid // runs) % (H // per_group)
    c = pid // (H // per_group * runs)
    first, size = place(c, table, length, per_row, Q, PACKED)
    if size <= 0:
        return
    i = tl.arange(0, BM)
    n = tl.arange(0, BN)
    p = tl.arange(0, BP)
    # Offsets inside a tile fit 32 bits; only where a tile begins takes 64.
    B += first * s_B + group * N
    C += first * s_C + group * N
    x += first * s_x
    y += first * (H * P)
    read = block_of(C, i, s_C, n, i < size, N, OPERAND)
    keys = block_of(B, i, s_B, n, i < size, N, OPERAND)
    past = i[:, None] >= i[None, :]
    # Rounded, for room in registers: so is its product with the decays.
    gram = tl.where(past, tl.dot(read, tl.trans(keys), input_precision=PRECISION), 0.0).to(OPERAND)
    if TWO:
        read_2 = block_of(C + BM * s_C, i, s_C, n, i < size - BM, N, OPERAND)
        across = tl.dot(read_2, tl.trans(keys), input_precision=PRECISION).to(OPERAND)
        keys = block_of(B + BM * s_B, i, s_B, n, i < size - BM, N, OPERAND)
        gram_2 = tl.dot(read_2, tl.trans(keys), input_precision=PRECISION)
        gram_2 = tl.where(past, gram_2, 0.0).to(OPERAND)
        if HOLD > 0:
            read_2 = in_registers(read_2, n)
    if HOLD > 1:
        read = in_registers(read, n)
    part = i[:, None] * s_x + p[None, :]
    to = i[:, None] * (H * P) + p[None, :]
    own = (i < size)[:, None] & (p < P)[None, :]
    own_2 = (i < size - BM)[:, None] & (p < P)[None, :]
    inside = (p < P)[:, None] & (n < N)[None, :]
    entry = p[:, None] * N + n[None, :]
    begin = group * per_group + run * BH
    for h in range(begin, begin + tl.minimum(BH, per_group - run * BH)):
        head = c.to(tl.int64) * H + h
        log = tl.load(logs + head * Q + i)
        here = tl.load(late + head * Q + i)
        state = tl.trans(tl.load(states + head * P * N + entry, mask=inside, other=0.0).to(OPERAND))  # (N, P)
        u = tl.load(x + h * P + part, mask=own, other=0.0)
        acc = tl.dot(read, state, input_precision=PRECISION) * tl.exp2(log)[:, None]  # (BM, P)
        # Clamped, since the source may come after the reader; there gram is 0, which infinity would spoil.
        decay = tl.exp2(tl.minimum(log[:, None] - here[None, :], 126.0))
        acc = tl.dot((gram.to(tl.float32) * decay).to(OPERAND), u.to(OPERAND), acc, input_precision=PRECISION)
        if HAS_D:
            skip = tl.load(D + h).to(tl.float32)
            acc += skip * u.to(tl.float32)
        tl.store(y + h * P + to, acc.to(y.dtype.element_ty), mask=own)
        if TWO:
            middle = tl.load(logs + head * Q + BM - 1)
            log = tl.load(logs + head * Q + BM + i)
            acc = tl.dot(read_2, state, input_precision=PRECISION) * tl.exp2(middle)
            mix = (across.to(tl.float32) * tl.exp2(middle - here)[None, :]).to(OPERAND)
            acc = tl.dot(mix, u.to(OPERAND), acc, input_precision=PRECISION)
            acc *= tl.exp2(log - middle)[:, None]
            here = tl.load(late + head * Q + BM + i)
            u = tl.load(x + BM * s_x + h * P + part, mask=own_2, other=0.0)
            decay = tl.exp2(tl.minimum(log[:, None] - here[None, :], 126.0))
            mix = (gram_2.to(tl.float32) * decay).to(OPERAND)
            acc = tl.dot(mix, u.to(OPERAND), acc, input_precision=PRECISION)
            if HAS_D:
                acc += skip * u.to(tl.float32)
            tl.store(y + BM * (H * P) + h * P + to, acc.to(y.dtype.element_ty), mask=own_2)
