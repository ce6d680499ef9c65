"""The outputs of every chunk at once: the pairs of tokens inside it, and what it reads from its state.

y_t = exp(l_t) S C_t + sum over s <= t of (C_t . B_s) exp(l_t - l_s) dt_s x_s + D x_t. One program takes a
block of a chunk's tokens and a run of heads that share B and C: their products are formed once, and each
head costs two matrix products, of its own decays with x and of C with its state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmtrain.kernels.ssd.triton_chunks import place


@triton.jit
def outputs(
    x,
    B,
    C,
    D,
    steps,
    logs,
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
    HAS_D: tl.constexpr,
    PACKED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write y (tokens, H, P) for BM tokens of one chunk and up to BH heads of one group."""
    blocks = Q // BM
    runs = tl.cdiv(per_group, BH)
    pid = tl.program_id(0)
    m = pid % blocks
    run = (pid // blocks) % runs
    group = (pid // (blocks * runs)) % (H // per_group)
    c = pid // (blocks * H // per_group * runs)
    first, size = place(c, table, length, per_row, Q, PACKED)
    if m * BM >= size:
        return
    t = m * BM + tl.arange(0, BM)
    s = tl.arange(0, Q)
    n = tl.arange(0, BN)
    p = tl.arange(0, BP)
    read = tl.load(
        C + (first + t)[:, None] * s_C + group * N + n[None, :],
        mask=(t < size)[:, None] & (n < N)[None, :],
        other=0.0,
    ).to(OPERAND)
    keys = tl.load(
        B + (first + s)[:, None] * s_B + group * N + n[None, :],
        mask=(s < size)[:, None] & (n < N)[None, :],
        other=0.0,
    ).to(OPERAND)
    gram = tl.dot(read, tl.trans(keys), input_precision=PRECISION)  # (BM, Q)
    past = t[:, None] >= s[None, :]
    x_all = x + (first + s)[:, None] * s_x + p[None, :]
    x_own = x + (first + t)[:, None] * s_x + p[None, :]
    own = (t < size)[:, None] & (p < P)[None, :]
    begin = group * per_group + run * BH
    for h in range(begin, begin + tl.minimum(BH, per_group - run * BH)):
        rows = (c.to(tl.int64) * H + h) * Q
        log_t = tl.load(logs + rows + t)
        log_s = tl.load(logs + rows + s)
        step = tl.load(steps + rows + s)
        state = tl.load(
            states + (c.to(tl.int64) * H + h) * P * N + p[:, None] * N + n[None, :],
            mask=(p < P)[:, None] & (n < N)[None, :],
            other=0.0,
        ).to(OPERAND)
        u = tl.load(x_all + h * P, mask=(s < size)[:, None] & (p < P)[None, :], other=0.0)
        acc = tl.dot(read, tl.trans(state), input_precision=PRECISION) * tl.exp2(log_t)[:, None]
        # The mask goes into the exponent: where s > t the difference is positive and may overflow.
        decay = tl.exp2(tl.where(past, log_t[:, None] - log_s[None, :], float("-inf")))
        mix = (gram * decay * step[None, :]).to(OPERAND)
        acc = tl.dot(mix, u.to(OPERAND), acc, input_precision=PRECISION)
        if HAS_D:
            acc += tl.load(D + h).to(tl.float32) * tl.load(x_own + h * P, mask=own, other=0.0).to(tl.float32)
        out = y + (first + t)[:, None] * (H * P) + h * P + p[None, :]
        tl.store(out, acc.to(y.dtype.element_ty), mask=own)
