"""The selective scan for up to sixteen states, with explicit layouts: backwards.

What is computed, and in which order, is told in `triton_backward`; how it is laid out, in `triton_n16`. A
block of EVERY tokens is walked from the state that the forward pass kept, and the states each SPAN tokens go
to a scratch in memory, small enough for the L2 cache; then it is gone back through, a span's states in
registers.

A lane's share of the sums over channels, for each token four states of dB and of dC over two channels, goes
to shared memory, where the program's other lanes add it up a span at a time. Copies begin behind the barrier
that this takes: what they overwrite has been read by then, and a barrier of their own is saved.

The code of the loops has to stay small: unrolled over a tile it is slower by a fifth.
"""

# Triton's tuples grow by addition only, which changes their type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, union-attr"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ssmtrain.kernels.selective_scan.triton_n16 import (
    BE,
    LOG2E,
    SPAN,
    SPANS,
    STATES,
    barrier,
    copy_pairs,
    copy_rows,
    document,
    gathered,
    kept,
    of_token,
    pair,
    parameters,
    places,
    power,
    ring_of_pairs,
    ring_of_rows,
    sigmoid,
    step_of,
    swapped,
    walk,
    window,
)

HALF = gl.constexpr(BE.value // 2)
LINEAR = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))
# Two buffers of a span's first states, four states of a channel together as in `places`.
HELD = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]))
HELD_BY_LANE = gl.constexpr(gl.BlockedLayout([1, 4, 1, 2], [4, 1, 8, 1], [1, 1, 4, 1], [1, 3, 0, 2]))
# Shares (8 * SPAN, 4 * HALF) of lanes, rows (token, B or C, four of n), columns (lane, n): eight rows a warp.
# Eight lanes write four rows and read two, the next but one, in different banks.
SHARES = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
ADD = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 16], [0, 32], [0, 64]],
        [[0, 4], [0, 8], [2, 0], [1, 0], [4, 0]],
        [[8, 0], [16, 0]],
        [],
        [32, 128],
    )
)
# Their sums over lanes (8 * SPAN, 4): a lane's is that of one of four n, 0, 2, 1 and 3.
COLUMNS = gl.constexpr(
    gl.DistributedLinearLayout([], [[0, 1], [0, 2], [2, 0], [1, 0], [4, 0]], [[8, 0], [16, 0]], [], [32, 4])
)


@gluon.jit
def shared(of_B, of_C):
    """Return the sums over a lane's two channels of (4, 4, channels) twice: (4, channels / 2, 4, 2)."""
    of_B = gl.permute(gl.sum(gl.reshape(of_B, [4, 4, HALF, 2]), 3), [0, 2, 1])
    of_C = gl.permute(gl.sum(gl.reshape(of_C, [4, 4, HALF, 2]), 3), [0, 2, 1])
    return gl.join(of_B, of_C)


@gluon.jit
def stacked(tokens):
    """Return four tokens' `shared` as rows of shares (8 * SPAN, 4 * HALF)."""
    even, odd = gl.join(tokens[0], tokens[2]), gl.join(tokens[1], tokens[3])
    both = gl.join(even, odd)  # (4, HALF, 4, B or C, token // 2, token % 2)
    return gl.reshape(gl.permute(both, [4, 5, 3, 0, 1, 2]), [8 * SPAN, 4 * HALF])


@gluon.jit
def added(parts):
    """Add shares (8 * SPAN, 4 * HALF) over lanes: (8 * SPAN, 4), as in COLUMNS."""
    four = gl.sum(gl.reshape(parts.load(ADD), [8 * SPAN, HALF // 4, 4, 4]), 1)
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, four.type.layout)))[None, :, None]
    even, odd = gl.split(gl.reshape(four, [8 * SPAN, 4, 2, 2]))
    low, high = gl.split(swapped(even, odd, gl.convert_layout(lane, even.type.layout), 2, 1))
    lane = gl.arange(0, 4, gl.SliceLayout(0, low.type.layout))[None, :]
    return gl.convert_layout(swapped(low, high, lane, 1, 1), COLUMNS, assert_trivial=True)


@gluon.jit
def copy_held(to, scratch, s):
    """Begin to copy the states (16 * BE) with which a span begins into shared memory."""
    i = gl.arange(0, 16 * BE, LINEAR)
    async_copy.async_copy_global_to_shared(to, scratch + s * (16 * BE) + i)


@gluon.jit
def copy_back(rings, BC, tensors, at, tile, rest, column, columns, STRIDES: gl.constexpr):
    """Begin to copy a tile of a block of `rest` tokens, the first at `at`; zeros where there is none."""
    TILE: gl.constexpr = rings[0].shape[1]
    # Rows before the block's first are none.
    some = gl.where(tile >= 0, rest, tile * TILE)
    copy_pairs(rings[0].index(tile & 1), BC + at * 32, tile * TILE, some)
    for i in gl.static_range(len(tensors)):
        to = rings[1 + i].index(tile & 1)
        copy_rows(to, tensors[i] + at * STRIDES[i], STRIDES[i], tile * TILE, some, column, columns)


@gluon.jit
def tile_of(q):
    """Return where (SPAN, channels) lie in a tile of ours."""
    return q * BE + gl.arange(0, BE, gl.SliceLayout(0, SPANS))[None, :]


@gluon.jit(do_not_specialize=["length", "tokens", "n_windows", "n_turns"])
def backward(
    d_y, u, dt, A,
    BC,  # (B * L, 2, 16), fp32
    D, z, bias, ids, docs, initial, enter, marks,
    leave,  # (windows, N, E): gradients of the state that leaves a window's last piece; or None
    d_final,  # (n_docs, N, E) or None
    scratch,  # (programs, EVERY // SPAN, 16 * BE)
    d_u, d_dt, d_z,  # (B, L, E), tokens of d_z at a distance; d_z or None
    shares,  # (blocks, tokens, 2, 16): of dB and dC
    d_A,  # (windows, blocks, 16 * BE), as marks
    sums,  # (2, windows, E): of dD and d_bias
    d_initial,  # (n_docs, N, E) or None
    turns,  # (1 + chains,), zeros: turns begun; of each chain, a window's 64 channels, turns done
    ends,  # (chains,): where a chain's next turn begins, int64
    carry,  # (chains, 40 * BE): what a chain's turn leaves to the next; unused, as both before, with one turn
    length, tokens, n_windows, n_turns, E, N, low, high,
    S_DY: gl.constexpr, S_U: gl.constexpr, S_DT: gl.constexpr, S_Z: gl.constexpr, S_DZ: gl.constexpr,
    W: gl.constexpr, EVERY: gl.constexpr, TILE: gl.constexpr, SOFTPLUS: gl.constexpr,
):  # fmt: skip
    """Go back through a turn's share of the pieces of one window for 64 channels."""
    PACKED: gl.constexpr = ids is not None
    dtype: gl.constexpr = u.dtype.element_ty
    EXACT: gl.constexpr = dtype == gl.float32
    RING: gl.constexpr = 2 * TILE // SPAN  # spans
    blocks = (E + BE - 1) // BE
    chains = gl.num_programs(0) // n_turns
    # The number of turns is no constant: compiled for it, sums might round in another way.
    chain = gl.program_id(0)
    turn = chain // chains
    if n_turns > 1:
        # Taken in the order in which programs begin, so that whoever is waited for has begun.
        ticket = gl.atomic_add(turns, 1, sem="relaxed")
        chain = ticket % chains
        turn = ticket // chains
    w = chain // blocks
    block = chain % blocks
    at_state, inside, own = places(block, E, N, E)
    rates, skip, shift = parameters(A, D, bias, at_state, inside, block, E)
    ring_u, inputs = ring_of_rows(dtype, TILE)
    ring_dt, raws = ring_of_rows(dtype, TILE)
    ring_dy, grads = ring_of_rows(dtype, TILE)
    ring, pairs = ring_of_pairs(TILE)
    rings, tensors = (ring, ring_u, ring_dt, ring_dy), (u, dt, d_y)
    if z is not None:
        ring_z, gates = ring_of_rows(dtype, TILE)
        rings, tensors = rings + (ring_z,), tensors + (z,)
    STRIDES: gl.constexpr = (S_U, S_DT, S_DY, S_Z)
    held = gl.allocate_shared_memory(gl.float32, [2, 2, HALF, 4, 4], HELD)
    held_line = held._reinterpret(gl.float32, [2, 16 * BE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    parts = gl.allocate_shared_memory(gl.float32, [8 * SPAN, 4 * HALF], SHARES)
    q = gl.arange(0, SPAN, gl.SliceLayout(1, SPANS))[:, None]
    e = block * BE + gl.arange(0, BE, gl.SliceLayout(0, SPANS))[None, :]
    tile = q * E + e
    lane = gl.arange(0, 4, gl.SliceLayout(0, COLUMNS))[None, :]
    column = gl.arange(0, 8 * SPAN, gl.SliceLayout(1, COLUMNS))[:, None] * 4 + (lane // 2 + lane % 2 * 2)
    scratch += chain.to(gl.int64) * (EVERY // SPAN * 16 * BE)
    shares += block.to(gl.int64) * tokens * 32
    all_A, g = gl.zeros([4, 4, BE], gl.float32, STATES), gl.zeros([4, 4, BE], gl.float32, STATES)
    sum_D, sum_bias = gl.zeros([SPAN, BE], gl.float32, SPANS), gl.zeros([SPAN, BE], gl.float32, SPANS)
    begin = window(ids, docs, w, length, tokens, W, PACKED)
    end = window(ids, docs, w + 1, length, tokens, W, PACKED)
    stop = begin + (end - begin) * (n_turns - 1 - turn) // n_turns
    if turn > 0:
        done = gl.atomic_cas(turns + 1 + chain, turn, turn, sem="acquire")
        while done < turn:
            done = gl.atomic_cas(turns + 1 + chain, turn, turn, sem="acquire")
        end = gl.load(ends + chain)
        room = carry + chain.to(gl.int64) * (40 * BE)
        g, all_A = gl.load(room + own), gl.load(room + 16 * BE + own)
        sum_D, sum_bias = gl.load(room + 32 * BE + tile_of(q)), gl.load(room + 36 * BE + tile_of(q))
    while end > stop:
        d, first, after = document(ids, docs, end - 1, length, PACKED)
        start = first + (end - 1 - first) // W * W
        last_of = gl.minimum(start + W, after)
        if end == last_of:
            g = gl.zeros([4, 4, BE], gl.float32, STATES)
            if d_final is not None:
                g = kept(d_final, d, at_state, inside & (end == after), E, N)
            if leave is not None:
                g += kept(leave, w.to(gl.int64), at_state, inside & (end != after), E, N)
        base = ((end - start).to(gl.int32) - 1) // EVERY * EVERY
        at = start + base
        rest = (end - at).to(gl.int32)  # tokens of this block
        spans = (rest + SPAN - 1) // SPAN
        barrier()
        copy_rows(ring_u.index(0), u + at * S_U, S_U, 0, rest, block * BE, E)
        copy_rows(ring_dt.index(0), dt + at * S_DT, S_DT, 0, rest, block * BE, E)
        copy_pairs(ring.index(0), BC + at * 32, 0, rest)
        async_copy.commit_group()
        h = gl.zeros([4, 4, BE], gl.float32, STATES)
        if initial is not None:
            h = kept(initial, d, at_state, inside & (start == first) & (base == 0), E, N)
        if enter is not None:
            h += kept(enter, w.to(gl.int64), at_state, inside & (start != first) & (base == 0), E, N)
        if marks is not None:
            h += gl.load(
                marks + (at // EVERY * blocks + block) * (16 * BE) + own,
                mask=(own >= 0) & (base > 0),
                other=0.0,
            )
        for ahead in range(0, spans * SPAN, TILE):
            async_copy.wait_group(0)
            barrier()
            now = ahead // TILE % 2
            copy_rows(ring_u.index(1 - now), u + at * S_U, S_U, ahead + TILE, rest, block * BE, E)
            copy_rows(ring_dt.index(1 - now), dt + at * S_DT, S_DT, ahead + TILE, rest, block * BE, E)
            copy_pairs(ring.index(1 - now), BC + at * 32, ahead + TILE, rest)
            async_copy.commit_group()
            barrier()
            for k in gl.static_range(TILE // SPAN):
                s = ahead // SPAN + k
                if s < spans:
                    gl.store(scratch + s * (16 * BE) + own, h)
                    x = inputs.index(now * (TILE // SPAN) + k).load(SPANS).to(gl.float32)
                    raw = raws.index(now * (TILE // SPAN) + k).load(SPANS)
                    live = (s * SPAN + q < rest) & (e < E)
                    step, _slope = step_of(raw, live, shift, low, high, SOFTPLUS)
                    h = walk(h, rates, step * LOG2E, step * x, pairs, now * TILE + k * SPAN, EXACT)[SPAN]
        # The tile with the last span is there, but for what only the way back needs.
        last = (spans - 1) * SPAN // TILE
        async_copy.wait_group(0)
        barrier()
        copy_rows(ring_dy.index(last % 2), d_y + at * S_DY, S_DY, last * TILE, rest, block * BE, E)
        if z is not None:
            copy_rows(ring_z.index(last % 2), z + at * S_Z, S_Z, last * TILE, rest, block * BE, E)
        copy_held(held_line.index((spans - 1) % 2), scratch, spans - 1)
        async_copy.commit_group()
        copy_back(rings, BC, tensors, at, last - 1, rest, block * BE, E, STRIDES)
        copy_held(held_line.index(spans % 2), scratch, gl.maximum(spans - 2, 0))
        async_copy.commit_group()
        sum_A = gl.zeros([4, 4, BE], gl.float32, STATES)
        for back_span in range(spans):
            s = spans - 1 - back_span
            t = s * SPAN
            async_copy.wait_group(1)  # not for what the span before has begun to copy
            barrier()
            here = s & (RING - 1)
            live = (t + q < rest) & (e < E)
            x = inputs.index(here).load(SPANS).to(gl.float32)
            step, slope = step_of(raws.index(here).load(SPANS), live, shift, low, high, SOFTPLUS)
            pull = grads.index(here).load(SPANS).to(gl.float32)
            if z is not None:
                gate = gates.index(here).load(SPANS).to(gl.float32)
                bend = sigmoid(gate)
                swish = gate * bend
                d_gate = pull * (bend + swish * (1.0 - bend))
                pull *= swish
            units, fed = step * LOG2E, step * x
            began = gl.reshape(held.index(s & 1).permute((2, 3, 1, 0)).load(HELD_BY_LANE), [4, 4, BE])
            began = gl.convert_layout(began, STATES, assert_trivial=True)
            # The state after the span's last token, h, is that before the next one's first.
            before = walk(began, rates, units, fed, pairs, SPAN * here, EXACT)
            throughs, bents, outs, mine = (), (), (), ()
            for j in gl.static_range(SPAN - 1, -1, -1):
                at_pair = 2 * (SPAN * here + j)
                keys, reads = pair(pairs, at_pair), pair(pairs, at_pair + 1)
                unit, pull_of = of_token(units, j), of_token(pull, j)
                if z is not None:
                    outs = (gl.sum(h * reads, 1),) + outs
                g += reads * pull_of
                mine = (shared(g * of_token(fed, j), h * pull_of),) + mine
                throughs = (gl.sum(g * keys, 1),) + throughs
                g *= power(rates * unit, EXACT)
                h = before[j]
                bent = g * h  # gradients of step * A
                bents = (gl.sum(bent * rates, 1),) + bents
                sum_A += bent * unit
            parts.store(stacked(mine))
            through = gathered(throughs)
            d_raw = (through * x + gathered(bents)) * slope
            sum_bias += d_raw
            sum_D += pull * x
            gl.store(d_dt + at * E + (t * E + tile), d_raw.to(d_dt.dtype.element_ty), mask=live)
            d_x = gl.fma(through, step, skip * pull)
            gl.store(d_u + at * E + (t * E + tile), d_x.to(d_u.dtype.element_ty), mask=live)
            if z is not None:
                d_gate *= gathered(outs) + skip * x
                gl.store(d_z + at * S_DZ + ((t + q) * S_DZ + e), d_gate.to(d_z.dtype.element_ty), mask=live)
            total = added(parts)
            # All have read this span's states, and the tile that came before this one.
            if ((t + SPAN) & (TILE - 1) == 0) & (back_span > 0):
                copy_back(rings, BC, tensors, at, t // TILE - 1, rest, block * BE, E, STRIDES)
            copy_held(held_line.index(s & 1), scratch, gl.maximum(s - 2, 0))
            async_copy.commit_group()
            gl.store(shares + at * 32 + (t * 32 + column), total, mask=column // 32 < rest - t)
        all_A += sum_A
        if d_initial is not None:
            gl.store(d_initial + d * E * N + at_state, g, mask=inside & (at == first))
        end = at
    if turn < n_turns - 1:
        gl.store(ends + chain, end)
        room = carry + chain.to(gl.int64) * (40 * BE)
        gl.store(room + own, g)
        gl.store(room + 16 * BE + own, all_A)
        gl.store(room + 32 * BE + tile_of(q), sum_D)
        gl.store(room + 36 * BE + tile_of(q), sum_bias)
        barrier()  # all threads have written before one of them says so
        gl.atomic_xchg(turns + 1 + chain, turn + 1, sem="release")
    else:
        gl.store(d_A + chain.to(gl.int64) * (16 * BE) + own, all_A * (1.0 / LOG2E))
        c = block * BE + gl.arange(0, BE, gl.SliceLayout(0, SPANS))
        gl.store(sums + w.to(gl.int64) * E + c, gl.sum(sum_D, 0), mask=c < E)
        gl.store(sums + (n_windows + w).to(gl.int64) * E + c, gl.sum(sum_bias, 0), mask=c < E)
