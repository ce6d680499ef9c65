"""The causal depthwise convolution in Triton: one warp walks a run of tokens with its window in registers.

The op reads an input, does a dozen operations on it and writes an output, so it should run at the speed of
memory. Loading a (tokens, channels) tile K times with shifts, the usual Triton form, takes each input from
memory once but loads and converts it K times. Here a program owns BLOCK_C neighbouring channels, 16 bytes a
thread and load, and walks TOKENS tokens in groups of UNROLL: a group's loads are issued before the group
before it is worked on, the K - 1 inputs before it are in registers still, and nothing passes through shared
memory.

Backward walks the same way. At token t it computes the pre-activation again and its gradient, and adds that
to the gradients of the inputs t - K + 1, ..., t, of which the oldest is then complete and is written. A
program begins with the K - 1 inputs before its run and ends with K - 1 tokens of the next one, which its last
inputs still need. The gradients of weight and bias stay in registers over the run and are written once; a
second kernel adds the runs in order. A run's length depends on the shape alone: no atomics, and always the
same bits.

Documents are numbered in order and lie one after another, so a group lies in one of them if two ids agree:
those of the token after the group and of the oldest token in reach. Such a group takes the path without
tests; others go token by token. Where a document starts, the window becomes its initial state or zeros. In
backward an initial state is K - 1 inputs before the first: what would be written there is its gradient.
"""

# Triton's tuples grow by addition only, which changes their type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmtrain.kernels import tuned
from ssmtrain.kernels.causal_conv1d import reference
from ssmtrain.kernels.op import op
from ssmtrain.kernels.parts import place_of

LOG2E = tl.constexpr(1.4426950408889634)

PROGRAMS = 2048
"""Programs, about, that fill any GPU: where there would be fewer, runs of tokens are cut shorter."""

_SIZES = ["L", "units", "x_row", "x_step"]
"Numbers that Triton shall not compile new kernels for."


@triton.jit
def sigmoid(a):
    """Return 1 / (1 + exp(-a)) to some ulp."""
    # An fp32 division is five instructions of which four guard denominators near 2^126; this is two. It is
    # zero below -44, for 1e-19.
    d = 1.0 + tl.exp2(a * -LOG2E)
    return tl.rsqrt(d * d)


@triton.jit
def _place(L, units, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, TOKENS: tl.constexpr):
    """This program's channels, which of them exist, its row, its first token, and its run's number."""
    # Channels fastest: programs that run together read whole rows, and each other's halo from L2.
    blocks = tl.cdiv(units * ALIGN, BLOCK_C)
    runs = tl.cdiv(L, TOKENS)
    run = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < units * ALIGN, (run // runs).to(tl.int64), run % runs * TOKENS, run.to(tl.int64)


@triton.jit
def _taps(weight, c, inside, K: tl.constexpr):
    """Weights (BLOCK_C,) by lag, tap 0 on the present input."""
    # One wide load of (BLOCK_C, 4): tap by tap each lane would touch a sector of its own, K times over.
    k = tl.arange(0, 4)[None, :]
    tile = tl.load(weight + c[:, None] * K + k, mask=inside[:, None] & (k < K), other=0.0).to(tl.float32)
    taps = ()
    for lag in tl.static_range(K):
        taps = taps + (tl.sum(tl.where(k == K - 1 - lag, tile, 0.0), axis=1),)
    return taps


@triton.jit
def _document(ids, row, t, L):
    """The document of token t, -1 before and after the row."""
    within = (t >= 0) & (t < L)
    if ids is None:
        document = tl.where(within, row, -1)
    else:
        document = tl.load(ids + row * L + t, mask=within, other=-1).to(tl.int64)
    return document


@triton.jit
def _ends(ids, row, oldest, after, L, EDGES: tl.constexpr):
    """The documents of two tokens: where they are the same, all between are of it too."""
    if EDGES:
        ends = (_document(ids, row, oldest, L), _document(ids, row, after, L))
    else:
        ends = (row, row)
    return ends


@triton.jit
def _source(base, step, units, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, PAIRS: tl.constexpr):
    """What `_rows` reads: pointer, step from token to token, this program's places, and which exist.

    Neighbouring channels of 16 bits, PAIRS of that type, are read as one integer: kept apart, each would take
    a register of its own while it waits to be worked on, and be waited for to be put there.
    """
    block = tl.program_id(0) % tl.cdiv(units * ALIGN, BLOCK_C)
    if PAIRS is not None:
        c = block * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
        inside = c < units * (ALIGN // 2)
        source = (base.to(tl.pointer_type(tl.int32)), step.to(tl.int64) * (ALIGN // 2), c, inside)
    else:
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        source = (base, step.to(tl.int64) * ALIGN, c, c < units * ALIGN)
    return source


@triton.jit
def _rows(source, t, L, COUNT: tl.constexpr):
    """COUNT tokens from t on, as they are stored; zeros outside the row."""
    base, step, c, inside = source
    rows = ()
    for i in tl.static_range(COUNT):
        live = inside & (t + i >= 0) & (t + i < L)
        rows = rows + (tl.load(base + (t + i) * step + c, mask=live, other=0),)
    return rows


@triton.jit
def _floats(values, PAIRS: tl.constexpr):
    """What `_rows` read, in fp32."""
    if PAIRS is None:
        floats = values.to(tl.float32)
    elif tl.bfloat16 == PAIRS:
        even = (values << 16).to(tl.float32, bitcast=True)
        odd = (values & -65536).to(tl.float32, bitcast=True)
        floats = tl.interleave(even, odd)
    else:
        even = (values & 65535).to(tl.int16).to(PAIRS, bitcast=True)
        odd = (values >> 16).to(tl.int16).to(PAIRS, bitcast=True)
        floats = tl.interleave(even.to(tl.float32), odd.to(tl.float32))
    return floats


@triton.jit
def _restart(window, starts, document, initial, C, c, inside, K: tl.constexpr):
    """The window, newest input first, or where a document starts what came before its first token."""
    fresh = ()
    for lag in tl.static_range(1, K):
        if initial is None:
            fresh = fresh + (tl.where(starts, 0.0, window[lag - 1]),)
        else:
            at = initial + (document * K + K - lag) * C + c
            before = tl.load(at, mask=inside & starts & (document >= 0), other=0.0).to(tl.float32)
            fresh = fresh + (tl.where(starts, before, window[lag - 1]),)
    return fresh


@triton.jit
def _window(
    x, ids, row, first, L, initial, C, c, inside, EDGES: tl.constexpr, PAIRS: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """The K - 1 inputs before token `first`, newest first."""
    history = _rows(x, first - (K - 1), L, K - 1)
    window = ()
    for lag in tl.static_range(1, K):
        window = window + (_floats(history[K - 1 - lag], PAIRS),)
    if EDGES:
        for i in tl.static_range(K - 1):
            t = first - (K - 1) + i
            document = _document(ids, row, t, L)
            starts = document != _document(ids, row, t - 1, L)
            window = _restart(window, starts, document, initial, C, c, inside, K)
            window = (_floats(history[i], PAIRS),) + window[: K - 2]
    return window


@triton.jit
def _convolve(now, window, taps, shift, K: tl.constexpr):
    """The pre-activation."""
    a = shift + taps[0] * now
    for lag in tl.static_range(1, K):
        a += taps[lag] * window[lag - 1]
    return a


@triton.jit
def _output(y, now, window, taps, shift, live, SILU: tl.constexpr, K: tl.constexpr):
    """Write one output."""
    a = _convolve(now, window, taps, shift, K)
    if SILU:
        a *= sigmoid(a)
    tl.store(y, a.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    x,  # (B, L, C), row and token strides in units of ALIGN
    weight,  # (C, K)
    bias,  # (C,) or None
    ids,  # (B, L) or None
    initial,  # (n_docs, K, C) or None
    y,  # (B, L, C)
    final,  # (n_docs, K, C) or None
    L, units, x_row, x_step,
    SILU: tl.constexpr, K: tl.constexpr, ALIGN: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Convolve one run of tokens."""
    tl.static_assert(TOKENS % UNROLL == 0)
    EDGES: tl.constexpr = ids is not None or initial is not None or final is not None
    c, inside, row, first, _ = _place(L, units, ALIGN, BLOCK_C, TOKENS)
    # 64 bits: offsets pass 2^31 in a long batch. A multiple of ALIGN tells Triton that loads can be wide.
    C = units.to(tl.int64) * ALIGN
    x = _source(x + row * x_row * ALIGN, x_step, units, ALIGN, BLOCK_C, PAIRS)
    y += row * L * C
    taps = _taps(weight, c, inside, K)
    shift = 0.0
    if bias is not None:
        shift = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    window = _window(x, ids, row, first, L, initial, C, c, inside, EDGES, PAIRS, K)
    last = min(first + TOKENS, L)
    rows = _rows(x, first, last, UNROLL)
    ends = _ends(ids, row, first - 1, first + UNROLL, L, EDGES)
    for t in range(first, last, UNROLL):
        next_rows = _rows(x, t + UNROLL, last, UNROLL)
        next_ends = _ends(ids, row, t + UNROLL - 1, t + 2 * UNROLL, L, EDGES)
        plain: tl.constexpr = True
        if EDGES:
            plain = (ends[0] >= 0) & (ends[0] == ends[1])
        if plain:
            for i in tl.static_range(UNROLL):
                now = _floats(rows[i], PAIRS)
                at = y + (t + i) * C + c
                _output(at, now, window, taps, shift, inside & (t + i < L), SILU, K)
                window = (now,) + window[: K - 2]
        else:
            for s in range(t, min(t + UNROLL, last)):
                document = _document(ids, row, s, L)
                starts = document != _document(ids, row, s - 1, L)
                window = _restart(window, starts, document, initial, C, c, inside, K)
                now = _floats(_rows(x, s, L, 1)[0], PAIRS)
                _output(y + s * C + c, now, window, taps, shift, inside, SILU, K)
                if final is not None:
                    closes = inside & (document != _document(ids, row, s + 1, L))
                    at = final + (document * K + K - 1) * C + c
                    tl.store(at, now, mask=closes)
                    for lag in tl.static_range(1, K):
                        tl.store(at - lag * C, window[lag - 1], mask=closes)
                window = (now,) + window[: K - 2]
        rows, ends = next_rows, next_ends


@triton.jit
def _advance(now, grad, window, pending, sums, taps, shift, SILU: tl.constexpr, K: tl.constexpr):
    """One token backward: the gradient completed, of K - 1 tokens ago, and what is carried on.

    pending holds the gradients of the inputs still in reach, newest first, sums those of weight and bias.
    """
    g = grad
    if SILU:
        a = _convolve(now, window, taps, shift, K)
        s = sigmoid(a)
        g = grad * (s + s * a * (1.0 - s))
    done = pending[K - 2] + taps[K - 1] * g
    behind = (taps[0] * g,)
    total = (sums[0] + g * now,)
    for lag in tl.static_range(1, K):
        if lag < K - 1:
            behind = behind + (pending[lag - 1] + taps[lag] * g,)
        total = total + (sums[lag] + g * window[lag - 1],)
    return done, (now,) + window[: K - 2], behind, total + (sums[K] + g,)


@triton.jit
def _deliver(value, token, began, document, when, sinks, bounds, C, c, K: tl.constexpr):
    """Write an input's gradient: to dx, or to dinitial where `token` lies before its document's first."""
    dx, dinitial, step = sinks
    low, high = bounds
    live = when & (token >= began) & (token >= low) & (token < high)
    tl.store(dx + token * step + c, value.to(dx.dtype.element_ty), mask=live)
    if dinitial is not None:
        # Documents that begin past this run are the next one's to write.
        live = when & (token < began) & (began < high)
        at = dinitial + (document * K + K + token - began) * C + c
        tl.store(at, value.to(dinitial.dtype.element_ty), mask=live)


@triton.jit
def _group(
    x, dy, rows, grads, ends, t, carry, taps, shift, ids, row, initial, dfinal, sinks, bounds, L, C, c,
    inside, EDGES: tl.constexpr, PAIRS: tl.constexpr, COUNT: tl.constexpr, SILU: tl.constexpr, K:
    tl.constexpr,
):  # fmt: skip
    """Walk backward's COUNT tokens from t on; returns carry: window, pending, sums, and where began."""
    window, pending, sums, began = carry
    plain: tl.constexpr = True
    if EDGES:
        plain = (ends[0] >= 0) & (ends[0] == ends[1])
    if plain:
        for i in tl.static_range(COUNT):
            now, grad = _floats(rows[i], PAIRS), _floats(grads[i], PAIRS)
            done, window, pending, sums = _advance(now, grad, window, pending, sums, taps, shift, SILU, K)
            token = t + i - (K - 1)
            live = inside & (token >= bounds[0]) & (token < bounds[1])
            tl.store(sinks[0] + token * sinks[2] + c, done.to(sinks[0].dtype.element_ty), mask=live)
    else:
        for s in range(t, t + COUNT):
            document = _document(ids, row, s, L)
            starts = document != _document(ids, row, s - 1, L)
            closes = (document >= 0) & (document != _document(ids, row, s + 1, L))
            began = tl.where(starts, s, began)
            window = _restart(window, starts, document, initial, C, c, inside, K)
            cleared = ()
            for j in tl.static_range(K - 1):
                cleared = cleared + (tl.where(starts, 0.0, pending[j]),)
            now = _floats(_rows(x, s, L, 1)[0], PAIRS)
            grad = _floats(_rows(dy, s, L, 1)[0], PAIRS)
            done, window, pending, sums = _advance(now, grad, window, cleared, sums, taps, shift, SILU, K)
            if dfinal is not None:
                at = dfinal + document * K * C + c
                done += tl.load(at, mask=inside & closes, other=0.0).to(tl.float32)
                kept = ()
                for j in tl.static_range(K - 1):
                    more = tl.load(at + (K - 1 - j) * C, mask=inside & closes, other=0.0)
                    kept = kept + (pending[j] + more.to(tl.float32),)
                pending = kept
            _deliver(done, s - (K - 1), began, document, inside & (document >= 0), sinks, bounds, C, c, K)
            if closes:
                for j in tl.static_range(K - 1):
                    _deliver(pending[j], s - j, began, document, inside, sinks, bounds, C, c, K)
            if sinks[1] is not None:  # noqa: SIM102 (known when compiling, the other is not)
                if starts & (document >= 0):
                    # Column 0 of an initial state is older than any window: it is only handed on, or dropped.
                    zero = tl.zeros_like(done)
                    _deliver(zero, s - K, began, document, inside, sinks, bounds, C, c, K)
    return window, pending, sums, began


@triton.jit(do_not_specialize=[*_SIZES, "dy_row", "dy_step", "dx_step"])
def _backward(
    x,  # (B, L, C), row and token strides in units of ALIGN
    dy,  # (B, L, C), likewise
    weight,  # (C, K)
    bias,  # (C,) or None
    ids,  # (B, L) or None
    initial,  # (n_docs, K, C) or None
    dfinal,  # (n_docs, K, C) or None
    dx,  # (B, L, C), token stride in units of ALIGN, rows after one another
    dinitial,  # (n_docs, K, C) or None
    partial,  # (runs, K + 1, C): gradients of the taps by lag, then of the bias
    L, units, x_row, x_step, dy_row, dy_step, dx_step,
    SILU: tl.constexpr, K: tl.constexpr, ALIGN: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradients of one run of tokens, and its share of the parameters'."""
    tl.static_assert(TOKENS % UNROLL == 0)
    EDGES: tl.constexpr = ids is not None or initial is not None or dfinal is not None
    c, inside, row, first, run = _place(L, units, ALIGN, BLOCK_C, TOKENS)
    C = units.to(tl.int64) * ALIGN
    x = _source(x + row * x_row * ALIGN, x_step, units, ALIGN, BLOCK_C, PAIRS)
    dy = _source(dy + row * dy_row * ALIGN, dy_step, units, ALIGN, BLOCK_C, PAIRS)
    step = dx_step.to(tl.int64) * ALIGN
    sinks = (dx + row * L * step, dinitial, step)
    taps = _taps(weight, c, inside, K)
    shift = 0.0
    if bias is not None:
        shift = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    zero = tl.zeros((BLOCK_C,), tl.float32)
    window = _window(x, ids, row, first, L, initial, C, c, inside, EDGES, PAIRS, K)
    pending, sums = (), (zero, zero)
    for _ in tl.static_range(K - 1):
        pending, sums = pending + (zero,), sums + (zero,)
    last = min(first + TOKENS, L)
    bounds = (first, last)
    # A document begun in an earlier run: before every token that this run can still reach.
    began = first - K
    rows, grads = _rows(x, first, last, UNROLL), _rows(dy, first, last, UNROLL)
    ends = _ends(ids, row, first - (K - 1), first + UNROLL, L, EDGES)
    for t in range(first, last, UNROLL):
        next_rows, next_grads = _rows(x, t + UNROLL, last, UNROLL), _rows(dy, t + UNROLL, last, UNROLL)
        next_ends = _ends(ids, row, t + UNROLL - (K - 1), t + 2 * UNROLL, L, EDGES)
        window, pending, sums, began = _group(
            x, dy, rows, grads, ends, t, (window, pending, sums, began), taps, shift, ids, row, initial,
            dfinal, sinks, bounds, L, C, c, inside, EDGES, PAIRS, UNROLL, SILU, K,
        )  # fmt: skip
        rows, grads, ends = next_rows, next_grads, next_ends
    for lag in tl.static_range(K + 1):
        tl.store(partial + (run * (K + 1) + lag) * C + c, sums[lag], mask=inside)
    after = first + tl.cdiv(last - first, UNROLL) * UNROLL
    rows, grads = _rows(x, after, L, K - 1), _rows(dy, after, L, K - 1)
    ends = _ends(ids, row, after - (K - 1), after + K - 1, L, EDGES)
    _group(
        x, dy, rows, grads, ends, after, (window, pending, sums, began), taps, shift, ids, row, initial,
        dfinal, sinks, bounds, L, C, c, inside, EDGES, PAIRS, K - 1, SILU, K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["runs", "C"])
def _reduce(partial, dweight, dbias, runs, C, K: tl.constexpr, RUNS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Add the runs' gradients of one tap, or of the bias, in order."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    lag = tl.program_id(1)
    total = tl.zeros((RUNS, BLOCK_C), tl.float32)
    for start in range(0, runs, RUNS):
        run = start + tl.arange(0, RUNS)[:, None]
        at = partial + (run.to(tl.int64) * (K + 1) + lag) * C + c[None, :]
        total += tl.load(at, mask=(run < runs) & (c[None, :] < C), other=0.0)
    value = tl.sum(total, axis=0)
    if lag < K:
        tl.store(dweight + c * K + (K - 1 - lag), value.to(dweight.dtype.element_ty), mask=c < C)
    elif dbias is not None:
        tl.store(dbias + c, value.to(dbias.dtype.element_ty), mask=c < C)


@triton.jit
def _step(
    state,  # (B, C, K), any strides
    x,  # (B, C), channel stride 1
    weight,  # (C, K)
    bias,  # (C,) or None
    y,  # (B, C)
    C, x_row, state_row, state_channel, state_column,
    SILU: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Roll the window of BLOCK_C channels of a row and convolve it."""
    blocks = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    at = state + row * state_row + c.to(tl.int64) * state_channel
    taps = _taps(weight, c, inside, K)
    # What the state holds in its own dtype is what is convolved, as in the reference.
    newest = tl.load(x + row * x_row + c, mask=inside, other=0.0).to(tl.float32).to(state.dtype.element_ty)
    window = ()
    for lag in tl.static_range(1, K):
        window = window + (tl.load(at + (K - lag) * state_column, mask=inside, other=0.0),)
    a = taps[0] * newest.to(tl.float32)
    for lag in tl.static_range(1, K):
        a += taps[lag] * window[lag - 1].to(tl.float32)
    if bias is not None:
        a += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        a *= sigmoid(a)
    tl.store(at + (K - 1) * state_column, newest, mask=inside)
    for lag in tl.static_range(1, K):
        tl.store(at + (K - 1 - lag) * state_column, window[lag - 1], mask=inside)
    tl.store(y + row * C + c, a.to(y.dtype.element_ty), mask=inside)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    doc_ids: Tensor | None,
    n_docs: int,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute `kernels.causal_conv1d` (same arguments); float64 by the reference."""
    if x.dtype == torch.float64:
        return reference.causal_conv1d(
            x,
            weight,
            bias,
            activation=activation,
            doc_ids=doc_ids,
            n_docs=n_docs,
            initial_state=initial_state,
            return_final_state=return_final_state,
        )
    # The kernels hold states as (n_docs, K, C), so that neighbouring channels are neighbours in memory.
    initial = None if initial_state is None else initial_state.transpose(1, 2)
    y, final = _conv(x, weight, bias, doc_ids, initial, n_docs, activation == "silu", return_final_state)
    return y, final.transpose(1, 2) if return_final_state else None


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None
) -> Tensor:
    """Compute `kernels.causal_conv1d_step` (same arguments); float64 by the reference."""
    if x.dtype == torch.float64:
        return reference.causal_conv1d_step(state, x, weight, bias, activation=activation)
    return _conv_step(state, x, weight, bias, activation == "silu")


def _config(
    kernel: str, x: Tensor, taps: int, pairs: tl.dtype | None, ids: Tensor | None, *states: Tensor | None
) -> tuned.Config:
    """Launch configuration for x (B, L, C): of its shape, never of how many multiprocessors there are."""
    batch, length, channels = x.shape
    backward = kernel == "causal_conv1d_backward"
    edges = 2 if any(state is not None for state in states) else int(ids is not None)
    size = (256 if backward else 512) // x.element_size()
    # Longer runs leave fewer sums to add, and fewer inputs that two programs read.
    fallback = {
        "BLOCK_C": max(32, min(size, triton.next_power_of_2(channels))),
        "TOKENS": 128 if backward else 32,
    }
    # Two groups live in registers at a time: of four tokens where there is more to keep.
    fallback["UNROLL"] = 4 if (backward and edges) or (pairs is None and x.element_size() == 2) else 8
    # What the common path needs; left alone, ptxas takes every register there is for a few more loads ahead.
    registers = (168, 128, 168)[edges] if backward else 168
    fallback |= {"num_warps": 1, "num_stages": 1, "maxnreg": registers}
    dtype = str(x.dtype).removeprefix("torch.")
    key = f"C={channels},K={taps},dtype={dtype}" + ("", ",documents", ",states")[edges]
    config = tuned.lookup(kernel, x.device, key, fallback)
    tokens, blocks = config["TOKENS"], -(-channels // config["BLOCK_C"])
    while tokens > max(16, config["UNROLL"]) and batch * -(-length // tokens) * blocks < PROGRAMS:
        tokens //= 2
    return {**config, "TOKENS": tokens}


def _grid(x: Tensor, config: tuned.Config) -> tuple[int]:
    batch, length, channels = x.shape
    return (batch * -(-length // config["TOKENS"]) * -(-channels // config["BLOCK_C"]),)


def _rowwise(t: Tensor) -> Tensor:
    """Return t, copied only if its channels are not neighbours in memory."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copy what is not contiguous: small tensors all, next to x."""
    return [None if t is None else t.contiguous() for t in tensors]


def _aligned(channels: int, *rows: Tensor) -> tuple[int, list[int]]:
    """Return the largest power of 2 up to 16 that divides all sizes, and the sizes divided by it."""
    sizes = [channels, *(stride for t in rows for stride in t.stride()[:2])]
    align = math.gcd(16, *sizes)
    return align, [size // align for size in sizes]


def _pairs(align: int, *rows: Tensor) -> tl.dtype | None:
    """Return the type of neighbouring channels that can be read as one integer, in all tensors, or None."""
    if align % 2 or any(t.data_ptr() % 4 for t in rows):
        return None
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(rows[0].dtype)


def _empty(like: Tensor | None, x: Tensor) -> Tensor:
    """Memory for a gradient; an op has to return a tensor where there is none too."""
    if like is None:
        return torch.empty(0, device=x.device)
    return torch.empty(like.shape, dtype=like.dtype, device=x.device)


@op(
    "causal_conv1d",
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? doc_ids, Tensor? initial, int n_docs, bool silu,"
    " bool keep_final) -> (Tensor, Tensor)",
)
def _conv(x, weight, bias, doc_ids, initial, n_docs, silu, keep_final):
    """Return y (B, L, C) and final windows (n_docs, K, C) in fp32 or empty; initial (n_docs, K, C)."""
    y, final = _outputs(x, weight, n_docs, keep_final)
    channels, taps = weight.shape
    x = _rowwise(x)
    align, sizes = _aligned(channels, x)
    states = (initial, final if keep_final else None)
    pairs = _pairs(align, x)
    config = _config("causal_conv1d_forward", x, taps, pairs, doc_ids, *states)
    arrays = (x, *_dense(weight, bias, doc_ids, initial), y, states[1])
    constants = {"SILU": silu, "K": taps, "ALIGN": align, "PAIRS": pairs, **config}
    _forward[_grid(x, config)](*arrays, x.shape[1], *sizes, **constants)
    return y, final


@_conv.register_fake
def _(x, weight, bias, doc_ids, initial, n_docs, silu, keep_final):
    """Shapes of `_conv`."""
    return _outputs(x, weight, n_docs, keep_final)


def _outputs(x: Tensor, weight: Tensor, n_docs: int, keep_final: bool) -> tuple[Tensor, Tensor]:
    final = (n_docs, weight.shape[1], weight.shape[0]) if keep_final else (0,)
    return _empty(x, x), torch.empty(final, dtype=torch.float32, device=x.device)


@op(
    "causal_conv1d_back",
    schema="(Tensor grad_y, Tensor? grad_final, Tensor x, Tensor weight, Tensor? bias, Tensor? doc_ids,"
    " Tensor? initial, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _conv_back(grad_y, grad_final, x, weight, bias, doc_ids, initial, silu, room=None):
    """Return the gradients of x (in `room` if given), weight, bias and initial, empty for what is None."""
    channels, taps = weight.shape
    dx = _empty(x, x) if room is None else room
    dweight, dbias, dinitial = (_empty(t, x) for t in (weight, bias, initial))
    x, grad_y = _rowwise(x), _rowwise(grad_y)
    align, sizes = _aligned(channels, x, grad_y, dx)
    del sizes[-2]  # between rows of dx, which follow one another
    pairs = _pairs(align, x, grad_y)
    config = _config("causal_conv1d_backward", x, taps, pairs, doc_ids, initial, grad_final)
    runs = x.shape[0] * -(-x.shape[1] // config["TOKENS"])
    partial = torch.empty((runs, taps + 1, channels), dtype=torch.float32, device=x.device)
    inputs = (x, grad_y, *_dense(weight, bias, doc_ids, initial, grad_final))
    arrays = (*inputs, dx, None if initial is None else dinitial, partial)
    constants = {"SILU": silu, "K": taps, "ALIGN": align, "PAIRS": pairs, **config}
    _backward[_grid(x, config)](*arrays, x.shape[1], *sizes, **constants)
    _reduce[(-(-channels // 32), taps + (bias is not None))](
        partial, dweight, None if bias is None else dbias, runs, channels, K=taps, RUNS=32, BLOCK_C=32
    )
    return dx, dweight, dbias, dinitial


@_conv_back.register_fake
def _(grad_y, grad_final, x, weight, bias, doc_ids, initial, silu):
    """Shapes of `_conv_back`."""
    return tuple(_empty(t, x) for t in (x, weight, bias, initial))


def _keep(ctx, inputs, output) -> None:
    *kept, _, ctx.silu, ctx.keep_final = inputs
    ctx.place = place_of(inputs[0])
    ctx.save_for_backward(*kept)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_y: Tensor | None, grad_final: Tensor | None):
    saved = ctx.saved_tensors  # once: activation recompute does not unpack them twice
    x, _, bias, _, initial = saved
    if grad_y is None:
        grad_y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_final = grad_final if ctx.keep_final else None
    back = _conv_back.into(ctx.place)
    dx, dweight, dbias, dinitial = back(grad_y, grad_final, *saved, ctx.silu)
    absent = None if bias is None else dbias, None, None if initial is None else dinitial
    return dx, dweight, *absent, None, None, None


_conv.register_autograd(_differentiate, setup_context=_keep)


@op(
    "causal_conv1d_step",
    mutates_args=("state",),
    schema="(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor",
)
def _conv_step(state, x, weight, bias, silu):
    """Roll state (B, C, K) in place by x (B, C); returns y (B, C)."""
    y, x = _empty(x, x), _rowwise(x)
    rest = (y, x.shape[1], x.stride(0), *state.stride())
    constants = {"SILU": silu, "K": weight.shape[1], "BLOCK_C": 128}
    # One warp, whose lanes store what they loaded: rolling in place needs no barrier.
    grid = (x.shape[0] * -(-x.shape[1] // 128),)
    _step[grid](state, x, *_dense(weight, bias), *rest, **constants, num_warps=1)
    return y


@_conv_step.register_fake
def _(state, x, weight, bias, silu):
    """Shape of `_conv_step`."""
    return _empty(x, x)
