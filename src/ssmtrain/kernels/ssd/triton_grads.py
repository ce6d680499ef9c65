"""Back through a chunk: its pairs of tokens, its two states, and the sums over the heads of a group.

With g_st = (C_t . B_s) exp(l_t - l_s) for t >= s, dS the gradient of the state that leaves and
r_s = exp(l_Q - l_s): dx_s = dt_s (sum_t g_st dy_t + r_s dS B_s) + D dy_s. B and C are shared by the heads of
a group, so their gradients are sums over heads. The part that comes from pairs is
(sum over heads of exp(l_t - l_s) dt_s x_s . dy_t) times C or B: the bracket, Q by Q, is summed first, and
multiplied once. The part that comes from states is one long matrix product over heads and channels.

No sum is left to atomics: each program adds its run of heads in order and writes its share, and the shares
are added in order. How heads are cut into runs depends on the shape alone, and so do the bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmtrain.kernels.ssd.triton_chunks import ANY_SIZE, place, share_of
from ssmtrain.kernels.ssd.triton_outputs import SUM, block_of, in_registers, product, summed_apart


@triton.jit(do_not_specialize=ANY_SIZE)
def sources(
    dy,
    B,
    C,
    D,
    steps,
    logs,
    dstates,
    dx,
    table,
    s_dy,
    s_B,
    s_C,
    s_dx,
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
    """Write dx (tokens, H, P) for BM tokens of one chunk and up to BH heads of one group.

    The outputs' way backwards: what later tokens of the chunk, and the state that leaves, make of x.
    """
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
    B += start * s_B + group * N
    C += start * s_C + group * N
    dy += start * s_dy
    dx += start * s_dx
    keys = block_of(B, i, s_B, n, m * BM + i < size, N, OPERAND)
    read = block_of(C, i, s_C, n, m * BM + i < size, N, OPERAND)
    later = i[None, :] >= i[:, None]
    gram = tl.where(later, product(keys, tl.trans(read), PRECISION), 0.0).to(OPERAND)
    if BLOCKS == 2:
        following = (m + 1) * BM + i < tl.where(m == 0, size, 0)
        read = block_of(C + BM * s_C, i, s_C, n, following, N, OPERAND)
        across = product(keys, tl.trans(read), PRECISION).to(OPERAND)
    if HOLD:
        keys = in_registers(keys, n)
    part = i[:, None] * s_dy + p[None, :]
    to = i[:, None] * s_dx + p[None, :]
    own = (m * BM + i < size)[:, None] & (p < P)[None, :]
    inside = (p < P)[:, None] & (n < N)[None, :]
    entry = p[:, None] * N + n[None, :]
    for h in range(begin, end):
        head = c.to(tl.int64) * H + h
        rows = head * Q + m * BM
        log = tl.load(logs + rows + i)
        step = tl.load(steps + rows + i)
        last = tl.load(logs + head * Q + Q - 1)
        if HAS_D:
            skip = tl.load(D + h).to(tl.float32)
        dstate = tl.load(dstates + head * P * N + entry, mask=inside, other=0.0).to(OPERAND)
        g = tl.load(dy + h * P + part, mask=own, other=0.0)
        du = product(keys, tl.trans(dstate), PRECISION)  # (BM, P)
        if BLOCKS == 2:
            middle = tl.load(logs + rows + BM - 1)
            column = tl.load(logs + rows + BM + i, mask=(i >= 0) & (m == 0), other=float("-inf"))
            after = tl.load(
                dy + BM * s_dy + h * P + part, mask=following[:, None] & (p < P)[None, :], other=0.0
            ).to(OPERAND)
            mix = (across.to(tl.float32) * tl.exp2(column - middle)[None, :]).to(OPERAND)
            du = tl.dot(mix, after, du * tl.exp2(last - middle), input_precision=PRECISION)
            du *= tl.exp2(middle - log)[:, None]
        else:
            du *= tl.exp2(last - log)[:, None]
        # Clamped, since the reader may come before the source; there gram is 0, which infinity would spoil.
        decay = tl.exp2(tl.minimum(log[None, :] - log[:, None], 0.0))
        du = tl.dot((gram.to(tl.float32) * decay).to(OPERAND), g.to(OPERAND), du, input_precision=PRECISION)
        du *= step[:, None]
        if HAS_D:
            du += skip * g.to(tl.float32)
        tl.store(dx + h * P + to, du.to(dx.dtype.element_ty), mask=own)


@triton.jit
def add_2(a, b, c, d):
    """Add pairs."""
    return a + c, b + d


@triton.jit
def add_4(a, b, c, d, e, f, g, h):
    """Add quadruples."""
    return a + e, b + f, c + g, d + h


@triton.jit(do_not_specialize=ANY_SIZE)
def pairs(
    x,
    dy,
    B,
    C,
    steps,
    logs,
    dgram,
    direct,
    spans,
    skips,
    selves,
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
    PACKED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Go back through the pairs of tokens of one chunk, for up to BH heads of one group.

    Writes the share in dgram (chunks, G, runs, Q sources, Q readers), as an operand of `through_states`, and
    what `steps_backward` reads: direct and spans (chunks, H, Q), which leave out a token's pair with itself,
    and the two factors of that, skips (chunks, H, Q), x . dy, and selves (chunks, G, Q), C . B.
    """
    TWO: tl.constexpr = Q == 2 * BM
    runs = tl.cdiv(per_group, BH)
    _, run, group, begin, end, c = share_of(tl.program_id(0), 1, H, per_group, BH)
    first, size = place(c, table, length, per_row, Q, PACKED)
    if size <= 0:
        return
    i = tl.arange(0, BM)
    n = tl.arange(0, BN)
    p = tl.arange(0, BP)
    B += first * s_B + group * N
    C += first * s_C + group * N
    x += first * s_x
    dy += first * s_dy
    keys = block_of(B, i, s_B, n, i < size, N, OPERAND)
    read = block_of(C, i, s_C, n, i < size, N, OPERAND)
    later = i[None, :] >= i[:, None]
    same = i[:, None] == i[None, :]
    # Rounded, for room in registers: source and reader of a pair see the same, and what cancels cancels.
    gram = product(keys, tl.trans(read), PRECISION)
    own_pairs = selves + (c.to(tl.int64) * (H // per_group) + group) * Q + i
    tl.store(own_pairs, tl.sum(tl.where(same, gram, 0.0), 1))  # the same bits from each run of heads
    gram = tl.where(later & (i[:, None] != i[None, :]), gram, 0.0).to(OPERAND)
    bracket = tl.zeros((BM, BM), tl.float32)  # (sources, readers)
    if TWO:
        read = block_of(C + BM * s_C, i, s_C, n, i < size - BM, N, OPERAND)
        across = product(keys, tl.trans(read), PRECISION).to(OPERAND)
        keys = block_of(B + BM * s_B, i, s_B, n, i < size - BM, N, OPERAND)
        gram_2 = product(keys, tl.trans(read), PRECISION)
        tl.store(own_pairs + BM, tl.sum(tl.where(same, gram_2, 0.0), 1))
        gram_2 = tl.where(later & (i[:, None] != i[None, :]), gram_2, 0.0).to(OPERAND)
        bracket_2 = tl.zeros((BM, BM), tl.float32)
        beyond = tl.zeros((BM, BM), tl.float32)
    part_x = i[:, None] * s_x + p[None, :]
    part_dy = i[:, None] * s_dy + p[None, :]
    own = (i < size)[:, None] & (p < P)[None, :]
    own_2 = (i < size - BM)[:, None] & (p < P)[None, :]
    # A head's decays are loaded a head ahead, down the rows and along the columns of a tile apart: what is
    # not an operand of a product Triton does not prefetch by itself.
    final = (c.to(tl.int64) * H + end - 1) * Q
    rows = (c.to(tl.int64) * H + begin) * Q
    down, along = i[:, None], i[None, :]
    log = tl.load(logs + rows + down)
    step = tl.load(steps + rows + down)
    to = tl.load(logs + rows + along)
    if TWO:
        log_2 = tl.load(logs + rows + BM + down)
        step_2 = tl.load(steps + rows + BM + down)
        to_2 = tl.load(logs + rows + BM + along)
        middle = tl.load(logs + rows + BM - 1)
    for h in range(begin, end):
        ahead = tl.minimum(rows + Q, final)
        next_log = tl.load(logs + ahead + down)
        next_step = tl.load(steps + ahead + down)
        next_to = tl.load(logs + ahead + along)
        u = tl.load(x + h * P + part_x, mask=own, other=0.0).to(OPERAND)
        g = tl.load(dy + h * P + part_dy, mask=own, other=0.0).to(OPERAND)
        near = product(u, tl.trans(g), PRECISION)  # (BM, BM)
        itself = tl.where(same, near, 0.0)
        # Clamped, since the reader may come before the source; there gram is 0, and bracket is not used.
        near *= tl.exp2(tl.minimum(to - log, 0.0))
        bracket += near * step
        near *= gram.to(tl.float32)
        if TWO:
            next_log_2 = tl.load(logs + ahead + BM + down)
            next_step_2 = tl.load(steps + ahead + BM + down)
            next_to_2 = tl.load(logs + ahead + BM + along)
            next_middle = tl.load(logs + ahead + BM - 1)
            g = tl.load(dy + BM * s_dy + h * P + part_dy, mask=own_2, other=0.0).to(OPERAND)
            far = product(u, tl.trans(g), PRECISION)
            far *= tl.exp2(middle - log) * tl.exp2(to_2 - middle)
            beyond += far * step
            far *= across.to(tl.float32)
            u = tl.load(x + BM * s_x + h * P + part_x, mask=own_2, other=0.0).to(OPERAND)
            near_2 = product(u, tl.trans(g), PRECISION)
            itself_2 = tl.where(same, near_2, 0.0)
            near_2 *= tl.exp2(tl.minimum(to_2 - log_2, 0.0))
            bracket_2 += near_2 * step_2
            near_2 *= gram_2.to(tl.float32)
            # Sums in one go wait for each other's warps once.
            every, skip, every_2, skip_2 = tl.reduce((near + far, itself, near_2, itself_2), 1, add_4)
            heard, heard_2 = tl.reduce((near * step, near_2 * step_2 + far * step), 0, add_2)
            tl.store(direct + rows + BM + i, every_2)
            tl.store(spans + rows + BM + i, heard_2)
            tl.store(skips + rows + BM + i, skip_2)
            log_2, step_2, to_2, middle = next_log_2, next_step_2, next_to_2, next_middle
        else:
            every, skip = tl.reduce((near, itself), 1, add_2)
            heard = tl.sum(near * step, 0)
        tl.store(direct + rows + i, every)
        tl.store(spans + rows + i, heard)
        tl.store(skips + rows + i, skip)
        rows = ahead
        log, step, to = next_log, next_step, next_to
    share = dgram + ((c.to(tl.int64) * (H // per_group) + group) * runs + run) * Q * Q
    share += i[:, None] * Q + i[None, :]
    tl.store(share, tl.where(later, bracket, 0.0).to(OPERAND))
    if TWO:
        tl.store(share + BM, beyond.to(OPERAND))
        tl.store(share + BM * Q, tl.zeros((BM, BM), OPERAND))
        tl.store(share + BM * Q + BM, tl.where(later, bracket_2, 0.0).to(OPERAND))


@triton.jit(do_not_specialize=ANY_SIZE)
def through_states(
    source,
    other,
    partner,
    dgram,
    steps,
    decays,
    states,
    others,
    out,
    products,
    passed,
    table,
    s_source,
    s_other,
    s_partner,
    s_out,
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
    WHOLE: tl.constexpr,
    PACKED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum over up to BH heads, of one chunk and BN of its columns, the gradient of C or B: out.

    As a READER's: dC_t = sum over heads of exp(l_t) S^T dy_t, and products (chunks, H, pieces, Q), its
    product with C. As a source's: dB_s = sum of dt_s r_s dS^T x_s, its product with B, without dt_s, and
    passed (chunks, H, pieces), the inner product of dS with others, the states that enter. decays are logs or
    rests. Both begin with what the pairs of the same heads, dgram, make of their partners, B or C. out is the
    gradient itself (tokens, G, N) when the run of heads is the WHOLE group, else shares (chunks, G, runs, Q,
    N).
    """
    runs = tl.cdiv(per_group, BH)
    pieces = tl.cdiv(N, BN)
    piece, run, group, begin, end, c = share_of(tl.program_id(0), pieces, H, per_group, BH)
    first, size = place(c, table, length, per_row, Q, PACKED)
    if size <= 0:
        return
    t = tl.arange(0, Q)
    n = piece * BN + tl.arange(0, BN)
    p = tl.arange(0, BP)
    live = (t < size)[:, None]
    SLICE: tl.constexpr = min(BP, SUM)
    share = (c.to(tl.int64) * (H // per_group) + group) * runs + run
    bracket = tl.load(dgram + share * Q * Q + (t[:, None] * Q + t[None, :]))  # (sources, readers)
    if READER:
        bracket = tl.trans(bracket)
    mate = block_of(partner + first * s_partner + group * N, t, s_partner, n, t < size, N, OPERAND)
    acc = tl.dot(bracket, mate, input_precision=PRECISION)
    mate = block_of(other + first * s_other + group * N, t, s_other, n, t < size, N, OPERAND)
    source += first * s_source
    part = t[:, None] * s_source + p[None, :]
    for h in range(begin, end):
        head = c.to(tl.int64) * H + h
        at = head * P * N + p[:, None] * N + n[None, :]
        inside = (p < P)[:, None] & (n < N)[None, :]
        if PRECISION == "tf32":
            state = tl.load(states + at, mask=inside, other=0.0).to(OPERAND)
            g = tl.load(source + h * P + part, mask=live & (p < P)[None, :], other=0.0).to(tl.float32)
            weight = tl.exp2(tl.load(decays + head * Q + t))
            if not READER:
                entered = tl.load(others + at, mask=inside, other=0.0).to(OPERAND)
                # Only its diagonal is wanted, but operands of a matrix product are what Triton prefetches.
                cross = tl.dot(entered, tl.trans(state), input_precision=PRECISION)  # (P, P)
                cross = tl.where(p[:, None] == p[None, :], cross, 0.0)
                tl.store(passed + head * pieces + piece, tl.sum(cross))
            seen = tl.dot(mate, tl.trans(state), input_precision=PRECISION)  # (Q, P)
            tl.store(products + (head * pieces + piece) * Q + t, tl.sum(seen * g, 1) * weight)
            if not READER:
                weight *= tl.load(steps + head * Q + t)
            g *= weight[:, None]
            acc = tl.dot(g.to(OPERAND), state, acc, input_precision=PRECISION)
        else:
            weight = tl.exp2(tl.load(decays + head * Q + t))
            if not READER:
                state = tl.load(states + at, mask=inside, other=0.0).to(OPERAND)
                entered = tl.load(others + at, mask=inside, other=0.0).to(OPERAND)
                tl.store(passed + head * pieces + piece, tl.sum(entered * state))
            found = tl.zeros((Q, BN), tl.float32)
            for start in tl.static_range(0, BP, SLICE):
                k = start + tl.arange(0, SLICE)
                of = tl.load(
                    states + head * P * N + k[:, None] * N + n[None, :],
                    mask=(k < P)[:, None] & (n < N)[None, :],
                    other=0.0,
                )
                g = tl.load(
                    source + h * P + t[:, None] * s_source + k[None, :],
                    mask=live & (k < P)[None, :],
                    other=0.0,
                ).to(tl.float32)
                found += summed_apart(g * weight[:, None], of.to(OPERAND), PRECISION)
            tl.store(products + (head * pieces + piece) * Q + t, tl.sum(mate * found, 1))
            if not READER:
                found *= tl.load(steps + head * Q + t)[:, None]
            acc += found
    if WHOLE:
        at = out + (first + t)[:, None] * s_out + group * N + n[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=live & (n < N)[None, :])
    else:
        tl.store(out + (share * Q + t)[:, None] * N + n[None, :], acc, mask=(n < N)[None, :])


@triton.jit(do_not_specialize=ANY_SIZE)
def gather(
    shares,
    out,
    table,
    s_out,
    length,
    per_row,
    groups,
    N,
    runs,
    Q: tl.constexpr,
    BN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Add the shares (chunks, G, runs, Q, N) of all runs of heads, in order: out (tokens, G, N)."""
    pid = tl.program_id(0)
    pieces = tl.cdiv(N, BN)
    n = (pid % pieces) * BN + tl.arange(0, BN)
    group = (pid // pieces) % groups
    c = pid // (pieces * groups)
    first, size = place(c, table, length, per_row, Q, PACKED)
    if size <= 0:
        return
    t = tl.arange(0, Q)
    chunk = c.to(tl.int64) * groups + group
    acc = tl.zeros((Q, BN), tl.float32)
    for r in range(runs):
        at = (chunk * runs + r) * Q
        acc += tl.load(shares + (at + t)[:, None] * N + n[None, :], mask=(n < N)[None, :], other=0.0)
    to = out + (first + t)[:, None] * s_out + group * N + n[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(t < size)[:, None] & (n < N)[None, :])
