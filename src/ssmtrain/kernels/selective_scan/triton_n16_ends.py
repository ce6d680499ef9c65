"""What a window adds to the state, or its gradient, that passes through it, laid out as in `triton_n16`.

Where rows are longer than a window, these walk each once before the large kernels do, so that all windows
can then be walked at once; `triton_forward.join` hands on what they leave.
"""

# mypy: disable-error-code="assignment"

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
    TILE,
    barrier,
    copy_pairs,
    copy_rows,
    document,
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
    walk,
    window,
)

PER_TILE = gl.constexpr(TILE.value // SPAN.value)


@gluon.jit(do_not_specialize=["length", "tokens"])
def ends(
    u, dt, A,
    BC,  # (B * L, 2, 16), fp32
    bias, ids, docs, initial,
    left,  # (windows, N, E)
    steps_of,  # (windows, E)
    length, tokens, E, N, low, high,
    S_U: gl.constexpr, S_DT: gl.constexpr, W: gl.constexpr, SOFTPLUS: gl.constexpr,
):  # fmt: skip
    """Walk a window's last piece, where a later one goes on with it, as if nothing entered it.

    Writes the state that leaves and the sum of the piece's step sizes.
    """
    PACKED: gl.constexpr = ids is not None
    dtype: gl.constexpr = u.dtype.element_ty
    EXACT: gl.constexpr = dtype == gl.float32
    blocks = (E + BE - 1) // BE
    w = gl.program_id(0) // blocks
    block = gl.program_id(0) % blocks
    begin = window(ids, docs, w, length, tokens, W, PACKED)
    end = window(ids, docs, w + 1, length, tokens, W, PACKED)
    d, first, after = document(ids, docs, gl.maximum(end - 1, 0), length, PACKED)
    if (begin < end) & (end < after):
        at_state, inside, _own = places(block, E, N, E)
        rates, _skip, shift = parameters(A, None, bias, at_state, inside, block, E)
        ring_u, inputs = ring_of_rows(dtype, TILE)
        ring_dt, raws = ring_of_rows(dtype, TILE)
        ring, pairs = ring_of_pairs(TILE)
        q = gl.arange(0, SPAN, gl.SliceLayout(1, SPANS))[:, None]
        e = block * BE + gl.arange(0, BE, gl.SliceLayout(0, SPANS))[None, :]
        at = end - W
        copy_rows(ring_u.index(0), u + at * S_U, S_U, 0, W, block * BE, E)
        copy_rows(ring_dt.index(0), dt + at * S_DT, S_DT, 0, W, block * BE, E)
        copy_pairs(ring.index(0), BC + at * 32, 0, W)
        async_copy.commit_group()
        h = gl.zeros([4, 4, BE], gl.float32, STATES)
        if initial is not None:
            h = kept(initial, d, at_state, inside & (at == first), E, N)
        total = gl.zeros([SPAN, BE], gl.float32, SPANS)
        for ahead in range(0, W, TILE):
            async_copy.wait_group(0)
            barrier()
            now = ahead // TILE % 2
            copy_rows(ring_u.index(1 - now), u + at * S_U, S_U, ahead + TILE, W, block * BE, E)
            copy_rows(ring_dt.index(1 - now), dt + at * S_DT, S_DT, ahead + TILE, W, block * BE, E)
            copy_pairs(ring.index(1 - now), BC + at * 32, ahead + TILE, W)
            async_copy.commit_group()
            for k in gl.static_range(PER_TILE):
                x = inputs.index(now * PER_TILE + k).load(SPANS).to(gl.float32)
                raw = raws.index(now * PER_TILE + k).load(SPANS)
                step, _slope = step_of(raw, (q >= 0) & (e < E), shift, low, high, SOFTPLUS)
                total += step
                h = walk(h, rates, step * LOG2E, step * x, pairs, now * TILE + k * SPAN, EXACT)[SPAN]
        gl.store(left + w.to(gl.int64) * E * N + at_state, h, mask=inside)
        e = block * BE + gl.arange(0, BE, gl.SliceLayout(0, SPANS))
        gl.store(steps_of + w.to(gl.int64) * E + e, gl.sum(total, 0), mask=e < E)


@gluon.jit(do_not_specialize=["length", "tokens"])
def starts(
    d_y, dt, A,
    BC,  # (B * L, 2, 16), fp32
    z, bias, ids, docs, d_final,
    left,  # (windows, N, E)
    steps_of,  # (windows, E)
    length, tokens, E, N, low, high,
    S_DY: gl.constexpr, S_DT: gl.constexpr, S_Z: gl.constexpr, W: gl.constexpr, SOFTPLUS: gl.constexpr,
):  # fmt: skip
    """Go back through a window's first piece, where it goes on with a document, as if it were the last.

    Writes what comes from its own tokens of the gradient of the state that enters, and its summed step sizes.
    """
    PACKED: gl.constexpr = ids is not None
    dtype: gl.constexpr = dt.dtype.element_ty
    EXACT: gl.constexpr = dtype == gl.float32
    blocks = (E + BE - 1) // BE
    w = gl.program_id(0) // blocks
    block = gl.program_id(0) % blocks
    begin = window(ids, docs, w, length, tokens, W, PACKED)
    end = window(ids, docs, w + 1, length, tokens, W, PACKED)
    d, first, after = document(ids, docs, gl.minimum(begin, tokens - 1), length, PACKED)
    if (begin < end) & (begin != first):
        at_state, inside, _own = places(block, E, N, E)
        rates, _skip, shift = parameters(A, None, bias, at_state, inside, block, E)
        ring_dy, grads = ring_of_rows(dtype, TILE)
        ring_dt, raws = ring_of_rows(dtype, TILE)
        if z is not None:
            ring_z, gates = ring_of_rows(dtype, TILE)
        ring, pairs = ring_of_pairs(TILE)
        q = gl.arange(0, SPAN, gl.SliceLayout(1, SPANS))[:, None]
        e = block * BE + gl.arange(0, BE, gl.SliceLayout(0, SPANS))[None, :]
        size = gl.minimum(after - begin, W).to(gl.int32)
        g = gl.zeros([4, 4, BE], gl.float32, STATES)
        if d_final is not None:
            g = kept(d_final, d, at_state, inside & (begin + size == after), E, N)
        total = gl.zeros([SPAN, BE], gl.float32, SPANS)
        tiles = (size + TILE - 1) // TILE
        # One tile more: the first time round only begins to copy the last.
        for back in range(tiles + 1):
            async_copy.wait_group(0)
            barrier()
            ahead = (tiles - 1 - back) * TILE
            some = gl.where(ahead >= 0, size, ahead)  # rows before the piece's first are none
            now = (ahead // TILE + 2) % 2
            copy_rows(ring_dy.index(now), d_y + begin * S_DY, S_DY, ahead, some, block * BE, E)
            copy_rows(ring_dt.index(now), dt + begin * S_DT, S_DT, ahead, some, block * BE, E)
            if z is not None:
                copy_rows(ring_z.index(now), z + begin * S_Z, S_Z, ahead, some, block * BE, E)
            copy_pairs(ring.index(now), BC + begin * 32, ahead, some)
            async_copy.commit_group()
            if back > 0:
                now = 1 - now
                for behind in gl.static_range(PER_TILE - 1, -1, -1):
                    t = ahead + TILE + behind * SPAN
                    live = (t + q < size) & (e < E)
                    raw = raws.index(now * PER_TILE + behind).load(SPANS)
                    step, _slope = step_of(raw, live, shift, low, high, SOFTPLUS)
                    pull = grads.index(now * PER_TILE + behind).load(SPANS).to(gl.float32)
                    if z is not None:
                        gate = gates.index(now * PER_TILE + behind).load(SPANS).to(gl.float32)
                        pull *= gate * sigmoid(gate)
                    total += step
                    units = step * LOG2E
                    for j in gl.static_range(SPAN - 1, -1, -1):
                        reads = pair(pairs, 2 * (now * TILE + behind * SPAN + j) + 1)
                        g += reads * of_token(pull, j)
                        g *= power(rates * of_token(units, j), EXACT)
        gl.store(left + w.to(gl.int64) * E * N + at_state, g, mask=inside)
        e = block * BE + gl.arange(0, BE, gl.SliceLayout(0, SPANS))
        gl.store(steps_of + w.to(gl.int64) * E + e, gl.sum(total, 0), mask=e < E)
