"""The selective scan forwards: a program walks a window of tokens, some channels' states in registers.

Per token, channel and state the scan takes one exponential and four multiply-adds, and nothing else is of any
size, so that it should run at the speed of the exponentials. Channels lie on the lanes of a warp and a
channel's states in its lane: the sum over states meets no other lane, rows of u, dt and z are read as they
lie in memory, and the B and C of a token are the same for all lanes.

The batch is one string of B * L tokens. Documents are cut into pieces of W tokens from their own start, and
window w, tokens w W to (w + 1) W, owns the pieces that start in it: at most one, its first, goes on with a
document begun before, and at most one, its last, is gone on with in window w + 1. So a document's bits do not
depend on its company. Where rows are longer than W, `ends` first walks each window's last piece from a state
of zero, and `join` adds what entered it: the decay of a whole piece is the exponential of its summed steps.
"""

# Triton's tuples grow by addition only, which changes their type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ssmtrain.kernels.causal_conv1d.triton import sigmoid
from ssmtrain.kernels.ssd.triton_chunks import LOG2E

SIZES = ["length", "tokens", "n_windows"]
"""Arguments whose values Triton shall not compile in: for rows of one token it may round another way."""
LANES = ["pitch"]
"""E again, for where states lie. If it may be a multiple of nothing, Triton loads one state a lane: channels
lie on lanes, a channel's states in one. Where sums go over channels as well, four by four is better."""


@triton.jit
def document(ids, docs, token, length, PACKED: tl.constexpr):
    """Return the document of a token, its first token, and the one after its last."""
    if PACKED:
        d = tl.load(ids + token).to(tl.int64)
        first, after = tl.load(docs + 3 * d), tl.load(docs + 3 * d + 3)
    else:
        d = token // length
        first, after = d * length, d * length + length
    return d, first, after


@triton.jit
def window(ids, docs, w, length, tokens, W: tl.constexpr, PACKED: tl.constexpr):
    """Return where the first piece that starts at window w's first token or later starts."""
    at = w.to(tl.int64) * W
    _d, first, after = document(ids, docs, tl.minimum(at, tokens - 1), length, PACKED)
    return tl.where(at < tokens, tl.minimum(first + (at - first + W - 1) // W * W, after), tokens)


@triton.jit
def rows(at, t, size, inside, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """Return the rows of COUNT tokens from t on, as they are stored, zeros past the last: (BE,) or (BN,).

    `at` points to a piece's first row. Loads stand together, before what they are for: the stores in between
    keep the compiler from moving them.
    """
    at += t * STRIDE
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(at + i * STRIDE, mask=inside & (t + i < size), other=0.0),)
    return found


@triton.jit
def step_of(raw, live, shift, low, high, SOFTPLUS: tl.constexpr):
    """Return a token's step sizes (BE,) and derivatives; if dead a step of 0, which changes no state.

    `low` and `high` are None where no step lies outside of them.
    """
    step = raw.to(tl.float32) + shift
    slope = 1.0
    if SOFTPLUS:
        # log(1 + u) = u + u^2 p(u), of the least relative error for u up to 1, 2^-27. A quotient as argument
        # would do with fewer terms, and once more the unit for exponentials and roots, which all wait for.
        u = tl.exp2(tl.abs(step) * -LOG2E)
        p = 0.020204583 - u * 0.0033184723
        p = -0.057664443 + u * p
        p = 0.10680556 + u * p
        p = -0.15355396 + u * p
        p = 0.19695401 + u * p
        p = -0.24958588 + u * p
        p = 0.33330512 + u * p
        p = -0.49999931 + u * p
        slope = tl.where(step > 0, 1.0, u) * tl.rsqrt((1.0 + u) * (1.0 + u))
        step = tl.maximum(step, 0.0) + (u + u * (u * p))
    inside = live
    if low is not None:
        inside = live & (step >= low) & (step <= high)
        step = tl.minimum(tl.maximum(step, low), high)
    return tl.where(live, step, 0.0), tl.where(inside, slope, 0.0)


@triton.jit
def power(x, EXACT: tl.constexpr):
    """Return 2^x. The GPU's own is good to 2^-22; for inputs of fp32 we are EXACT to two thirds of a bit.

    The polynomial is 2^x - 1 over x, from -1/2 to 1/2, with the least relative error (2^-29) of its degree.
    """
    if EXACT:
        x = tl.where(x < -1000.0, -1000.0, x)  # of infinity no difference could be taken
        whole = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is added to it is rounded
        x -= whole
        p = 1.3398875e-3 + x * 1.5353362e-4
        p = 9.6184369e-3 + x * p
        p = 5.5503324e-2 + x * p
        p = 2.4022648e-1 + x * p
        p = 6.9314718e-1 + x * p
        return tl.exp2(whole) * (1.0 + x * p)
    return tl.exp2(x)


@triton.jit
def advance(h, A, step, fed, keys, EXACT: tl.constexpr):
    """Return the states (BN, BE) after a token, and their decays; fed is step * u."""
    decay = power(A * (step * LOG2E)[None, :], EXACT)
    return decay * h + fed[None, :] * keys.to(tl.float32)[:, None], decay


@triton.jit
def parameters(A, D, bias, e, n, E, N, pitch):
    """Return A (BN, BE), D and the bias of dt (BE,), zeros where absent."""
    skip, shift = tl.zeros_like(e).to(tl.float32), tl.zeros_like(e).to(tl.float32)
    if D is not None:
        skip = tl.load(D + e, mask=e < E, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    return kept(A, 0, e, n, E, N, pitch, True), skip, shift


@triton.jit
def kept(states, which, e, n, E, N, pitch, when):
    """Return one of states (.., N, E) as (BN, BE), zeros where there is none."""
    inside = (n < N)[:, None] & (e < E)[None, :] & when
    if states is None:
        found = tl.zeros(inside.shape, tl.float32)
    else:
        at = states + which * pitch * N + n[:, None] * pitch + e[None, :]
        found = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return found


@triton.jit
def keep(states, which, e, n, E, N, pitch, value, when):
    """Write (BN, BE) among states (.., N, E)."""
    inside = (n < N)[:, None] & (e < E)[None, :] & when
    tl.store(states + which * pitch * N + n[:, None] * pitch + e[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def both(B, C, pairs, tokens, N, s_b, s_bn, s_c, s_cn, ROWS: tl.constexpr):
    """Write B and C (tokens, N) in fp32 to pairs (tokens, 2, 16), zeros past N."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, 16)
    t, n = t[:, None], n[None, :]
    some = (t < tokens) & (n < N)
    b = tl.load(B + t * s_b + n * s_bn, mask=some, other=0.0).to(tl.float32)
    c = tl.load(C + t * s_c + n * s_cn, mask=some, other=0.0).to(tl.float32)
    tl.store(pairs + t * 32 + n, b, mask=t < tokens)
    tl.store(pairs + t * 32 + 16 + n, c, mask=t < tokens)


@triton.jit(do_not_specialize=SIZES + LANES)
def forward(
    u, dt, A, B, C, D, z, bias,
    ids,  # (B, L) or None
    docs,  # (n_docs + 1, 3): first tokens in column 0; or None
    initial,  # (n_docs, N, E) or None
    enter,  # (windows, N, E), or None where no piece goes on with a document
    y,  # (B, L, E)
    marks,  # (tokens // EVERY + 1, N, E), states each EVERY tokens of a piece; or None
    final,  # (n_docs, N, E) or None
    length, tokens, E, N, pitch, low, high,
    S_U: tl.constexpr, S_DT: tl.constexpr, S_B: tl.constexpr, S_C: tl.constexpr, S_Z: tl.constexpr,
    W: tl.constexpr, EVERY: tl.constexpr, UNROLL: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Scan the pieces of one window for BE channels."""
    PACKED: tl.constexpr = ids is not None
    EXACT: tl.constexpr = u.dtype.element_ty == tl.float32
    blocks = tl.cdiv(E, BE)
    w = tl.program_id(0) // blocks
    e, n = tl.program_id(0) % blocks * BE + tl.arange(0, BE), tl.arange(0, BN)
    rates, skip, shift = parameters(A, D, bias, e, n, E, N, pitch)
    at = window(ids, docs, w, length, tokens, W, PACKED)
    end = window(ids, docs, w + 1, length, tokens, W, PACKED)
    while at < end:
        d, first, after = document(ids, docs, at, length, PACKED)
        size = tl.minimum(after - at, W).to(tl.int32)
        h = kept(initial, d, e, n, E, N, pitch, at == first)
        if enter is not None:
            h += kept(enter, w.to(tl.int64), e, n, E, N, pitch, at != first)
        to_u, to_dt, to_y = u + at * S_U + e, dt + at * S_DT + e, y + at * E + e
        to_B, to_C = B + at * S_B + n, C + at * S_C + n
        # A group of tokens is loaded while the one before is worked on; its B and C, which are in the cache
        # and would take too many registers, when its turn comes.
        xs, raws = rows(to_u, 0, size, e < E, S_U, UNROLL), rows(to_dt, 0, size, e < E, S_DT, UNROLL)
        gates = xs
        if z is not None:
            to_z = z + at * S_Z + e
            gates = rows(to_z, 0, size, e < E, S_Z, UNROLL)
        for t in range(0, size, UNROLL):
            next_xs = rows(to_u, t + UNROLL, size, e < E, S_U, UNROLL)
            next_raws = rows(to_dt, t + UNROLL, size, e < E, S_DT, UNROLL)
            keys, reads = rows(to_B, t, size, n < N, S_B, UNROLL), rows(to_C, t, size, n < N, S_C, UNROLL)
            next_gates = next_xs
            if z is not None:
                next_gates = rows(to_z, t + UNROLL, size, e < E, S_Z, UNROLL)
            if marks is not None:  # noqa: SIM102 (known when compiling, the other is not)
                if (t > 0) & (t % EVERY == 0):
                    keep(marks, (at + t) // EVERY, e, n, E, N, pitch, h, True)
            for i in tl.static_range(UNROLL):
                live = t + i < size
                step, _slope = step_of(raws[i], live, shift, low, high, SOFTPLUS)
                x = xs[i].to(tl.float32)
                h, _decay = advance(h, rates, step, step * x, keys[i], EXACT)
                out = tl.sum(h * reads[i].to(tl.float32)[:, None], 0) + skip * x
                if z is not None:
                    gate = gates[i].to(tl.float32)
                    out *= gate * sigmoid(gate)
                tl.store(to_y + (t + i) * E, out.to(y.dtype.element_ty), mask=(e < E) & live)
            xs, raws, gates = next_xs, next_raws, next_gates
        if final is not None:
            keep(final, d, e, n, E, N, pitch, h, at + size == after)
        at += size


@triton.jit(do_not_specialize=SIZES + LANES)
def ends(
    u, dt, A, B, bias, ids, docs, initial,
    left,  # (windows, N, E)
    steps,  # (windows, E)
    length, tokens, E, N, pitch, low, high,
    S_U: tl.constexpr, S_DT: tl.constexpr, S_B: tl.constexpr,
    W: tl.constexpr, UNROLL: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Walk a window's last piece, where a later one goes on with it, as if nothing entered it.

    Writes the state that leaves and the sum of the piece's step sizes.
    """
    PACKED: tl.constexpr = ids is not None
    EXACT: tl.constexpr = u.dtype.element_ty == tl.float32
    blocks = tl.cdiv(E, BE)
    w = tl.program_id(0) // blocks
    e, n = tl.program_id(0) % blocks * BE + tl.arange(0, BE), tl.arange(0, BN)
    begin = window(ids, docs, w, length, tokens, W, PACKED)
    end = window(ids, docs, w + 1, length, tokens, W, PACKED)
    d, first, after = document(ids, docs, tl.maximum(end - 1, 0), length, PACKED)
    if (begin < end) & (end < after):
        rates, _skip, shift = parameters(A, None, bias, e, n, E, N, pitch)
        at = end - W
        h = kept(initial, d, e, n, E, N, pitch, at == first)
        total = tl.zeros((BE,), tl.float32)
        to_u, to_dt, to_B = u + at * S_U + e, dt + at * S_DT + e, B + at * S_B + n
        xs, raws = rows(to_u, 0, W, e < E, S_U, UNROLL), rows(to_dt, 0, W, e < E, S_DT, UNROLL)
        for t in range(0, W, UNROLL):
            next_xs = rows(to_u, t + UNROLL, W, e < E, S_U, UNROLL)
            next_raws = rows(to_dt, t + UNROLL, W, e < E, S_DT, UNROLL)
            keys = rows(to_B, t, W, n < N, S_B, UNROLL)
            for i in tl.static_range(UNROLL):
                step, _slope = step_of(raws[i], True, shift, low, high, SOFTPLUS)
                h, _decay = advance(h, rates, step, step * xs[i].to(tl.float32), keys[i], EXACT)
                total += step
            xs, raws = next_xs, next_raws
        keep(left, w.to(tl.int64), e, n, E, N, pitch, h, True)
        tl.store(steps + w.to(tl.int64) * E + e, total, mask=e < E)


@triton.jit(do_not_specialize=SIZES + LANES)
def join(
    A, ids, docs,
    left,  # (windows, N, E): what a piece adds to what passes through it
    steps,  # (windows, E)
    passed,  # (windows, N, E): what enters a window's first piece, or its last piece from behind
    length, tokens, n_windows, E, N, pitch,
    W: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Hand states from window to window, or with BACK their gradients from the last window to the first."""
    PACKED: tl.constexpr = ids is not None
    e, n = tl.program_id(0) * BE + tl.arange(0, BE), tl.arange(0, BN)
    rates, _skip, _shift = parameters(A, None, None, e, n, E, N, pitch)
    h = tl.zeros((BN, BE), tl.float32)
    for i in range(n_windows):
        w = tl.zeros((), tl.int64) + (n_windows - 1 - i if BACK else i)
        begin = window(ids, docs, w, length, tokens, W, PACKED)
        end = window(ids, docs, w + 1, length, tokens, W, PACKED)
        keep(passed, w, e, n, E, N, pitch, h, True)
        _d, first, after = document(ids, docs, tl.minimum(begin, tokens - 1), length, PACKED)
        # Whether the first piece goes on with a document, and whether it is the last, and gone on with.
        enters = (begin < end) & (begin != first)
        through = enters & (begin + W == end) & (end < after)
        if BACK:
            some = enters
        else:
            _d, _first, after = document(ids, docs, tl.maximum(end - 1, 0), length, PACKED)
            some = (begin < end) & (end < after)
        total = tl.load(steps + w * E + e, mask=(e < E) & through, other=0.0)
        h = tl.where(through, h * power(rates * (total * LOG2E)[None, :], True), 0.0)
        h += kept(left, w, e, n, E, N, pitch, some)
