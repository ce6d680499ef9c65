# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 - in a kernel a tuple grows by +, and changes its type
"""Gated RMSNorm in Triton: what memory can deliver, or close to it.

The op moves bytes and little else, so the layout is the design. A group of channels of one row is cut into
PIECES equal pieces of BLOCK lanes, a power of two: 5120 is five times 1024, where one block of 8192 would
idle three lanes in eight. The pieces are unrolled and stay in registers: each element is read once, and many
loads are under way before the first is waited for. Narrow groups are taken ROWS rows at a time; one too wide
for the registers is read twice.

Forward hides the latency by occupancy: 56 registers a thread at 5120 channels, nine rows per multiprocessor.
Backward cannot, with the weight and its gradient alone two registers per channel. There a program walks a run
of rows, and Triton's pipeliner copies the next STAGES - 1 rows to shared memory meanwhile (cp.async). The
norm's scale is known from the forward pass, so all but the gradient of what was normalised is done in the
sweep that adds up that gradient's mean. Each program writes its part of the weight's gradient and a second
kernel adds the parts in order: no atomics, and as the shape alone decides how many rows make a run, the sum
is the same on every GPU. The gate is computed again rather than kept: the forward pass saves one fp32 scale
per row and group.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmtrain.kernels import tuned
from ssmtrain.kernels.gated_norm import reference
from ssmtrain.kernels.op import op
from ssmtrain.kernels.parts import place_of

LOG2E = tl.constexpr(1.4426950408889634)

KEPT_FORWARD = 40
"""Channels that a thread keeps in registers."""
KEPT_BACKWARD = 20
"""The same backward, where a channel takes six registers of the 128 that leave room for a second program."""
MOST_WARPS = 16
"""Of a program: with more, a thread could not have 128 registers."""
PIPELINE_BYTES = 96 * 1024
"""Shared memory for rows on their way: what the smallest supported GPUs (sm_86, sm_89) give, less change."""


def gated_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    n_groups: int,
    norm_before_gate: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute `kernels.gated_norm`: x, z (..., E), weight (E,); float64 is left to the reference."""
    if x.dtype == torch.float64:
        return reference.gated_norm(
            x,
            z,
            weight,
            eps=eps,
            n_groups=n_groups,
            norm_before_gate=norm_before_gate,
            out_dtype=out_dtype,
        )
    return _norm(x, z, weight.float().contiguous(), eps, n_groups, norm_before_gate, out_dtype)[0]


def stream_norm(
    x: Tensor,
    weight: Tensor,
    *,
    branch: Tensor | None = None,
    scale: float = 1.0,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.stream_norm`: x (..., E), weight (E,); float64 is left to the reference."""
    if x.dtype == torch.float64:
        stream = reference.add_branch(x, branch, scale)
        y = reference.gated_norm(
            stream, None, weight, eps=eps, n_groups=1, norm_before_gate=False, out_dtype=out_dtype
        )
        return stream, y
    return _StreamNorm.apply(x, branch, weight.float().contiguous(), scale, eps, out_dtype)


@triton.jit
def _load(at, inside, WHOLE: tl.constexpr):
    """Read as fp32, zero outside."""
    if WHOLE:
        return tl.load(at).to(tl.float32)
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(at, value, inside, WHOLE: tl.constexpr):
    """Round to the array's dtype and write."""
    value = value.to(at.dtype.element_ty)
    if WHOLE:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=inside)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(z * -LOG2E))


@triton.jit
def _gated(x, z, inside, WHOLE: tl.constexpr, GATE: tl.constexpr):
    """What is normalised, and the gate."""
    inner = _load(x, inside, WHOLE)
    gate = inner
    if GATE != "none":
        logit = _load(z, inside, WHOLE)
        gate = logit * _sigmoid(logit)
        if GATE == "first":
            inner *= gate
    return inner, gate


@triton.jit
def _entering(x, z, total, factor, inside, WHOLE: tl.constexpr, GATE: tl.constexpr):
    """As `_gated`; where z is a branch to be added to x, their sum with the bits that it is written with."""
    if GATE == "sum":
        branch = _load(z, inside, WHOLE)
        inner = (_load(x, inside, WHOLE) + factor * branch).to(total.dtype.element_ty).to(tl.float32)
        return inner, branch
    return _gated(x, z, inside, WHOLE, GATE)


@triton.jit
def _finish(y, weight, inner, gate, scale, live, inside, WHOLE: tl.constexpr, GATE: tl.constexpr):
    """Scale, weigh, gate and write one piece."""
    out = inner * scale * _load(weight, inside, WHOLE)
    if GATE == "last":
        out *= gate
    _store(y, out, live & inside, WHOLE)


@triton.jit(do_not_specialize=["rows", "x_stride", "z_stride"])
def _forward(
    x,  # (rows, E)
    z,  # (rows, E): logits of the gate, or what is added to x; unused without
    weight,  # (E,)
    y,  # (rows, E) contiguous
    total,  # (rows, E) contiguous: x + factor * z; unused if nothing is added
    scales,  # (rows, G)
    rows,
    x_stride,  # in UNITs, so that the compiler knows what divides it: Triton itself looks for 16 or nothing
    z_stride,
    eps,
    factor,
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GATE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Norm and gate one group of ROWS rows, or add and norm."""
    # 64 bits: rows times a row's length passes 2^31 at 200 thousand tokens.
    program = tl.program_id(0).to(tl.int64)
    channel = program % GROUPS * CHANNELS
    row = program // GROUPS * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < rows
    WHOLE: tl.constexpr = ROWS == 1 and CHANNELS % BLOCK == 0
    # As wide as the rows even for the weight: read once and broadcast, it would change threads by way of
    # shared memory.
    lane = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (ROWS, BLOCK))
    x += row * x_stride * UNIT + channel
    y += row * (GROUPS * CHANNELS) + channel
    total += row * (GROUPS * CHANNELS) + channel
    weight += channel
    z += row * z_stride * UNIT + channel
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    kept = ()
    if KEEP:
        for piece in tl.static_range(PIECES):
            at = piece * BLOCK + lane
            inner, gate = _entering(x + at, z + at, total, factor, live & (at < CHANNELS), WHOLE, GATE)
            squares += inner * inner
            if GATE == "sum":
                _store(total + at, inner, live & (at < CHANNELS), WHOLE)
            kept = kept + ((inner, gate),)
    else:
        for piece in range(PIECES):
            at = piece * BLOCK + lane
            inner, gate = _entering(x + at, z + at, total, factor, live & (at < CHANNELS), WHOLE, GATE)
            squares += inner * inner
            if GATE == "sum":
                _store(total + at, inner, live & (at < CHANNELS), WHOLE)
    scale = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / CHANNELS + eps)
    tl.store(scales + row * GROUPS + program % GROUPS, scale, mask=live)
    if KEEP:
        for piece in tl.static_range(PIECES):
            at = piece * BLOCK + lane
            inner, gate = kept[piece]
            _finish(y + at, weight + at, inner, gate, scale, live, at < CHANNELS, WHOLE, GATE)
    else:
        for piece in range(PIECES):
            at = piece * BLOCK + lane
            inner, gate = _entering(x + at, z + at, total, factor, live & (at < CHANNELS), WHOLE, GATE)
            _finish(y + at, weight + at, inner, gate, scale, live, at < CHANNELS, WHOLE, GATE)


@triton.jit(do_not_specialize=["rows", "run", "dy_stride", "x_stride", "z_stride", "add_stride", "dz_stride"])
def _backward(
    dy,  # (rows, E)
    x,  # (rows, E)
    z,  # (rows, E); unused without a gate
    weight,  # (E,)
    scales,  # (rows, G)
    means,  # (rows, G): of weight * d(normed) * normed; or None
    add,  # (rows, E): what dx is added to; or None
    dx,  # (rows, E) contiguous
    dz,  # (rows, E): of the gate's logits, or factor * dx; or None
    again,  # (rows, E) contiguous: the norm once more; or None
    parts,  # (runs, E)
    rows,
    run,
    dy_stride,  # in UNITs
    x_stride,
    z_stride,
    add_stride,
    dz_stride,
    factor,
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GATE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of x and z in a group (a slice of it if the means are given) of a run of rows, and the run's
    part of the weight's."""
    SLICE: tl.constexpr = PIECES * BLOCK
    SLICES: tl.constexpr = (CHANNELS + SLICE - 1) // SLICE
    WHOLE: tl.constexpr = ROWS == 1 and CHANNELS % SLICE == 0
    program = tl.program_id(0).to(tl.int64)
    first = program % SLICES * SLICE
    group = program // SLICES % GROUPS
    index = program // SLICES // GROUPS
    start = index * run
    end = tl.minimum(start + run, rows)
    room = CHANNELS - first
    channel = group * CHANNELS + first
    lane = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (ROWS, BLOCK))
    weights = ()
    sums = ()
    for piece in tl.static_range(PIECES):
        at = piece * BLOCK + lane
        weights = weights + (_load(weight + channel + at, at < room, WHOLE),)
        sums = sums + (tl.zeros((ROWS, BLOCK), tl.float32),)
    for base in tl.range(start, end, ROWS, num_stages=STAGES):
        row = base + tl.arange(0, ROWS)[:, None]
        live = row < end
        scale = tl.load(scales + row * GROUPS + group, mask=live, other=0.0)
        out = row * (GROUPS * CHANNELS) + channel
        gates = row * dz_stride * UNIT + channel
        share = tl.zeros((ROWS, BLOCK), tl.float32)
        kept = ()
        before = sums
        sums = ()
        for piece in tl.static_range(PIECES):
            at = piece * BLOCK + lane
            inside = live & (at < room)
            grad = _load(dy + (row * dy_stride * UNIT + channel) + at, inside, WHOLE)
            plain = _load(x + (row * x_stride * UNIT + channel) + at, inside, WHOLE)
            inner = plain
            gate = plain
            opening = plain
            more = plain
            if add is not None:
                more = _load(add + (row * add_stride * UNIT + channel) + at, inside, WHOLE)
            if GATE != "none":
                logit = _load(z + (row * z_stride * UNIT + channel) + at, inside, WHOLE)
                opening = _sigmoid(logit)
                gate = logit * opening
            if GATE == "first":
                inner = plain * gate
            if GATE == "last":
                slope = opening + gate * (1.0 - opening)
                _store(dz + gates + at, grad * (plain * scale) * weights[piece] * slope, inside, WHOLE)
                grad *= gate
            weight_grad = grad * (inner * scale)
            sums = sums + (before[piece] + weight_grad,)
            share += weight_grad * weights[piece]
            kept = kept + ((plain, grad, gate, opening, more),)
        if means is None:
            mean = tl.sum(share, 1, keep_dims=True) / CHANNELS
        else:
            mean = tl.load(means + row * GROUPS + group, mask=live, other=0.0)
        pull = mean * scale * scale
        for piece in tl.static_range(PIECES):
            at = piece * BLOCK + lane
            inside = live & (at < room)
            plain, grad, gate, opening, more = kept[piece]
            inner_grad = grad * (weights[piece] * scale)
            if again is not None:
                inner = plain
                if GATE == "first":
                    inner = plain * gate
                normed = inner * scale * weights[piece]
                if GATE == "last":
                    normed *= gate
                _store(again + out + at, normed, inside, WHOLE)
            if GATE == "first":
                inner_grad -= plain * (gate * pull)
                slope = opening + gate * (1.0 - opening)
                _store(dz + gates + at, inner_grad * plain * slope, inside, WHOLE)
                inner_grad *= gate
            else:
                inner_grad -= plain * pull
            if add is not None:
                inner_grad += more
            _store(dx + out + at, inner_grad, inside, WHOLE)
            if GATE == "none" and dz is not None:
                _store(dz + gates + at, inner_grad * factor, inside, WHOLE)
    for piece in tl.static_range(PIECES):
        at = piece * BLOCK + tl.arange(0, BLOCK)
        part = parts + index * (GROUPS * CHANNELS) + channel + at
        tl.store(part, tl.sum(sums[piece], 0), mask=at < room)


@triton.jit(do_not_specialize=["dy_stride", "x_stride", "z_stride"])
def _means(
    dy,  # (rows, E)
    x,  # (rows, E)
    z,  # (rows, E); unused without a gate
    weight,  # (E,)
    scales,  # (rows, G)
    means,  # (rows, G)
    dy_stride,  # in UNITs
    x_stride,
    z_stride,
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GATE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean that `_backward` takes, of a group too wide for it."""
    WHOLE: tl.constexpr = CHANNELS % BLOCK == 0
    program = tl.program_id(0).to(tl.int64)
    channel = program % GROUPS * CHANNELS
    row = program // GROUPS
    scale = tl.load(scales + program)
    share = tl.zeros((BLOCK,), tl.float32)
    for piece in range(PIECES):
        lane = piece * BLOCK + tl.arange(0, BLOCK)
        inside = lane < CHANNELS
        at = channel + lane
        grad = _load(dy + row * dy_stride * UNIT + at, inside, WHOLE) * _load(weight + at, inside, WHOLE)
        inner, gate = _gated(
            x + row * x_stride * UNIT + at, z + row * z_stride * UNIT + at, inside, WHOLE, GATE
        )
        if GATE == "last":
            grad *= gate
        share += grad * (inner * scale)
    tl.store(means + program, tl.sum(share, 0) / CHANNELS)


@triton.jit(do_not_specialize=["runs"])
def _add(parts, total, runs, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Add parts (runs, WIDTH) over the runs, always in the same order."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    held = tl.zeros((ROWS, BLOCK), tl.float32)
    for base in range(0, runs, ROWS):
        run = base + tl.arange(0, ROWS)[:, None]
        inside = (run < runs) & (channel < WIDTH)
        held += tl.load(parts + run.to(tl.int64) * WIDTH + channel, mask=inside, other=0.0)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(total + at, tl.sum(held, 0), mask=at < WIDTH)


@functools.cache
def _tile(channels: int, most: int) -> tuned.Config | None:
    """How to hold a group with up to `most` channels per thread: fewest idle lanes, then widest accesses,
    then fewest threads; None when no program is large enough."""
    found = []
    for each in (8, 4):  # neighbours that a thread takes: 16 bytes of bf16, or of fp32
        for threads in (2**power for power in range((32 * MOST_WARPS).bit_length())):
            pieces = triton.cdiv(channels, threads * each)
            if pieces * each <= most:
                found.append((pieces * threads * each, -each, threads, pieces))
    if not found:
        return None
    _, each, threads, pieces = min(found)
    rows, warps = max(1, 128 // threads), max(4, threads // 32)
    return {"BLOCK": -each * threads, "PIECES": pieces, "ROWS": rows, "num_warps": warps}


def _forward_config(channels: int) -> tuned.Config:
    wide = {"BLOCK": 4096, "PIECES": 4, "ROWS": 1, "num_warps": MOST_WARPS}
    return _tile(channels, KEPT_FORWARD) or wide


def _backward_config(channels: int, item_bytes: int) -> tuned.Config:
    """For inputs that take item_bytes per channel together."""
    wide = {"BLOCK": 4096, "PIECES": 2, "ROWS": 1, "num_warps": MOST_WARPS}
    tile = _tile(channels, KEPT_BACKWARD) or wide
    held = tile["PIECES"] * tile["BLOCK"] * tile["ROWS"] * item_bytes
    return tile | {"STAGES": min(3, 1 + PIPELINE_BYTES // held), "maxnreg": 128}


def _run_length(rows: int, n_groups: int, channels: int) -> int:
    """Rows that a backward program walks: about a thousand programs, several rounds of them on every GPU and
    few parts to add; of few rows, enough for the pipeline as long as the programs fill a GPU.

    Never of the GPU or the configuration: the bits of the weight's gradient depend on it.
    """
    work = rows * n_groups
    run = max(triton.cdiv(work, 1024), min(max(16, 32768 // channels), triton.cdiv(work, 256)))
    return triton.cdiv(run, 8) * 8


def _key(x: Tensor, n_groups: int) -> str:
    return f"E={x.shape[-1]},G={n_groups},dtype={str(x.dtype).removeprefix('torch.')}"


def _gate(z: Tensor | None, norm_before_gate: bool) -> str:
    if z is None:
        return "none"
    return "last" if norm_before_gate else "first"


def _rows(tensor: Tensor) -> Tensor:
    """(..., E) as rows of neighbouring channels, at any distance: a view, or a copy where there is none."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _strides(*rows: Tensor) -> tuple[int, list[int]]:
    """The largest unit of up to a 16-byte access that divides all strides, and the strides in it."""
    strides = [tensor.stride(0) for tensor in rows]
    unit = math.gcd(8, *strides)
    return unit, [stride // unit for stride in strides]


@op("gated_norm")
def _norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    n_groups: int,
    norm_before_gate: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The normed x in out_dtype (None: x's), and the scales (rows, G)."""
    y, scales = _results(x, n_groups, out_dtype)
    _launch(x, z, weight, y, None, scales, eps, 1.0, _gate(z, norm_before_gate))
    return y, scales


@op("sum_norm")
def _sum_norm(
    x: Tensor, branch: Tensor, weight: Tensor, factor: float, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x + factor * branch in the wider dtype, its norm in out_dtype (None: that dtype), the scales."""
    total, y, scales = _summed(x, branch, out_dtype)
    _launch(x, branch, weight, y, total, scales, eps, factor, "sum")
    return total, y, scales


def _launch(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    y: Tensor,
    total: Tensor | None,
    scales: Tensor,
    eps: float,
    factor: float,
    gate: str,
) -> None:
    """Norm x into y, and write the sum with a branch z."""
    plain, n_groups = _rows(x), scales.shape[1]
    logits, summed = plain if z is None else _rows(z), y if total is None else total
    rows, channels = plain.shape[0], plain.shape[1] // n_groups
    config = tuned.lookup("gated_norm_forward", x.device, _key(x, n_groups), _forward_config(channels))
    pieces = triton.cdiv(channels, config["BLOCK"])
    unit, strides = _strides(plain, logits)
    shape = {"UNIT": unit, "GROUPS": n_groups, "CHANNELS": channels, "GATE": gate}
    if rows:
        with torch.cuda.device_of(x):
            _forward[(triton.cdiv(rows, config["ROWS"]) * n_groups,)](
                *(plain, logits, weight, y, summed, scales, rows, *strides, eps, factor),
                KEEP=pieces <= config["PIECES"],
                **shape | config | {"PIECES": pieces},
            )


@op(
    "gated_norm_back",
    schema="(Tensor dy, Tensor x, Tensor? z, Tensor weight, Tensor scales, int n_groups,"
    " bool norm_before_gate) -> (Tensor, Tensor, Tensor)",
)
def _norm_back(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    n_groups: int,
    norm_before_gate: bool,
    room: Tensor | None = None,
    again: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z (in `room` if given, empty without a gate) and weight; the norm itself in `again`."""
    dz = _like(z, x) if room is None else room
    gate = _gate(z, norm_before_gate)
    dx, dweight = _launch_back(dy, x, z, weight, scales, None, None if z is None else dz, 1.0, gate, again)
    return dx, dz, dweight


@op(
    "stream_norm_back",
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor scales, Tensor? add, ScalarType? branch,"
    " float factor) -> (Tensor, Tensor, Tensor)",
)
def _stream_norm_back(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    add: Tensor | None,
    branch: torch.dtype | None,
    factor: float,
    again: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, like x and with `add` added, of a branch of that dtype (None: empty) and weight; the
    norm itself in `again`."""
    d_branch = _branch_like(x, branch)
    to = None if branch is None else d_branch
    dx, dweight = _launch_back(dy, x, None, weight, scales, add, to, factor, "none", again)
    return dx, d_branch, dweight


def _launch_back(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    add: Tensor | None,
    dz: Tensor | None,
    factor: float,
    gate: str,
    again: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write dz and, if given, the norm again; return the gradients of x, with `add` added, and weight."""
    dx, dweight, n_groups = x.new_empty(x.shape), torch.empty_like(weight), scales.shape[1]
    grad, plain = _rows(dy), _rows(x)
    logits, more = (plain if other is None else _rows(other) for other in (z, add))
    (rows, width), channels = plain.shape, plain.shape[1] // n_groups
    if rows == 0:
        return dx, dweight.zero_()
    item_bytes = sum(tensor.element_size() for tensor in (dy, x, z, add) if tensor is not None)
    fallback = _backward_config(channels, item_bytes)
    config = tuned.lookup("gated_norm_backward", x.device, _key(x, n_groups), fallback)
    pieces, slices = (triton.cdiv(channels, n * config["BLOCK"]) for n in (1, config["PIECES"]))
    run = _run_length(rows, n_groups, channels)
    runs = triton.cdiv(rows, run)
    parts = weight.new_empty(runs, width)
    means = None if slices == 1 else torch.empty_like(scales)
    unit, strides = _strides(grad, plain, logits, more, plain if dz is None else dz.view(rows, width))
    shape = {"UNIT": unit, "GROUPS": n_groups, "CHANNELS": channels, "GATE": gate}
    inputs = grad, plain, logits, weight, scales, means
    with torch.cuda.device_of(x):
        if means is not None:
            _means[(rows * n_groups,)](
                *(*inputs, *strides[:3]),
                **shape,
                PIECES=pieces,
                BLOCK=config["BLOCK"],
                num_warps=config["num_warps"],
            )
        _backward[(runs * n_groups * slices,)](
            *(*inputs, None if add is None else more, dx, dz, again, parts, rows, run, *strides, factor),
            **shape | config,
        )
        _add[(triton.cdiv(width, 16),)](parts, dweight, runs, WIDTH=width, BLOCK=16, ROWS=256, num_warps=8)
    return dx, dweight


def _like(z: Tensor | None, x: Tensor) -> Tensor:
    """Room for z's gradient; an op returns no None."""
    return x.new_empty(0) if z is None else z.new_empty(z.shape)


def _branch_like(x: Tensor, branch: torch.dtype | None) -> Tensor:
    """Room for the gradient of a branch, if there is one."""
    return x.new_empty(0) if branch is None else x.new_empty(x.shape, dtype=branch)


def _summed(x: Tensor, branch: Tensor, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Room for a sum, its norm and the scales."""
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    return total, *_results(total, 1, out_dtype)


def _results(x: Tensor, n_groups: int, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Room for the normed x and for the scales."""
    scales = x.new_empty((x.numel() // x.shape[-1], n_groups), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), scales


@_norm.register_fake
def _(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    n_groups: int,
    norm_before_gate: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    return _results(x, n_groups, out_dtype)


@_norm_back.register_fake
def _(dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), _like(z, x), torch.empty_like(weight)


@_sum_norm.register_fake
def _(
    x: Tensor, branch: Tensor, weight: Tensor, factor: float, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _summed(x, branch, out_dtype)


@_stream_norm_back.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, scales: Tensor, add: Any, branch: Any, factor: float) -> Any:
    return x.new_empty(x.shape), _branch_like(x, branch), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, z, weight, _, *ctx.options, _ = inputs
    ctx.place = None if z is None else place_of(z)
    ctx.save_for_backward(x, z, weight, output[1])
    ctx.set_materialize_grads(False)  # none for the scales, which nothing else reads


def _differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, z, weight, scales = ctx.saved_tensors
    dx, dz, dweight = _norm_back.into(ctx.place)(dy, x, z, weight, scales, *ctx.options)
    return dx, None if z is None else dz, dweight, None, None, None, None


_norm.register_autograd(_differentiate, setup_context=_save)


class _StreamNorm(torch.autograd.Function):
    """A stream, as it is or with a branch added, and its norm, around the ops: a custom op may not return its
    input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        factor: float,
        eps: float,
        out_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        if branch is None:
            stream, (y, scales) = x, _norm(x, None, weight, eps, 1, False, out_dtype)
        else:
            stream, y, scales = _sum_norm(x, branch, weight, factor, eps, out_dtype)
        ctx.dtypes = x.dtype, None if branch is None else branch.dtype
        ctx.factor = factor
        ctx.save_for_backward(stream, weight, scales)
        ctx.set_materialize_grads(False)  # an output that nothing reads costs no array of zeros
        return stream, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_stream: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return *stream_grads(ctx, d_stream, dy), None, None, None


def stream_grads(
    ctx: Any, d_stream: Tensor | None, dy: Tensor | None, again: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, branch and weight, of what `_StreamNorm.forward` has kept; the norm itself in `again`,
    which needs a dy."""
    stream, weight, scales = ctx.saved_tensors
    own, branch = ctx.dtypes
    # In the stream's dtype and unscaled, a branch has the stream's gradient itself.
    apart = branch is not None and (branch != stream.dtype or ctx.factor != 1.0)
    dx, d_branch, d_weight = d_stream, None, None
    if dy is not None:
        inputs = dy, stream, weight, scales, d_stream, branch if apart else None, ctx.factor
        back = _stream_norm_back if again is None else _stream_norm_back.body
        dx, d_branch, d_weight = back(*inputs, *([] if again is None else [again]))
    elif dx is None:
        return None, None, None
    elif apart:
        d_branch = (dx * ctx.factor).to(branch)
    if not apart:
        d_branch = None if branch is None else dx
    return dx.to(own), d_branch, d_weight
