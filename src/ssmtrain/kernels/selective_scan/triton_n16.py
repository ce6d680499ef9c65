"""The selective scan for up to sixteen states, with explicit layouts: forwards.

The kernels of `triton_forward` put a channel on a lane and all its states in it. That leaves too few warps to
hide anything behind one another, and a lane's states too many registers to go back with. Here a warp has 16
channels: a lane holds four states of two of them, so that there are twice the warps with half the registers.
What is taken once per channel and token (step size, gate, output) would now be taken four times; instead
spans of SPAN tokens are laid the other way, a lane two channels of one token. The four lanes that have a
channel's states are those that have its span's tokens, and neighbours: both ways go by shuffles. That needs
control over layouts and shared memory, so this is Gluon, Triton's dialect that has both.

Shared memory is what a warp waits for longest: a load of 16 bytes a lane takes its four cycles whether lanes
read the same or not.

All that is read comes into shared memory by copies that run a tile ahead: a plain load would make every
instruction wait that shares its counter.
"""

# Triton's tuples grow by addition only, which changes their type; and what is known when compiling has an if
# of its own.
# ruff: noqa: RUF005, SIM102
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ssmtrain.kernels import tuned
from ssmtrain.kernels.ahead import launch
from ssmtrain.kernels.causal_conv1d import triton as conv
from ssmtrain.kernels.selective_scan import triton_forward as plain

if TYPE_CHECKING:
    from ssmtrain.kernels.selective_scan.triton import Plan

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
    raise ImportError("Gluon as it is used here came with Triton 3.6")

barrier = getattr(gl, "barrier", None) or gl.thread_barrier

LOG2E = gl.constexpr(1.4426950408889634)
EVERY = 128
"""Tokens from one state that is kept for the backward pass to the next: half a byte a channel and token."""
CHANNELS = 64
"""Of a program: 16 for each of four warps."""
PLACES = 3
"""Programs of the backward pass on a multiprocessor."""
TURN = 256
"""Tokens after which a program of the backward pass may leave the rest of its window to another."""
WINDOW = gl.constexpr(2**13)
"""More tokens than a piece has, and a tile."""
BE = gl.constexpr(CHANNELS)
SPAN = gl.constexpr(4)
TILE = gl.constexpr(16)
"""Tokens that are copied to shared memory together."""

# States (4, 4, channels), the second dimension in registers, with a lane's two channels; lanes (channels, 4).
STATES = gl.constexpr(gl.BlockedLayout([1, 4, 2], [4, 1, 8], [1, 1, 4], [1, 0, 2]))
# A span (SPAN, channels), a lane two channels of a token.
SPANS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1]], [[1, 0], [2, 0], [0, 2], [0, 4], [0, 8]], [[0, 16], [0, 32]], [], [SPAN.value, BE.value]
    )
)
PAIRS = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
LINES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
# Rows that a warp reads together lie in different banks.
BANKS = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 4, [1, 0]))

sigmoid = gluon.jit(conv.sigmoid.fn)
step_of = gluon.jit(plain.step_of.fn)
power = gluon.jit(plain.power.fn)
document = gluon.jit(plain.document.fn)
window = gluon.jit(plain.window.fn)


@gluon.jit
def copy_rows(to, base, STRIDE: gl.constexpr, t, size, column, columns):
    """Begin to copy tokens t to t + len(to) of a piece of `size` tokens into shared memory, zeros past it."""
    WORD: gl.constexpr = 128 // to.dtype.primitive_bitwidth
    wide: gl.constexpr = gl.BlockedLayout([1, WORD], [WORD // 2, 64 // WORD], [4, 1], [1, 0])
    i = gl.arange(0, to.shape[0], gl.SliceLayout(1, wide))
    e = gl.arange(0, 64, gl.SliceLayout(0, wide))
    # Added in this order a lane keeps an offset in 32 bits, and not an address for each tensor.
    rows = (t + i)[:, None]
    if STRIDE * WINDOW >= 2**31:
        rows = rows.to(gl.int64)
    async_copy.async_copy_global_to_shared(
        to,
        base + column + (rows * STRIDE + e[None, :]),
        mask=(t + i < size)[:, None] & (column + e < columns)[None, :],
    )


@gluon.jit
def copy_pairs(to, base, t, size):
    """Begin to copy the B and C, (tokens, 32), of tokens t to t + len(to) into shared memory."""
    i = gl.arange(0, to.shape[0], gl.SliceLayout(1, PAIRS))
    n = gl.arange(0, 32, gl.SliceLayout(0, PAIRS))
    async_copy.async_copy_global_to_shared(
        to, base + ((t + i)[:, None] * 32 + n[None, :]), mask=(t + i < size)[:, None] & (n >= 0)[None, :]
    )


@gluon.jit
def ring_of_rows(dtype: gl.constexpr, TILE: gl.constexpr):
    """Return shared memory for two tiles (2, TILE, channels), and the same as spans (.., SPAN, channels)."""
    tiles = gl.allocate_shared_memory(dtype, [2, TILE, BE], BANKS)
    return tiles, tiles._reinterpret(dtype, [2 * TILE // SPAN, SPAN, BE], BANKS)


@gluon.jit
def ring_of_pairs(TILE: gl.constexpr):
    """Return shared memory for the B and C of two tiles (2, TILE, 32), and the same as (4 * TILE, 4, 4)."""
    tiles = gl.allocate_shared_memory(gl.float32, [2, TILE, 32], LINES)
    return tiles, tiles._reinterpret(gl.float32, [4 * TILE, 4, 4], LINES)


@gluon.jit
def places(block, E, N, pitch):
    """Return where (4, 4, channels) lie among states (.., N, E), which exist, and where in a tile of ours."""
    n4 = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, STATES)))[:, None, None]
    nr = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, STATES)))[None, :, None]
    e = gl.arange(0, BE, gl.SliceLayout(0, gl.SliceLayout(1, STATES)))[None, None, :]
    n = n4 * 4 + nr
    at = n * pitch + (block * BE + e)
    # A lane's four states of a channel together, then neighbouring lanes.
    own = nr + 4 * (n4 + 4 * (e // 2 + BE // 2 * (e % 2)))
    return at, (n < N) & (block * BE + e < E), own


@gluon.jit
def parameters(A, D, bias, at, inside, block, E):
    """Return A (4, 4, channels), D and the bias of dt (1, channels), zeros where absent."""
    e = block * BE + gl.arange(0, BE, gl.SliceLayout(0, SPANS))
    skip, shift = (
        gl.zeros([BE], gl.float32, gl.SliceLayout(0, SPANS)),
        gl.zeros([BE], gl.float32, gl.SliceLayout(0, SPANS)),
    )
    if D is not None:
        skip = gl.load(D + e, mask=e < E, other=0.0).to(gl.float32)
    if bias is not None:
        shift = gl.load(bias + e, mask=e < E, other=0.0).to(gl.float32)
    return gl.load(A + at, mask=inside, other=0.0), skip[None, :], shift[None, :]


@gluon.jit
def kept(states, which, at, inside, E, N):
    """Return one of states (.., N, E) as (4, 4, channels)."""
    return gl.load(states + which * E * N + at, mask=inside, other=0.0)


@gluon.jit
def pair(pairs, t):
    """Return the B (t even) or C (t odd) of a token in shared memory, for states: (4, 4, 1)."""
    return pairs.index(t).load(gl.SliceLayout(2, STATES))[:, :, None]


@gluon.jit
def gathered(parts):
    """Add the sums over states of a span, for each token (4, channels): (SPAN, channels).

    Of four lanes, which hold the shares of all four tokens, each gives two tokens away and then one.
    """
    n4 = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(1, STATES)))[:, None]
    even, odd = swapped(parts[0], parts[2], n4, 2, 0), swapped(parts[1], parts[3], n4, 2, 0)
    return gl.convert_layout(swapped(even, odd, n4, 1, 0), SPANS, assert_trivial=True)


@gluon.jit
def swapped(low, high, lane, BIT: gl.constexpr, AXIS: gl.constexpr):
    """Return high where a lane has the bit, elsewhere low, with what the lane on the other side has of it."""
    upper = lane & BIT != 0
    return gl.where(upper, high, low) + across(gl.where(upper, low, high), BIT, AXIS)


@gluon.jit
def shuffled(x, HOW: gl.constexpr):
    """Return what another lane of the warp has, which one as PTX says it."""
    asm: gl.constexpr = f"shfl.sync.{HOW}, 0xffffffff;"
    return gl.inline_asm_elementwise(asm, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def across(x, BIT: gl.constexpr, AXIS: gl.constexpr):
    """Return what the lane has whose number differs in a bit, of AXIS along which lanes are counted."""
    how: gl.constexpr = f"bfly.b32 $0, $1, {BIT}, 0x1f"
    return shuffled(x, how)


@gluon.jit
def everywhere(span, j: gl.constexpr):
    """Return a token of a span (SPAN, channels) in the place of each of them."""
    how: gl.constexpr = f"idx.b32 $0, $1, {j}, 0x1c1f"
    return shuffled(span, how)


@gluon.jit
def of_token(span, j: gl.constexpr):
    """Return a token of a span (SPAN, channels) for states: (4, 1, channels)."""
    row = gl.convert_layout(everywhere(span, j), gl.SliceLayout(1, STATES), assert_trivial=True)
    return row[:, None, :]


@gluon.jit
def advance(h, A, step, fed, keys, EXACT: gl.constexpr):
    """Return the states after a token; steps are in units of log 2, fed is step * u.

    Of two products that are added only one is rounded: which one, is not left to the compiler, who does not
    choose alike wherever this is called.
    """
    return gl.fma(keys, fed, power(A * step, EXACT) * h)


@gluon.jit
def walk(h, A, units, fed, pairs, t, EXACT: gl.constexpr):
    """Return the states before each token of a span, the first of which is t in its buffer, and after."""
    before = ()
    for j in gl.static_range(SPAN):
        before = before + (h,)
        h = advance(h, A, of_token(units, j), of_token(fed, j), pair(pairs, 2 * (t + j)), EXACT)
    return before + (h,)


@gluon.jit(do_not_specialize=["length", "tokens"])
def forward(
    u, dt, A,
    BC,  # (B * L, 2, 16), fp32: B and C, zeros past N
    D, z, bias,
    ids,  # (B, L) or None
    docs,  # (n_docs + 1, 3): first tokens in column 0; or None
    initial,  # (n_docs, N, E) or None
    enter,  # (windows, N, E), or None where no piece goes on with a document
    y,  # (B, L, E)
    marks,  # (tokens // EVERY + 1, blocks, 16 * BE), states each EVERY tokens of a piece; or None
    final,  # (n_docs, N, E) or None
    length, tokens, E, N, low, high,
    S_U: gl.constexpr, S_DT: gl.constexpr, S_Z: gl.constexpr,
    W: gl.constexpr, EVERY: gl.constexpr, SOFTPLUS: gl.constexpr,
):  # fmt: skip
    """Scan the pieces of one window for 64 channels."""
    PACKED: gl.constexpr = ids is not None
    dtype: gl.constexpr = u.dtype.element_ty
    EXACT: gl.constexpr = dtype == gl.float32
    blocks = (E + BE - 1) // BE
    w = gl.program_id(0) // blocks
    block = gl.program_id(0) % blocks
    at_state, inside, own = places(block, E, N, E)
    rates, skip, shift = parameters(A, D, bias, at_state, inside, block, E)
    ring_u, inputs = ring_of_rows(dtype, TILE)
    ring_dt, raws = ring_of_rows(dtype, TILE)
    if z is not None:
        ring_z, gates = ring_of_rows(dtype, TILE)
    ring, pairs = ring_of_pairs(TILE)
    q = gl.arange(0, SPAN, gl.SliceLayout(1, SPANS))[:, None]
    e = block * BE + gl.arange(0, BE, gl.SliceLayout(0, SPANS))[None, :]
    tile = q * E + e
    at = window(ids, docs, w, length, tokens, W, PACKED)
    end = window(ids, docs, w + 1, length, tokens, W, PACKED)
    while at < end:
        d, first, after = document(ids, docs, at, length, PACKED)
        size = gl.minimum(after - at, W).to(gl.int32)
        barrier()
        copy_rows(ring_u.index(0), u + at * S_U, S_U, 0, size, block * BE, E)
        copy_rows(ring_dt.index(0), dt + at * S_DT, S_DT, 0, size, block * BE, E)
        if z is not None:
            copy_rows(ring_z.index(0), z + at * S_Z, S_Z, 0, size, block * BE, E)
        copy_pairs(ring.index(0), BC + at * 32, 0, size)
        async_copy.commit_group()
        h = gl.zeros([4, 4, BE], gl.float32, STATES)
        if initial is not None:
            h = kept(initial, d, at_state, inside & (at == first), E, N)
        if enter is not None:
            h += kept(enter, w.to(gl.int64), at_state, inside & (at != first), E, N)
        for begin in range(0, size, TILE):
            async_copy.wait_group(0)
            barrier()
            now = begin // TILE % 2
            copy_rows(ring_u.index(1 - now), u + at * S_U, S_U, begin + TILE, size, block * BE, E)
            copy_rows(ring_dt.index(1 - now), dt + at * S_DT, S_DT, begin + TILE, size, block * BE, E)
            if z is not None:
                copy_rows(ring_z.index(1 - now), z + at * S_Z, S_Z, begin + TILE, size, block * BE, E)
            copy_pairs(ring.index(1 - now), BC + at * 32, begin + TILE, size)
            async_copy.commit_group()
            barrier()  # once for all spans: what is read and what is copied are not told apart
            if marks is not None:
                if (begin > 0) & (begin % EVERY == 0):
                    gl.store(marks + ((at + begin) // EVERY * blocks + block) * (16 * BE) + own, h)
            # Unrolled, so that places in shared memory are known but for the tile's.
            for s in gl.static_range(TILE // SPAN):
                t = begin + s * SPAN
                if t < size:
                    x = inputs.index(now * (TILE // SPAN) + s).load(SPANS).to(gl.float32)
                    raw = raws.index(now * (TILE // SPAN) + s).load(SPANS)
                    live = (t + q < size) & (e < E)
                    step, _slope = step_of(raw, live, shift, low, high, SOFTPLUS)
                    # Rounded here and not in A, where it would be the same error for all tokens.
                    units, fed = step * LOG2E, step * x
                    outs = ()
                    for j in gl.static_range(SPAN):
                        at_pair = 2 * (now * TILE + s * SPAN + j)
                        keys = pair(pairs, at_pair)
                        h = advance(h, rates, of_token(units, j), of_token(fed, j), keys, EXACT)
                        outs = outs + (gl.sum(h * pair(pairs, at_pair + 1), 1),)
                    out = gathered(outs) + skip * x
                    if z is not None:
                        gate = gates.index(now * (TILE // SPAN) + s).load(SPANS).to(gl.float32)
                        out *= gate * sigmoid(gate)
                    gl.store(y + at * E + (t * E + tile), out.to(y.dtype.element_ty), mask=live)
        if final is not None:
            gl.store(final + d * E * N + at_state, h, mask=inside & (at + size == after))
        at += size


def fits(N: int, *tensors: Tensor) -> bool:
    """Return whether these kernels take u, dt and z (B, L, E); the caller sees to their strides."""
    first = tensors[0]
    architecture = tuned.architecture(first.device)
    return (
        N <= 16
        and first.shape[2] % 16 == 0
        and first.shape[2] * WINDOW.value < 2**31
        and all(t.dtype == first.dtype for t in tensors)
        and architecture.startswith("sm_")
        and int(architecture[3:]) >= 80
    )


def ordered(states: Tensor, cut: Plan) -> Tensor:
    """Return states that lie as in `places`, tile after tile, as (N, E)."""
    lanes = states.view(cut.tiles, 2, CHANNELS // 2, 4, 4)  # (tiles, e % 2, e // 2, n // 4, n % 4)
    return lanes.permute(3, 4, 0, 2, 1).reshape(16, -1)[: cut.N, : cut.channels]


def turns(cut: Plan, device: torch.device) -> int:
    """Return into how many turns the backward pass takes a chain, a window's 64 channels.

    Chains that do not all find a place at once would leave the GPU half empty at the end. Then each ends
    after a while and the next of those that began longest ago goes on: what it computes stays the same, to
    the bit, whatever the number of turns.
    """
    chains = cut.windows * cut.tiles
    return 1 if chains <= PLACES * tuned.multiprocessors(device) else max(1, cut.W // TURN)


def carried(cut: Plan, n_turns: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return `turns`, `ends` and `carry` of the backward kernel; of one turn, no more than their types."""
    chains = cut.windows * cut.tiles if n_turns > 1 else 0
    return (
        torch.zeros(1 + chains, dtype=torch.int32, device=device),
        torch.empty(chains, dtype=torch.int64, device=device),
        torch.empty(chains, 40 * CHANNELS, dtype=torch.float32, device=device),
    )


def run(cut: Plan, kernel: Any, like: Tensor, *args: object, n_turns: int = 1, **constants: int) -> None:
    """Launch a kernel, whose first argument is (B, L, E), for all windows and blocks of channels."""
    name = kernel.__name__
    # Five programs to a multiprocessor; three of the backward pass, which with fewer registers spills, and
    # where shared memory is taken there is no cache to spill to.
    fallback = {"num_warps": 4, "maxnreg": 168 if name == "backward" else 96}
    if name == "backward":
        fallback["TILE"] = 16 if like.dtype.itemsize == 2 else 8
    key = f"dtype={str(like.dtype).removeprefix('torch.')}"
    config = tuned.lookup(f"selective_scan_n16_{name}", like.device, key, fallback)
    launch(kernel, (n_turns * cut.windows * cut.tiles,), like, *args, W=cut.W, **constants, **config)
