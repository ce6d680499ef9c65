"""Back through a chunk: its pairs of tokens, its two states, and the sums over the heads of a group.

With g_st = (C_t . B_s) exp(l_t - l_s) for t >= s, dS the gradient of the state that leaves and
r_s = exp(l_Q - l_s): dx_s = dt_s (sum_t g_st dy_t + r_s dS B_s) + D dy_s. B and C are shared by the heads of a
group, so their gradients are sums over heads. The part that comes from pairs is
(sum over heads of exp(l_t - l_s) dt_s x_s . dy_t) times C or B: the bracket, Q by Q, is summed first, and
multiplied once. The part that comes from states is one long matrix product over heads and channels.

No sum is left to atomics: each program adds its run of heads in order and writes its share, and the shares
are added in order. How heads are cut into runs depends on the shape alone, and so do the bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmtrain.kernels.ssd.triton_chunks import place


@triton.jit
def pairs(
    x,
    dy,
    B,
    C,
    D,
    steps,
    logs,
    dstates,
    dx,
    dgram,
    direct,
    fed,
    sent,
    spans,
    dD,
    table,
    s_x,
    s_dy,
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
    """Go back from dy to BM tokens of one chunk as sources, for up to BH heads of one group.

    Writes dx (tokens, H, P), the share in dgram (chunks, G, runs, Q sources, Q readers), and what
    `steps_backward` reads: direct, fed, sent (chunks, H, Q), spans (chunks, H, blocks, Q), all natural logs.
    dD (chunks, blocks, H).
    """
    blocks = Q // BM
    runs = tl.cdiv(per_group, BH)
    pid = tl.program_id(0)
    m = pid % blocks
    run = (pid // blocks) % runs
    group = (pid // (blocks * runs)) % (H // per_group)
    c = pid // (blocks * H // per_group * runs)
    first, size = place(c, table, length, per_row, Q, PACKED)
    begin = group * per_group + run * BH
    end = begin + tl.minimum(BH, per_group - run * BH)
    if size <= 0:
        if HAS_D:
            for h in range(begin, end):
                tl.store(dD + (c.to(tl.int64) * blocks + m) * H + h, 0.0)
        return
    s = m * BM + tl.arange(0, BM)
    t = tl.arange(0, Q)
    n = tl.arange(0, BN)
    p = tl.arange(0, BP)
    own = (s < size)[:, None] & (p < P)[None, :]
    keys = tl.load(
        B + (first + s)[:, None] * s_B + group * N + n[None, :],
        mask=(s < size)[:, None] & (n < N)[None, :],
        other=0.0,
    ).to(OPERAND)
    read = tl.load(
        C + (first + t)[:, None] * s_C + group * N + n[None, :],
        mask=(t < size)[:, None] & (n < N)[None, :],
        other=0.0,
    ).to(OPERAND)
    # Rounded, for room in registers: it enters only sums that are rounded as much elsewhere.
    gram = tl.dot(keys, tl.trans(read), input_precision=PRECISION).to(OPERAND)  # (BM, Q)
    later = t[None, :] >= s[:, None]
    same = t[None, :] == s[:, None]
    bracket = tl.zeros((BM, Q), tl.float32)
    x_own = x + (first + s)[:, None] * s_x + p[None, :]
    dy_own = dy + (first + s)[:, None] * s_dy + p[None, :]
    dy_all = dy + (first + t)[:, None] * s_dy + p[None, :]
    for h in range(begin, end):
        head = c.to(tl.int64) * H + h
        log_t = tl.load(logs + head * Q + t)
        log_s = tl.load(logs + head * Q + s)
        step = tl.load(steps + head * Q + s)
        rest = tl.exp2(tl.load(logs + head * Q + Q - 1) - log_s)
        u = tl.load(x_own + h * P, mask=own, other=0.0)
        g = tl.load(dy_all + h * P, mask=(t < size)[:, None] & (p < P)[None, :], other=0.0).to(OPERAND)
        dstate = tl.load(
            dstates + head * P * N + p[:, None] * N + n[None, :],
            mask=(p < P)[:, None] & (n < N)[None, :],
            other=0.0,
        ).to(OPERAND)
        du = tl.dot(keys, tl.trans(dstate), input_precision=PRECISION) * rest[:, None]  # (BM, P)
        feeding = tl.sum(u.to(tl.float32) * du, 1)
        shares = tl.dot(u.to(OPERAND), tl.trans(g), input_precision=PRECISION)  # (BM, Q)
        if HAS_D:
            tl.store(dD + (c.to(tl.int64) * blocks + m) * H + h, tl.sum(tl.where(same, shares, 0.0)))
        decay = tl.exp2(tl.where(later, log_t[None, :] - log_s[:, None], float("-inf")))
        shares *= decay
        bracket += shares * step[:, None]
        mix = gram.to(tl.float32) * decay
        du = tl.dot(mix.to(OPERAND), g, du, input_precision=PRECISION)
        shares *= gram.to(tl.float32)
        every = tl.sum(shares, 1)
        shares = tl.where(same, 0.0, shares)
        tl.store(direct + head * Q + s, every + feeding)
        tl.store(fed + head * Q + s, feeding * step)
        tl.store(sent + head * Q + s, tl.sum(shares, 1) * step)
        tl.store(spans + (head * blocks + m) * Q + t, tl.sum(shares * step[:, None], 0))
        du *= step[:, None]
        if HAS_D:
            du += tl.load(D + h).to(tl.float32) * tl.load(dy_own + h * P, mask=own, other=0.0).to(tl.float32)
        out = dx + (first + s)[:, None] * (H * P) + h * P + p[None, :]
        tl.store(out, du.to(dx.dtype.element_ty), mask=own)
    share = ((c.to(tl.int64) * (H // per_group) + group) * runs + run) * Q * Q
    tl.store(dgram + share + s[:, None] * Q + t[None, :], bracket)


@triton.jit
def through_states(
    source,
    other,
    steps,
    logs,
    states,
    share,
    read,
    table,
    s_source,
    s_other,
    length,
    per_row,
    H,
    per_group,
    P,
    N,
    Q: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    READER: tl.constexpr,
    PACKED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum over up to BH heads, of one chunk and BN of its columns, the gradient that comes by states.

    As a source's: dB_s = sum of dt_s r_s dS^T x_s. As a READER's: dC_t = sum of exp(l_t) S^T dy_t, and read
    (chunks, H, pieces, Q), its inner product with C of each head. share (chunks, G, runs, Q, N).
    """
    runs = tl.cdiv(per_group, BH)
    pieces = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    piece = pid % pieces
    run = (pid // pieces) % runs
    group = (pid // (pieces * runs)) % (H // per_group)
    c = pid // (pieces * H // per_group * runs)
    first, size = place(c, table, length, per_row, Q, PACKED)
    if size <= 0:
        return
    t = tl.arange(0, Q)
    n = piece * BN + tl.arange(0, BN)
    p = tl.arange(0, BP)
    live = (t < size)[:, None]
    if READER:
        C = tl.load(
            other + (first + t)[:, None] * s_other + group * N + n[None, :],
            mask=live & (n < N)[None, :],
            other=0.0,
        ).to(OPERAND)
    acc = tl.zeros((Q, BN), tl.float32)
    begin = group * per_group + run * BH
    rows = source + (first + t)[:, None] * s_source + p[None, :]
    for h in range(begin, begin + tl.minimum(BH, per_group - run * BH)):
        head = c.to(tl.int64) * H + h
        log = tl.load(logs + head * Q + t)
        if READER:
            weight = tl.exp2(log)
        else:
            weight = tl.load(steps + head * Q + t) * tl.exp2(tl.load(logs + head * Q + Q - 1) - log)
        state = tl.load(
            states + head * P * N + p[:, None] * N + n[None, :],
            mask=(p < P)[:, None] & (n < N)[None, :],
            other=0.0,
        ).to(OPERAND)
        g = tl.load(rows + h * P, mask=live & (p < P)[None, :], other=0.0).to(tl.float32) * weight[:, None]
        if READER:
            seen = tl.dot(C, tl.trans(state), input_precision=PRECISION)  # (Q, P)
            tl.store(read + (head * pieces + piece) * Q + t, tl.sum(seen * g, 1))
        acc = tl.dot(g.to(OPERAND), state, acc, input_precision=PRECISION)
    at = ((c.to(tl.int64) * (H // per_group) + group) * runs + run) * Q
    tl.store(share + (at + t)[:, None] * N + n[None, :], acc, mask=(n < N)[None, :])


@triton.jit
def gather(
    dgram,
    other,
    share,
    out,
    table,
    s_other,
    length,
    per_row,
    groups,
    N,
    pair_runs,
    runs,
    Q: tl.constexpr,
    BN: tl.constexpr,
    READER: tl.constexpr,
    PACKED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the shares of all runs of heads and write dB (or, as READER, dC), (tokens, G, N)."""
    pid = tl.program_id(0)
    pieces = tl.cdiv(N, BN)
    piece = pid % pieces
    group = (pid // pieces) % groups
    c = pid // (pieces * groups)
    first, size = place(c, table, length, per_row, Q, PACKED)
    if size <= 0:
        return
    t = tl.arange(0, Q)
    u = tl.arange(0, Q)
    n = piece * BN + tl.arange(0, BN)
    chunk = c.to(tl.int64) * groups + group
    bracket = tl.zeros((Q, Q), tl.float32)
    for r in range(pair_runs):
        bracket += tl.load(dgram + (chunk * pair_runs + r) * Q * Q + t[:, None] * Q + u[None, :])
    if READER:
        bracket = tl.trans(bracket)
    acc = tl.zeros((Q, BN), tl.float32)
    for r in range(runs):
        at = (chunk * runs + r) * Q
        acc += tl.load(share + (at + t)[:, None] * N + n[None, :], mask=(n < N)[None, :], other=0.0)
    m = tl.load(
        other + (first + u)[:, None] * s_other + group * N + n[None, :],
        mask=(u < size)[:, None] & (n < N)[None, :],
        other=0.0,
    ).to(OPERAND)
    acc = tl.dot(bracket.to(OPERAND), m, acc, input_precision=PRECISION)
    to = out + (first + t)[:, None] * (groups * N) + group * N + n[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(t < size)[:, None] & (n < N)[None, :])
