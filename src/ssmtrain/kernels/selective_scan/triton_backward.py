"""The selective scan backwards: the same windows and pieces, from the last token to the first.

With g_t the gradient of h_t, a_t its decay and G what comes from later tokens:

    g_t = C_t dy_t + G,    G = a_t g_t    for the token before;
    dw_t = sum_n B_t g_t with w_t = dt_t u_t;    d(dt_t A) = g_t a_t h_{t-1};
    dB_t = sum_e w_t g_t,    dC_t = sum_e dy_t h_t.

States are computed again, since h_{t-1} = (h_t - w_t B_t) / a_t loses what a_t is too small to hold. The
forward pass keeps one each EVERY tokens; from there a block is walked, and each SPAN tokens the state is
written to a scratch, near enough to be in the L2 cache; the states of SPAN tokens are in registers while they
are gone back through.

Sums over channels are shares, (blocks of channels, tokens, 2, N), which `add_shares` adds in order: there are
no atomics.
"""

# Triton's tuples grow by addition only, which changes their type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ssmtrain.kernels.causal_conv1d.triton import sigmoid
from ssmtrain.kernels.selective_scan.triton_forward import (
    SIZES,
    advance,
    document,
    keep,
    kept,
    parameters,
    power,
    rows,
    step_of,
    window,
)
from ssmtrain.kernels.ssd.triton_chunks import LOG2E


@triton.jit
def pulled(grad, gate, GATED: tl.constexpr):
    """Return the gradient of the scan's output before the gate, and the gate's sigmoid (BE,)."""
    grad, gate = grad.to(tl.float32), gate.to(tl.float32)
    if GATED:
        bend = sigmoid(gate)
        found = (grad * gate * bend, bend)
    else:
        found = (grad, grad)
    return found


@triton.jit(do_not_specialize=SIZES)
def backward(
    d_y, u, dt, A, B, C, D, z, bias, ids, docs, initial, enter, marks,
    leave,  # (windows, N, E): gradients of the state that leaves a window's last piece; or None
    d_final,  # (n_docs, N, E) or None
    scratch,  # (programs, EVERY // SPAN, BN, BE)
    d_u, d_dt, d_z,  # (B, L, E); d_z or None
    shares,  # (blocks, tokens, 2, N): of dB and dC
    d_A,  # (windows, N, E)
    sums,  # (2, windows, E): of dD and d_bias
    d_initial,  # (n_docs, N, E) or None
    length, tokens, n_windows, E, N, pitch, low, high,
    S_DY: tl.constexpr, S_U: tl.constexpr, S_DT: tl.constexpr, S_B: tl.constexpr, S_C: tl.constexpr,
    S_Z: tl.constexpr, W: tl.constexpr, EVERY: tl.constexpr, SPAN: tl.constexpr,
    BE: tl.constexpr, BN: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Go back through the pieces of one window for BE channels."""
    PACKED: tl.constexpr = ids is not None
    EXACT: tl.constexpr = u.dtype.element_ty == tl.float32
    blocks = tl.cdiv(E, BE)
    w = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    e, n = block * BE + tl.arange(0, BE), tl.arange(0, BN)
    rates, skip, shift = parameters(A, D, bias, e, n, E, N, pitch)
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
        to_u, to_dt, to_dy = u + start * S_U + e, dt + start * S_DT + e, d_y + start * S_DY + e
        to_B, to_C, to_shares = B + start * S_B + n, C + start * S_C + n, shares + start * (2 * N) + n
        to_du, to_ddt = d_u + start * E + e, d_dt + start * E + e
        if z is not None:
            to_z, to_dz = z + start * S_Z + e, d_z + start * E + e
        g = kept(d_final, d, e, n, E, N, pitch, end == after)
        if leave is not None:
            g += kept(leave, w.to(tl.int64), e, n, E, N, pitch, end != after)
        for back in range(tl.cdiv(size, EVERY)):
            base = (tl.cdiv(size, EVERY) - 1 - back) * EVERY
            origin = kept(initial, d, e, n, E, N, pitch, (start == first) & (base == 0))
            if enter is not None:
                origin += kept(enter, w.to(tl.int64), e, n, E, N, pitch, (start != first) & (base == 0))
            if marks is not None:
                origin += kept(marks, (start + base) // EVERY, e, n, E, N, pitch, base > 0)
            spans = tl.cdiv(tl.minimum(size - base, EVERY), SPAN)
            h = origin
            for s in range(spans - 1):
                t = base + s * SPAN
                xs, raws = rows(to_u, t, size, e < E, S_U, SPAN), rows(to_dt, t, size, e < E, S_DT, SPAN)
                keys = rows(to_B, t, size, n < N, S_B, SPAN)
                for i in tl.static_range(SPAN):
                    step, _slope = step_of(raws[i], True, shift, low, high, SOFTPLUS)
                    h, _decay = advance(h, rates, step, step * xs[i].to(tl.float32), keys[i], EXACT)
                tl.store(scratch + (s + 1) * BN * BE + tile, h)
            # What a thread reads below, another may have written above.
            tl.debug_barrier()
            for s in range(spans):
                span = spans - 1 - s
                t = base + span * SPAN
                h = tl.load(scratch + span * BN * BE + tile, mask=(tile >= 0) & (span > 0), other=0.0)
                h = tl.where(span > 0, h, origin)
                xs, raws = rows(to_u, t, size, e < E, S_U, SPAN), rows(to_dt, t, size, e < E, S_DT, SPAN)
                keys, reads = rows(to_B, t, size, n < N, S_B, SPAN), rows(to_C, t, size, n < N, S_C, SPAN)
                grads = rows(to_dy, t, size, e < E, S_DY, SPAN)
                gates = grads
                if z is not None:
                    gates = rows(to_z, t, size, e < E, S_Z, SPAN)
                before, decays, steps, slopes = (), (), (), ()
                for i in tl.static_range(SPAN):
                    step, slope = step_of(raws[i], t + i < size, shift, low, high, SOFTPLUS)
                    before, steps, slopes = before + (h,), steps + (step,), slopes + (slope,)
                    h, decay = advance(h, rates, step, step * xs[i].to(tl.float32), keys[i], EXACT)
                    decays = decays + (decay,)
                for j in tl.static_range(SPAN):
                    at = t + SPAN - 1 - j
                    live = (e < E) & (at < size)
                    step, x = steps[SPAN - 1 - j], xs[SPAN - 1 - j].to(tl.float32)
                    dy, bend = pulled(grads[SPAN - 1 - j], gates[SPAN - 1 - j], z is not None)
                    read = reads[SPAN - 1 - j].to(tl.float32)[:, None]
                    if z is not None:
                        gate, grad = gates[SPAN - 1 - j].to(tl.float32), grads[SPAN - 1 - j].to(tl.float32)
                        out = tl.sum(h * read, 0) + skip * x
                        d_gate = grad * out * (bend + gate * bend * (1.0 - bend))
                        tl.store(to_dz + at * E, d_gate.to(d_z.dtype.element_ty), mask=live)
                    g += read * dy[None, :]
                    of_C = tl.sum(h * dy[None, :], 1)
                    of_B = tl.sum(g * (step * x)[None, :], 1)
                    tl.store(to_shares + at * (2 * N), of_B, mask=(n < N) & (at < size))
                    tl.store(to_shares + at * (2 * N) + N, of_C, mask=(n < N) & (at < size))
                    through = tl.sum(g * keys[SPAN - 1 - j].to(tl.float32)[:, None], 0)
                    g *= decays[SPAN - 1 - j]
                    h = before[SPAN - 1 - j]
                    bent = g * h  # gradients of step * A
                    d_step = through * x + tl.sum(bent * rates, 0)
                    sum_A += bent * step[None, :]
                    d_raw = d_step * slopes[SPAN - 1 - j]
                    tl.store(to_ddt + at * E, d_raw.to(d_dt.dtype.element_ty), mask=live)
                    d_x = through * step + skip * dy
                    tl.store(to_du + at * E, d_x.to(d_u.dtype.element_ty), mask=live)
                    sum_D += dy * x
                    sum_bias += d_raw
            # And what is read there, another may write in the block before.
            tl.debug_barrier()
        if d_initial is not None:
            keep(d_initial, d, e, n, E, N, pitch, g, start == first)
        end = start
    at = w.to(tl.int64) * E + e
    keep(d_A, w.to(tl.int64), e, n, E, N, pitch, sum_A, True)
    tl.store(sums + at, sum_D, mask=e < E)
    tl.store(sums + n_windows.to(tl.int64) * E + at, sum_bias, mask=e < E)


@triton.jit(do_not_specialize=SIZES)
def starts(
    d_y, dt, A, C, z, bias, ids, docs, d_final,
    left,  # (windows, N, E)
    steps,  # (windows, E)
    length, tokens, E, N, pitch, low, high,
    S_DY: tl.constexpr, S_DT: tl.constexpr, S_C: tl.constexpr, S_Z: tl.constexpr,
    W: tl.constexpr, UNROLL: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Go back through a window's first piece, where it goes on with a document, as if it were the last.

    Writes what comes from its own tokens of the gradient of the state that enters, and its summed step sizes.
    """
    PACKED: tl.constexpr = ids is not None
    EXACT: tl.constexpr = dt.dtype.element_ty == tl.float32
    blocks = tl.cdiv(E, BE)
    w = tl.program_id(0) // blocks
    e, n = tl.program_id(0) % blocks * BE + tl.arange(0, BE), tl.arange(0, BN)
    begin = window(ids, docs, w, length, tokens, W, PACKED)
    end = window(ids, docs, w + 1, length, tokens, W, PACKED)
    d, first, after = document(ids, docs, tl.minimum(begin, tokens - 1), length, PACKED)
    if (begin < end) & (begin != first):
        rates, _skip, shift = parameters(A, None, bias, e, n, E, N, pitch)
        size = tl.minimum(after - begin, W).to(tl.int32)
        g = kept(d_final, d, e, n, E, N, pitch, begin + size == after)
        total = tl.zeros((BE,), tl.float32)
        to_dt, to_dy, to_C = dt + begin * S_DT + e, d_y + begin * S_DY + e, C + begin * S_C + n
        for back in range(0, size, UNROLL):
            t = (tl.cdiv(size, UNROLL) - 1) * UNROLL - back
            raws, reads = rows(to_dt, t, size, e < E, S_DT, UNROLL), rows(to_C, t, size, n < N, S_C, UNROLL)
            grads = rows(to_dy, t, size, e < E, S_DY, UNROLL)
            gates = grads
            if z is not None:
                gates = rows(z + begin * S_Z + e, t, size, e < E, S_Z, UNROLL)
            for j in tl.static_range(UNROLL):
                live = t + UNROLL - 1 - j < size
                step, _slope = step_of(raws[UNROLL - 1 - j], live, shift, low, high, SOFTPLUS)
                dy, _bend = pulled(grads[UNROLL - 1 - j], gates[UNROLL - 1 - j], z is not None)
                g += reads[UNROLL - 1 - j].to(tl.float32)[:, None] * dy[None, :]
                g *= power(rates * (step * LOG2E)[None, :], EXACT)
                total += step
        keep(left, w.to(tl.int64), e, n, E, N, pitch, g, True)
        tl.store(steps + w.to(tl.int64) * E + e, total, mask=e < E)


@triton.jit(do_not_specialize=["tokens"])
def add_shares(shares, d_B, d_C, tokens, blocks, N, PITCH: tl.constexpr, BLOCK: tl.constexpr):
    """Add the shares (blocks, tokens, 2, PITCH) of all blocks of channels in order: d_B, d_C (tokens, N)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens.to(tl.int64) * (2 * PITCH)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(blocks):
        total += tl.load(shares + at, mask=inside, other=0.0)
        shares += tokens.to(tl.int64) * (2 * PITCH)
    token, column = at // (2 * PITCH), at % (2 * PITCH)
    n = column % PITCH
    to, inside = token * N + n, inside & (n < N)
    tl.store(d_B + to, total.to(d_B.dtype.element_ty), mask=inside & (column < PITCH))
    tl.store(d_C + to, total.to(d_C.dtype.element_ty), mask=inside & (column >= PITCH))
