"""The selective scan forwards: a program walks a window of tokens with the states of a few channels in registers.

Per token, channel and state the scan takes one exponential and four multiply-adds, and nothing else is of any
size, so that it should run at the speed of the exponentials. Channels lie on the lanes of a warp and a
channel's states in its lane: the sum over states meets no other lane, rows of u, dt and z are read as they lie
in memory, and the B and C of a token are the same for all lanes.

The batch is one string of B * L tokens. Documents are cut into pieces of W tokens from their own start, and
window w, tokens w W to (w + 1) W, owns the pieces that start in it: at most one, its first, goes on with a
document begun before, and at most one, its last, is gone on with in window w + 1. So a document's bits do not
depend on its company. Where rows are longer than W, `ends` first walks each window's last piece from a state
of zero, and `join` adds what entered it: the decay of a whole piece is the exponential of its summed steps.
"""

# Triton's tuples grow by addition only, which changes their type.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from ssmtrain.kernels.ssd.triton_chunks import LOG2E, step_size

SIZES = ["length", "tokens", "n_windows"]
"""Arguments whose values Triton shall not compile in: for rows of one token it may round another way."""


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
    _, first, after = document(ids, docs, tl.minimum(at, tokens - 1), length, PACKED)
    return tl.where(at < tokens, tl.minimum(first + (at - first + W - 1) // W * W, after), tokens)


@triton.jit
def sigmoid(a):
    """Return 1 / (1 + exp(-a)) to some ulp: zero below -44, for 1e-19."""
    # An fp32 division is five instructions of which four guard denominators near 2^126; this is two.
    d = 1.0 + tl.exp2(a * -LOG2E)
    return tl.rsqrt(d * d)


@triton.jit
def row(base, token, stride, at, live):
    """Return a token's values (BE,) or (BN,) in fp32, zeros where there is none."""
    return tl.load(base + token * stride + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def step_of(dt, token, stride, e, live, shift, low, high, SOFTPLUS: tl.constexpr):
    """Return a token's step sizes (BE,), their derivative; a step of zero, which changes no state, if dead."""
    step, slope = step_size(row(dt, token, stride, e, live) + shift, low, high, SOFTPLUS)
    return tl.where(live, step, 0.0), tl.where(live, slope, 0.0)


@triton.jit
def advance(h, A, step, fed, keys):
    """Return the states (BN, BE) after a token, and their decays; A is in units of log 2, fed is step * u."""
    decay = tl.exp2(A * step[None, :])
    return decay * h + fed[None, :] * keys[:, None], decay


@triton.jit
def parameters(A, D, bias, e, n, E, N):
    """Return A (BN, BE) in units of log 2, D and the bias of dt (BE,), zeros where absent."""
    inside = (n < N)[:, None] & (e < E)[None, :]
    decays = tl.load(A + e[None, :] * N + n[:, None], mask=inside, other=0.0).to(tl.float32) * LOG2E
    skip, shift = tl.zeros_like(e).to(tl.float32), tl.zeros_like(e).to(tl.float32)
    if D is not None:
        skip = tl.load(D + e, mask=e < E, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    return decays, skip, shift


@triton.jit
def given(states, which, e, n, E, N, when):
    """Return states (n_docs, E, N) of one document as (BN, BE), zeros where there are none."""
    inside = (n < N)[:, None] & (e < E)[None, :]
    if states is None:
        found = tl.zeros(inside.shape, tl.float32)
    else:
        at = states + which * E * N + e[None, :] * N + n[:, None]
        found = tl.load(at, mask=inside & when, other=0.0).to(tl.float32)
    return found


@triton.jit
def kept(states, which, e, n, E, N, when):
    """Return states (.., N, E), as the kernels keep them for each other, as (BN, BE)."""
    inside = (n < N)[:, None] & (e < E)[None, :] & when
    return tl.load(states + which * E * N + n[:, None] * E + e[None, :], mask=inside, other=0.0)


@triton.jit
def keep(states, which, e, n, E, N, value, when):
    """Write (BN, BE) among states (.., N, E)."""
    inside = (n < N)[:, None] & (e < E)[None, :] & when
    tl.store(states + which * E * N + n[:, None] * E + e[None, :], value, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def forward(
    u, dt, A, B, C, D, z, bias,
    ids,  # (B, L) or None
    docs,  # (n_docs + 1, 3): first tokens in column 0; or None
    initial,  # (n_docs, E, N) or None
    enter,  # (windows, N, E), or None where no piece goes on with a document
    y,  # (B, L, E)
    marks,  # (tokens // EVERY + 1, N, E), states each EVERY tokens of a piece; or None
    final,  # (n_docs, E, N) or None
    s_u, s_dt, s_B, s_C, s_z, length, tokens, E, N, low, high,
    W: tl.constexpr, EVERY: tl.constexpr, UNROLL: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Scan the pieces of one window for BE channels."""
    PACKED: tl.constexpr = ids is not None
    blocks = tl.cdiv(E, BE)
    w = tl.program_id(0) // blocks
    e, n = tl.program_id(0) % blocks * BE + tl.arange(0, BE), tl.arange(0, BN)
    decays, skip, shift = parameters(A, D, bias, e, n, E, N)
    at = window(ids, docs, w, length, tokens, W, PACKED)
    end = window(ids, docs, w + 1, length, tokens, W, PACKED)
    while at < end:
        d, first, after = document(ids, docs, at, length, PACKED)
        size = tl.minimum(after - at, W).to(tl.int32)
        h = given(initial, d, e, n, E, N, at == first)
        if enter is not None:
            h += kept(enter, w.to(tl.int64), e, n, E, N, at != first)
        for t in range(0, size, UNROLL):
            if marks is not None:  # noqa: SIM102 (known when compiling, the other is not)
                if (t > 0) & (t % EVERY == 0):
                    keep(marks, (at + t) // EVERY, e, n, E, N, h, True)
            for i in tl.static_range(UNROLL):
                token = at + t + i
                live = (e < E) & (t + i < size)
                step, _ = step_of(dt, token, s_dt, e, live, shift, low, high, SOFTPLUS)
                x = row(u, token, s_u, e, live)
                keys = row(B, token, s_B, n, (n < N) & (t + i < size))
                reads = row(C, token, s_C, n, (n < N) & (t + i < size))
                h, _ = advance(h, decays, step, step * x, keys)
                out = tl.sum(h * reads[:, None], 0) + skip * x
                if z is not None:
                    gate = row(z, token, s_z, e, live)
                    out *= gate * sigmoid(gate)
                tl.store(y + token * E + e, out.to(y.dtype.element_ty), mask=live)
        if final is not None:
            inside = (n < N)[:, None] & (e < E)[None, :] & (at + size == after)
            tl.store(final + d * E * N + e[None, :] * N + n[:, None], h, mask=inside)
        at += size


@triton.jit(do_not_specialize=SIZES)
def ends(
    u, dt, A, B, bias, ids, docs, initial,
    left,  # (windows, N, E)
    steps,  # (windows, E)
    s_u, s_dt, s_B, length, tokens, E, N, low, high,
    W: tl.constexpr, UNROLL: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Walk a window's last piece, where a later one goes on with it, as if nothing entered it.

    Writes the state that leaves and the sum of the piece's step sizes.
    """
    PACKED: tl.constexpr = ids is not None
    blocks = tl.cdiv(E, BE)
    w = tl.program_id(0) // blocks
    e, n = tl.program_id(0) % blocks * BE + tl.arange(0, BE), tl.arange(0, BN)
    begin = window(ids, docs, w, length, tokens, W, PACKED)
    end = window(ids, docs, w + 1, length, tokens, W, PACKED)
    d, first, after = document(ids, docs, tl.maximum(end - 1, 0), length, PACKED)
    if (begin < end) & (end < after):
        decays, _, shift = parameters(A, None, bias, e, n, E, N)
        at = end - W
        h = given(initial, d, e, n, E, N, at == first)
        total = tl.zeros((BE,), tl.float32)
        for t in range(0, W, UNROLL):
            for i in tl.static_range(UNROLL):
                step, _ = step_of(dt, at + t + i, s_dt, e, e < E, shift, low, high, SOFTPLUS)
                x = row(u, at + t + i, s_u, e, e < E)
                h, _ = advance(h, decays, step, step * x, row(B, at + t + i, s_B, n, n < N))
                total += step
        keep(left, w.to(tl.int64), e, n, E, N, h, True)
        tl.store(steps + w.to(tl.int64) * E + e, total, mask=e < E)


@triton.jit(do_not_specialize=SIZES)
def join(
    A, ids, docs,
    left,  # (windows, N, E): what a piece adds to what passes through it
    steps,  # (windows, E)
    passed,  # (windows, N, E): what enters a window's first piece, or its last piece from behind
    length, tokens, n_windows, E, N,
    W: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Hand states from window to window, or with BACK their gradients from the last window to the first."""
    PACKED: tl.constexpr = ids is not None
    e, n = tl.program_id(0) * BE + tl.arange(0, BE), tl.arange(0, BN)
    decays, _, _ = parameters(A, None, None, e, n, E, N)
    h = tl.zeros((BN, BE), tl.float32)
    for i in range(n_windows):
        w = tl.zeros((), tl.int64) + (n_windows - 1 - i if BACK else i)
        begin = window(ids, docs, w, length, tokens, W, PACKED)
        end = window(ids, docs, w + 1, length, tokens, W, PACKED)
        keep(passed, w, e, n, E, N, h, True)
        _, first, after = document(ids, docs, tl.minimum(begin, tokens - 1), length, PACKED)
        # Whether the first piece goes on with a document, and whether it is the last, and gone on with.
        enters = (begin < end) & (begin != first)
        through = enters & (begin + W == end) & (end < after)
        if BACK:
            some = enters
        else:
            _, _, after = document(ids, docs, tl.maximum(end - 1, 0), length, PACKED)
            some = (begin < end) & (end < after)
        total = tl.load(steps + w * E + e, mask=(e < E) & through, other=0.0)
        h = tl.where(through, h * tl.exp2(decays * total[None, :]), 0.0)
        h += kept(left, w, e, n, E, N, some)
