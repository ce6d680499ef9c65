"""The selective scan backwards: the same windows and pieces, from the last token to the first.

With g_t the gradient of h_t, a_t its decay and G what comes from later tokens:

    g_t = C_t dy_t + G,    G = a_t g_t    for the token before;
    dw_t = sum_n B_t g_t with w_t = dt_t u_t;    d(dt_t A) = g_t a_t h_{t-1};
    dB_t = sum_e w_t g_t,    dC_t = sum_e dy_t h_t.

States are computed again, since h_{t-1} = (h_t - w_t B_t) / a_t loses what a_t is too small to hold. The forward
pass keeps one each EVERY tokens; from there a block is walked, and each SPAN tokens the state is written to
a scratch that stays in the L2 cache; SPAN tokens' states are in registers while they are gone back through.

Sums over channels are shares, (blocks of channels, tokens, 2, N), which `add_shares` adds in order: no atomics.
"""

# Triton's tuples grow by addition only, which changes their type.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from ssmtrain.kernels.selective_scan.triton_forward import (
    SIZES,
    advance,
    document,
    given,
    keep,
    kept,
    parameters,
    row,
    sigmoid,
    step_of,
    window,
)
from ssmtrain.kernels.ssd.triton_chunks import LOG2E


@triton.jit
def pulled(d_y, z, token, s_dy, s_z, e, live):
    """Return the gradient of the scan's output before the gate, the gate, its sigmoid, and d_y (BE,)."""
    grad = row(d_y, token, s_dy, e, live)
    if z is None:
        found = (grad, grad, grad, grad)
    else:
        gate = row(z, token, s_z, e, live)
        bend = sigmoid(gate)
        found = (grad * gate * bend, gate, bend, grad)
    return found


@triton.jit(do_not_specialize=SIZES)
def backward(
    d_y, u, dt, A, B, C, D, z, bias, ids, docs, initial, enter, marks,
    leave,  # (windows, N, E): gradients of the state that leaves a window's last piece; or None
    d_final,  # (n_docs, E, N) or None
    scratch,  # (programs, EVERY // SPAN, BN, BE)
    d_u, d_dt, d_z,  # (B, L, E); d_z or None
    shares,  # (blocks, tokens, 2, N): of dB and dC
    d_A,  # (windows, E, N)
    sums,  # (2, windows, E): of dD and d_bias
    d_initial,  # (n_docs, E, N) or None
    s_dy, s_u, s_dt, s_B, s_C, s_z, length, tokens, n_windows, E, N, low, high,
    W: tl.constexpr, EVERY: tl.constexpr, SPAN: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Go back through the pieces of one window for BE channels."""
    PACKED: tl.constexpr = ids is not None
    blocks = tl.cdiv(E, BE)
    w = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    e, n = block * BE + tl.arange(0, BE), tl.arange(0, BN)
    decays, skip, shift = parameters(A, D, bias, e, n, E, N)
    tile = tl.arange(0, BN)[:, None] * BE + tl.arange(0, BE)[None, :]
    scratch += tl.program_id(0).to(tl.int64) * (EVERY // SPAN * BN * BE)
    shares += block.to(tl.int64) * tokens * (2 * N)
    sum_A = tl.zeros((BN, BE), tl.float32)
    sum_D, sum_bias = tl.zeros((BE,), tl.float32), tl.zeros((BE,), tl.float32)
    begin = window(ids, docs, w, length, tokens, W, PACKED)
    end = window(ids, docs, w + 1, length, tokens, W, PACKED)
    while end > begin:
        d, first, after = document(ids, docs, end - 1, length, PACKED)
        start = first + (end - 1 - first) // W * W
        size = (end - start).to(tl.int32)
        g = given(d_final, d, e, n, E, N, end == after)
        if leave is not None:
            g += kept(leave, w.to(tl.int64), e, n, E, N, end != after)
        for back in range(tl.cdiv(size, EVERY)):
            base = (tl.cdiv(size, EVERY) - 1 - back) * EVERY
            origin = given(initial, d, e, n, E, N, (start == first) & (base == 0))
            if enter is not None:
                origin += kept(enter, w.to(tl.int64), e, n, E, N, (start != first) & (base == 0))
            if marks is not None:
                origin += kept(marks, (start + base) // EVERY, e, n, E, N, base > 0)
            spans = tl.cdiv(tl.minimum(size - base, EVERY), SPAN)
            h = origin
            for s in range(spans - 1):
                for i in tl.static_range(SPAN):
                    token = start + base + s * SPAN + i
                    step, _ = step_of(dt, token, s_dt, e, e < E, shift, low, high, SOFTPLUS)
                    x = row(u, token, s_u, e, e < E)
                    h, _ = advance(h, decays, step, step * x, row(B, token, s_B, n, n < N))
                tl.store(scratch + (s + 1) * BN * BE + tile, h)
            # What a thread reads below, another may have written above.
            tl.debug_barrier()
            for s in range(spans):
                span = spans - 1 - s
                h = tl.load(scratch + span * BN * BE + tile, mask=(tile >= 0) & (span > 0), other=0.0)
                h = tl.where(span > 0, h, origin)
                before, rates, inputs = (), (), ()
                for i in tl.static_range(SPAN):
                    at = base + span * SPAN + i
                    live = (e < E) & (at < size)
                    step, slope = step_of(dt, start + at, s_dt, e, live, shift, low, high, SOFTPLUS)
                    x = row(u, start + at, s_u, e, live)
                    keys = row(B, start + at, s_B, n, (n < N) & (at < size))
                    before, inputs = before + (h,), inputs + ((step, slope, x, keys),)
                    h, decay = advance(h, decays, step, step * x, keys)
                    rates = rates + (decay,)
                for j in tl.static_range(SPAN):
                    at = base + span * SPAN + SPAN - 1 - j
                    token = start + at
                    live = (e < E) & (at < size)
                    step, slope, x, keys = inputs[SPAN - 1 - j]
                    reads = row(C, token, s_C, n, (n < N) & (at < size))
                    dy, gate, bend, grad = pulled(d_y, z, token, s_dy, s_z, e, live)
                    if z is not None:
                        out = tl.sum(h * reads[:, None], 0) + skip * x
                        d_gate = grad * out * (bend + gate * bend * (1.0 - bend))
                        tl.store(d_z + token * E + e, d_gate.to(d_z.dtype.element_ty), mask=live)
                    g += reads[:, None] * dy[None, :]
                    of_C = tl.sum(h * dy[None, :], 1)
                    of_B = tl.sum(g * (step * x)[None, :], 1)
                    to = shares + token * (2 * N) + n
                    tl.store(to, of_B, mask=(n < N) & (at < size))
                    tl.store(to + N, of_C, mask=(n < N) & (at < size))
                    through = tl.sum(g * keys[:, None], 0)
                    g *= rates[SPAN - 1 - j]
                    h = before[SPAN - 1 - j]
                    bent = g * h  # gradients of step * A
                    d_step = through * x + tl.sum(bent * decays, 0) * (1.0 / LOG2E)
                    sum_A += bent * step[None, :]
                    d_raw = d_step * slope
                    tl.store(d_dt + token * E + e, d_raw.to(d_dt.dtype.element_ty), mask=live)
                    d_x = through * step + skip * dy
                    tl.store(d_u + token * E + e, d_x.to(d_u.dtype.element_ty), mask=live)
                    sum_D += dy * x
                    sum_bias += d_raw
            # And what is read there, another may write in the block before.
            tl.debug_barrier()
        if d_initial is not None:
            inside = (n < N)[:, None] & (e < E)[None, :] & (start == first)
            tl.store(d_initial + d * E * N + e[None, :] * N + n[:, None], g, mask=inside)
        end = start
    at = w.to(tl.int64) * E + e
    tl.store(d_A + at[None, :] * N + n[:, None], sum_A, mask=(n < N)[:, None] & (e < E)[None, :])
    tl.store(sums + at, sum_D, mask=e < E)
    tl.store(sums + n_windows.to(tl.int64) * E + at, sum_bias, mask=e < E)


@triton.jit(do_not_specialize=SIZES)
def starts(
    d_y, dt, A, C, z, bias, ids, docs, d_final,
    left,  # (windows, N, E)
    steps,  # (windows, E)
    s_dy, s_dt, s_C, s_z, length, tokens, E, N, low, high,
    W: tl.constexpr, UNROLL: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Go back through a window's first piece, where it goes on with a document, as if nothing came from later.

    Writes the gradient of the state that enters and the sum of the piece's step sizes.
    """
    PACKED: tl.constexpr = ids is not None
    blocks = tl.cdiv(E, BE)
    w = tl.program_id(0) // blocks
    e, n = tl.program_id(0) % blocks * BE + tl.arange(0, BE), tl.arange(0, BN)
    begin = window(ids, docs, w, length, tokens, W, PACKED)
    end = window(ids, docs, w + 1, length, tokens, W, PACKED)
    d, first, after = document(ids, docs, tl.minimum(begin, tokens - 1), length, PACKED)
    if (begin < end) & (begin != first):
        decays, _, shift = parameters(A, None, bias, e, n, E, N)
        size = tl.minimum(after - begin, W).to(tl.int32)
        g = given(d_final, d, e, n, E, N, begin + size == after)
        total = tl.zeros((BE,), tl.float32)
        for t in range(0, size, UNROLL):
            for i in tl.static_range(UNROLL):
                at = (tl.cdiv(size, UNROLL) * UNROLL - 1 - t) - i
                live = (e < E) & (at < size)
                step, _ = step_of(dt, begin + at, s_dt, e, live, shift, low, high, SOFTPLUS)
                reads = row(C, begin + at, s_C, n, (n < N) & (at < size))
                dy, _, _, _ = pulled(d_y, z, begin + at, s_dy, s_z, e, live)
                g = (g + reads[:, None] * dy[None, :]) * tl.exp2(decays * step[None, :])
                total += step
        keep(left, w.to(tl.int64), e, n, E, N, g, True)
        tl.store(steps + w.to(tl.int64) * E + e, total, mask=e < E)


@triton.jit(do_not_specialize=["tokens"])
def add_shares(shares, d_B, d_C, tokens, blocks, N, BLOCK: tl.constexpr):
    """Add the shares (blocks, tokens, 2, N) of all blocks of channels, in order, into d_B and d_C (tokens, N)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens.to(tl.int64) * 2 * N
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(blocks):
        total += tl.load(shares + at, mask=inside, other=0.0)
        shares += tokens.to(tl.int64) * 2 * N
    token, column = at // (2 * N), at % (2 * N)
    to = token * N + column % N
    tl.store(d_B + to, total.to(d_B.dtype.element_ty), mask=inside & (column < N))
    tl.store(d_C + to, total.to(d_C.dtype.element_ty), mask=inside & (column >= N))
