"""The outputs of every chunk at once: the pairs of tokens inside it, and what it reads from its state.

y_t = exp(l_t) S C_t + sum over s <= t of (C_t . B_s) exp(l_t - l_s) dt_s x_s + D x_t. One program takes a
block of a chunk's tokens and a run of heads that share B and C: their products are formed once, and each head
costs two matrix products, of its own decays with x and of C with its state.

A chunk is one block of tokens, or two. The pairs of a reader in the second with a source in the first decay
by exp(l_t - l_m) exp(l_m - l_s), m the last token of the first: a row factor and a column factor, no
exponential for each pair, and the row factor is the one with which the state's share is scaled as well. Both
exponents are negative, so nothing overflows, and what underflows is nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmtrain.kernels.ssd.triton_chunks import ANY_SIZE, place, share_of

SUM = tl.constexpr(32)
"""Products that the matrix units add up by themselves where results are fp32's."""


@triton.jit
def in_registers(a, k):
    """Return a (.., K), bf16, as the result of a product with the identity over k, exactly itself.

    The result of a product is a left operand of the next without a way through shared memory, whereas what
    was loaded stays there: 16 KiB of 227 that a third buffer for the loads ahead needs more.
    """
    eye = tl.where(k[:, None] == k[None, :], 1.0, 0.0).to(a.dtype)
    return tl.dot(a, eye).to(a.dtype)


@triton.jit
def summed_apart(a, b, PRECISION: tl.constexpr):
    """Return the product of a (M, K) and b (K, N), which is not taken as the beginning of another's sums.

    A limit to inexact sums, which binds FP8 only, keeps it apart: the compiler would add the next product up
    inside this one.
    """
    return tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1])


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Return the matrix product of a (M, K) and b (K, N), in fp32.

    The matrix units cut sums off rather than round them, at each addition of 8 or 16 products: over 128 the
    error grows to several times that of fp32. Where that counts, `SUM` products are added up at a time.
    """
    if PRECISION == "tf32":
        total = tl.dot(a, b, input_precision=PRECISION)
    elif a.shape[1] <= SUM:
        total = summed_apart(a, b, PRECISION)
    else:
        a, more_a = _halves(a)
        b, more_b = _halves(tl.trans(b))
        total = product(a, tl.trans(b), PRECISION) + product(more_a, tl.trans(more_b), PRECISION)
    return total


@triton.jit
def _halves(a):
    """Cut a (M, K) in its even and its odd columns, each (M, K / 2): neighbours are in one thread."""
    return tl.split(tl.reshape(a, (a.shape[0], a.shape[1] // 2, 2)))


@triton.jit
def block_of(base, i, stride, columns, live, COLUMNS, TO: tl.constexpr):
    """Load rows i, `stride` elements apart, by columns, zero where not live, as matrix product operands."""
    mask = live[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(base + (i[:, None] * stride + columns[None, :]), mask=mask, other=0.0).to(TO)


@triton.jit(do_not_specialize=ANY_SIZE)
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
    SPLIT: tl.constexpr,
    HOLD: tl.constexpr,
    HAS_D: tl.constexpr,
    PACKED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write y (tokens, H, P) for BM tokens of one chunk and up to BH heads of one group."""
    BLOCKS: tl.constexpr = Q // BM
    pid = tl.program_id(0)
    p = tl.arange(0, BP)
    if SPLIT:
        p += (pid % tl.cdiv(P, BP)) * BP
        pid = pid // tl.cdiv(P, BP)
    m, _, group, begin, end, c = share_of(pid, BLOCKS, H, per_group, BH)
    first, size = place(c, table, length, per_row, Q, PACKED)
    if m * BM >= size:
        return
    i = tl.arange(0, BM)
    n = tl.arange(0, BN)
    start = first + m * BM
    # Offsets inside a tile fit 32 bits; only where a tile begins takes 64.
    B += start * s_B + group * N
    C += start * s_C + group * N
    x += start * s_x
    y += start * (H * P)
    read = block_of(C, i, s_C, n, m * BM + i < size, N, OPERAND)
    keys = block_of(B, i, s_B, n, m * BM + i < size, N, OPERAND)
    past = i[:, None] >= i[None, :]
    # Rounded, for room in registers: so is its product with the decays.
    gram = tl.where(past, product(read, tl.trans(keys), PRECISION), 0.0).to(OPERAND)
    if BLOCKS == 2:
        second = (i >= 0) & (m > 0)
        keys = block_of(B - BM * s_B, i, s_B, n, second, N, OPERAND)
        across = product(read, tl.trans(keys), PRECISION).to(OPERAND)
    if HOLD:
        read = in_registers(read, n)
    part = i[:, None] * s_x + p[None, :]
    to = i[:, None] * (H * P) + p[None, :]
    own = (m * BM + i < size)[:, None] & (p < P)[None, :]
    inside = (p < P)[:, None] & (n < N)[None, :]
    entry = p[:, None] * N + n[None, :]
    for h in range(begin, end):
        head = c.to(tl.int64) * H + h
        rows = head * Q + m * BM
        log = tl.load(logs + rows + i)
        if HAS_D:
            skip = tl.load(D + h).to(tl.float32)
        here = tl.load(late + rows + i)
        state = tl.load(states + head * P * N + entry, mask=inside, other=0.0).to(OPERAND)
        u = tl.load(x + h * P + part, mask=own, other=0.0)
        acc = product(read, tl.trans(state), PRECISION)  # (BM, P)
        if BLOCKS == 2:
            before = tl.load(
                x - BM * s_x + h * P + part, mask=second[:, None] & (p < P)[None, :], other=0.0
            ).to(OPERAND)
            middle = tl.load(logs + rows - 1, mask=m > 0, other=0.0)
            there = tl.load(late + rows - BM + i, mask=second, other=float("inf"))
            mix = (across.to(tl.float32) * tl.exp2(middle - there)[None, :]).to(OPERAND)
            acc = tl.dot(mix, before, acc * tl.exp2(middle), input_precision=PRECISION)
            acc *= tl.exp2(log - middle)[:, None]
        else:
            acc *= tl.exp2(log)[:, None]
        # Clamped, since the source may come after the reader; there gram is 0, which infinity would spoil.
        decay = tl.exp2(tl.minimum(log[:, None] - here[None, :], 126.0))
        acc = tl.dot((gram.to(tl.float32) * decay).to(OPERAND), u.to(OPERAND), acc, input_precision=PRECISION)
        if HAS_D:
            acc += skip * u.to(tl.float32)
        tl.store(y + h * P + to, acc.to(y.dtype.element_ty), mask=own)
