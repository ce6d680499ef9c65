"""SSD in Triton: three kernels forward, eight small and large ones back, and nothing but inputs kept.

`triton_chunks` cuts the batch, `triton_states` carries states from chunk to chunk, `triton_outputs` and
`triton_grads` take all chunks at once. docs/kernels/ssd.md derives it.
"""

from __future__ import annotations

import functools
import logging
from math import inf
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmtrain.kernels import tuned
from ssmtrain.kernels.ahead import Back, compiled_first, launch
from ssmtrain.kernels.op import op
from ssmtrain.kernels.parts import place_of
from ssmtrain.kernels.ssd import reference
from ssmtrain.kernels.ssd.triton_chunks import Chunks, cut, steps_backward, steps_forward, sum_chunks
from ssmtrain.kernels.ssd.triton_grads import gather, pairs, sources, through_states
from ssmtrain.kernels.ssd.triton_outputs import outputs
from ssmtrain.kernels.ssd.triton_states import walk
from ssmtrain.kernels.ssd.triton_step import skip_and_gate
from ssmtrain.kernels.ssd.triton_step import ssd_step as ssd_step

try:  # Gluon is experimental: where this Triton has no such pass, the kernels over chunks do all.
    from ssmtrain.kernels.ssd import triton_hopper as hopper
except (ImportError, AttributeError):
    hopper = None  # type: ignore[assignment]

LARGEST = {"P": 128, "N": 256}
"""Head and state sizes that fit a multiprocessor; beyond them the reference runs."""

log = logging.getLogger(__name__)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float | None],
    chunk_size: int | None,
    doc_ids: Tensor | None,
    n_docs: int,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute `kernels.ssd` (same arguments)."""
    if x.dtype == torch.float64 or x.shape[3] > LARGEST["P"] or B.shape[3] > LARGEST["N"]:
        _say_once(f"ssd: the reference runs for {x.dtype}, P {x.shape[3]}, N {B.shape[3]}")
        return reference.ssd(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            chunk_size=chunk_size,
            doc_ids=doc_ids,
            n_docs=n_docs,
            initial_state=initial_state,
            return_final_state=return_final_state,
        )
    inner_d = D if D is not None and D.dim() == 1 else None
    y, final = _scan(
        x,
        dt,
        A.float(),
        B.to(x.dtype),
        C.to(x.dtype),
        None if inner_d is None else inner_d.float(),
        dt_bias,
        None if initial_state is None else initial_state.float(),
        doc_ids,
        n_docs,
        chunk_size or 0,
        dt_softplus,
        dt_limit[0],
        inf if dt_limit[1] is None else dt_limit[1],
        return_final_state,
    )
    return skip_and_gate(y, x, None if inner_d is not None else D, z), final if return_final_state else None


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)


class Shape(NamedTuple):
    """Sizes of a call and what follows from them."""

    batch: int
    length: int
    heads: int
    P: int
    groups: int
    N: int
    dtype: torch.dtype

    @property
    def per_group(self) -> int:
        """Heads that share B and C."""
        return self.heads // self.groups

    @property
    def BP(self) -> int:
        """Head dim of a tile."""
        return max(16, triton.next_power_of_2(self.P))

    @property
    def BN(self) -> int:
        """State size of a tile."""
        return max(16, triton.next_power_of_2(self.N))

    @property
    def exact(self) -> bool:
        """Whether products are taken in fp32 rather than in bf16."""
        return self.dtype != torch.bfloat16

    @property
    def key(self) -> str:
        """The shape as the table of configurations knows it."""
        return f"P={self.BP},N={self.BN},dtype={str(self.dtype).removeprefix('torch.')}"

    def products(self) -> dict[str, object]:
        """Operand type and precision of the matrix products.

        fp16 and fp32 are cut in three bf16 parts, which hold all of their digits; six products of these reach
        fp32's last digit, as fast as three of TF32, and states of fp16 inputs do not overflow.
        """
        if not self.exact:
            return {"OPERAND": tl.bfloat16, "PRECISION": "tf32"}
        return {"OPERAND": tl.float32, "PRECISION": "bf16x6"}


def shape_of(x: Tensor, B: Tensor) -> Shape:
    """Return the sizes of a call."""
    batch, length, heads, head_dim = x.shape
    return Shape(batch, length, heads, head_dim, B.shape[2], B.shape[3], x.dtype)


def chunk_length(shape: Shape, asked: int, device: torch.device) -> int:
    """Return Q: as asked, rounded down to a power of two that the kernels take, else the fastest.

    What a program holds in registers grows with Q squared: 128 wants products that read their operands from
    shared memory, which Hopper and Blackwell have.
    """
    if shape.exact:
        best = 64 if shape.BP <= 64 else 16
    else:
        best = 128 if tuned.architecture(device) in ("sm_90", "sm_100") else 64
    if not asked:
        return best
    return max(16, min(best, 1 << (asked.bit_length() - 1)))


SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227}
"""Shared memory of a block by architecture; the others have, or may have, 99 KiB."""


def configuration(kernel: str, shape: Shape, Q: int, device: torch.device) -> dict[str, int]:
    """Return the launch configuration of one kernel: tile sizes, num_warps, num_stages.

    From the table, or else the first of the kernel's candidates, fastest first, that fits the device's shared
    memory.
    """
    budget = SHARED_KIB.get(tuned.architecture(device), 99) * 1024 - 1024
    choices = _candidates(kernel, shape, Q)
    fallback = next((config for size, config in choices if size <= budget), choices[-1][1])
    config = {"BP": shape.BP, "BN": shape.BN, "BM": Q, **fallback}
    found = tuned.lookup(f"ssd_{kernel}", device, shape.key, config)
    config = dict(found)
    config["BP"] = min(config["BP"], max(shape.BP, fallback.get("BP", 0)))
    config["BN"] = min(config["BN"], shape.BN)
    config["BM"] = min(max(config["BM"], Q // 2), Q)  # one block of readers, or two
    return config


def _candidates(kernel: str, shape: Shape, Q: int) -> list[tuple[int, dict[str, int]]]:
    """List (bytes of shared memory, about; configuration), fastest first."""
    BP, BN, half = shape.BP, shape.BN, max(16, Q // 2)
    item = 4 if shape.exact else 2
    choices: list[tuple[int, dict[str, int]]] = []

    def add(size: int, stages: int, **config: int) -> None:
        config = {"num_warps": 4, "num_stages": stages, **config}
        choices.append((size * item, config))

    if kernel == "walk":
        # A sequence of few heads leaves multiprocessors idle: fewer, larger steps. Not a matter of how many
        # sequences there are, so that a document has the same bits in any company.
        bp, bk = min(BP, 64), Q if shape.heads * triton.cdiv(BN, 128) < 100 else min(Q, 64)
        for bn, stages in ((128, 3), (64, 3), (64, 2), (32, 2), (32, 1)):
            bn = min(BN, bn)
            add(stages * bk * (bp + bn) + bk * bp + bp * bn, stages, BK=bk, BP=bp, BN=bn, num_warps=8)
    elif kernel in ("outputs", "sources"):
        # A state of more than 128 by 128 does not fit in registers beside the rest.
        for bp in dict.fromkeys((min(BP, 2**14 // BN), min(BP, 64), min(BP, 32))):
            tiles, own = bp * BN + 2 * half * bp, half * BN
            if not shape.exact and BN <= 128:
                add(3 * tiles + half * bp, 3, BM=half, BP=bp, BH=20, HOLD=1)
            elif not shape.exact:
                add(3 * tiles + own + half * bp, 3, BM=half, BP=bp, BH=16, HOLD=0)
            add(2 * tiles + own + half * bp, 2, BM=half, BP=bp, BH=20, HOLD=0)
            add(max(tiles + half * bp, own) + own, 1, BM=half, BP=bp, BH=20, HOLD=0)
    elif kernel == "pairs":
        # The parts that fp32 is cut in take many registers: those of two blocks of tokens do not fit.
        for bm, own in ((Q, 2 * Q), (half, 3 * half)) if shape.exact else ((half, 3 * half),):
            for stages in (3, 2, 1):
                add(max(stages * 2 * Q * BP, own * BN) + 2048, stages, BM=bm, num_warps=8)
    else:  # through_states
        # Over fewer channels Triton takes (P, P) products in registers, and then copies the next state over
        # one that another product still reads (scripts/kernel_hazards.py).
        BP = BP if shape.exact else max(64, BP)
        # Products of 64 tokens hold both operands in registers: of 128 channels a few columns fit.
        most = 32 if Q <= 64 and BP > 64 else 128
        for bn, stages in ((128, 3), (128, 2), (64, 2), (32, 2), (32, 1), (16, 1)):
            bn = min(BN, bn, most)
            size = stages * (2 * BP * bn + Q * BP) + Q * BP + Q * Q
            add(size + Q * bn, stages, BP=BP, BN=bn, num_warps=8)
    return choices


def _heads_at_once(most: int, shape: Shape, chunks: int) -> int:
    """Return how many heads a program takes: many share more, but thousands of programs must remain."""
    programs = chunks * shape.heads
    return max(1, min(most, shape.per_group, programs // 1024))


def _heads_of_a_run(shape: Shape, chunks: Chunks) -> int:
    """Return how many heads the programs that sum over heads take.

    All that share B and C, when 256 programs remain, near two for each multiprocessor of the largest GPUs:
    then no shares are written and read again.
    """
    return max(1, min(shape.per_group, chunks.n * shape.heads // 256))


def _tokens(t: Tensor) -> Tensor:
    """Return t (B, L, ..) with the last dimensions packed and one stride from token to token."""
    packed, size = True, 1
    for i in range(t.dim() - 1, 1, -1):
        packed = packed and (t.stride(i) == size or t.shape[i] == 1)
        size *= t.shape[i]
    packed = packed and (t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1))
    return t if packed else t.contiguous()


class Steps(NamedTuple):
    """What all passes over the chunks read."""

    chunks: Chunks
    steps: Tensor
    """(chunks, H, Q), as the others"""
    logs: Tensor
    late: Tensor
    rests: Tensor


def _steps(
    shape: Shape,
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None,
    doc_ids: Tensor | None,
    n_docs: int,
    chunk: int,
    softplus: bool,
    low: float,
    high: float,
) -> Steps:
    Q = chunk_length(shape, chunk, dt.device)
    chunks = cut(shape.batch, shape.length, Q, doc_ids, n_docs, dt)
    steps = torch.empty(chunks.n, shape.heads, Q, dtype=torch.float32, device=dt.device)
    logs, late, rests = (torch.empty_like(steps) for _ in range(3))
    BH = min(16, triton.next_power_of_2(shape.heads))
    launch(
        steps_forward,
        (chunks.n, triton.cdiv(shape.heads, BH)),
        dt,
        A,
        bias,
        chunks.table,
        steps,
        logs,
        late,
        rests,
        dt.stride(1),
        shape.length,
        chunks.per_row,
        shape.heads,
        low,
        high,
        Q=Q,
        BH=BH,
        HAS_BIAS=bias is not None,
        SOFTPLUS=softplus,
        PACKED=chunks.packed,
    )
    return Steps(chunks, steps, logs, late, rests)


def _sizes(shape: Shape, chunks: Chunks) -> tuple[int, ...]:
    """Return what the kernels over chunks and heads take in one order: length to N."""
    return shape.length, chunks.per_row, shape.heads, shape.per_group, shape.P, shape.N


def _constants(shape: Shape, chunks: Chunks) -> dict[str, object]:
    """Return the compile-time constants that all kernels with products share."""
    return {"Q": chunks.size, "PACKED": chunks.packed, **shape.products()}


def _walk(
    shape: Shape,
    at: Steps,
    x: Tensor,
    B: Tensor,
    initial: Tensor | None,
    final: Tensor | None,
    back: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the states that enter the chunks, (chunks, H, P, N), and write the final ones; with `back` (d_y,
    C, d_final, d_initial), also return the gradients of those that leave, and write d_initial."""
    chunks = at.chunks
    config = configuration("walk", shape, chunks.size, x.device)
    BP = config["BP"]
    config["BK"] = min(config["BK"], chunks.size)
    del config["BM"]
    BN = config["BN"]
    dtype = torch.float32 if shape.exact else x.dtype
    states = torch.empty(chunks.n, shape.heads, shape.P, shape.N, dtype=dtype, device=x.device)
    d_states = states if back is None else torch.empty_like(states)
    d_y, C, d_final, d_initial = (x, B, None, initial) if back is None else back
    walks = chunks.n_docs * shape.heads * triton.cdiv(shape.P, BP) * triton.cdiv(shape.N, BN)
    launch(
        walk,
        (walks, 1 if back is None else 2),
        x,
        B,
        d_y,
        C,
        at.logs,
        at.late,
        states,
        d_states,
        initial,
        final,
        d_final,
        d_initial,
        chunks.docs,
        x.stride(1),
        B.stride(1),
        d_y.stride(1),
        C.stride(1),
        *_sizes(shape, chunks),
        EVEN=not chunks.packed and shape.length % chunks.size == 0 and not (shape.P % BP or shape.N % BN),
        HAS_INITIAL=initial is not None,
        HAS_FINAL=final is not None,
        HAS_DFINAL=d_final is not None,
        **_constants(shape, chunks),
        **config,
    )
    return states, d_states


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    doc_ids: Tensor | None,
    n_docs: int,
    chunk: int,
    softplus: bool,
    low: float,
    high: float,
    want_final: bool,
) -> tuple[Tensor, Tensor]:
    """Scan; returns y (B, L, H, P) and the final states (n_docs, H, P, N), empty when not wanted."""
    shape = shape_of(x, B)
    x, dt, B, C = (_tokens(t) for t in (x, dt, B, C))
    at = _steps(shape, dt, A, dt_bias, doc_ids, n_docs, chunk, softplus, low, high)
    final = torch.empty(_final_shape(x, B, n_docs, want_final), dtype=torch.float32, device=x.device)
    enter = None if initial is None else initial.contiguous()
    leave = final if want_final else None
    if hopper is not None and hopper.fits(shape, at.chunks.size, x, B, C):
        y, _ = hopper.run(shape, at, x, B, C, D, doc_ids, enter, leave, back=False, keep=False)
        return y, final
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    states, _ = _walk(shape, at, x, B, enter, leave)
    chunks = at.chunks
    config = configuration("outputs", shape, chunks.size, x.device)
    BM, BH = config.pop("BM"), _heads_at_once(config.pop("BH"), shape, chunks.n)
    runs = triton.cdiv(shape.per_group, BH)
    launch(
        outputs,
        (chunks.n * shape.groups * runs * (chunks.size // BM) * triton.cdiv(shape.P, config["BP"]),),
        x,
        B,
        C,
        D,
        at.logs,
        at.late,
        states,
        y,
        chunks.table,
        x.stride(1),
        B.stride(1),
        C.stride(1),
        *_sizes(shape, chunks),
        BM=BM,
        BH=BH,
        SPLIT=config["BP"] < shape.P,
        HAS_D=D is not None,
        **_constants(shape, chunks),
        **config,
    )
    return y, final


def _final_shape(x: Tensor, B: Tensor, n_docs: int, want: bool) -> tuple[int, ...]:
    return (n_docs, *x.shape[2:], B.shape[3]) if want else (0,)


def scan_back(
    d_y: Tensor,
    d_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    doc_ids: Tensor | None,
    n_docs: int,
    chunk: int,
    softplus: bool,
    low: float,
    high: float,
    to_x: Tensor | None = None,
    to_B: Tensor | None = None,
    to_C: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (in to_x if given), dt, A, B (to_B), C (to_C), D, dt_bias and the initial states (the
    last three empty when absent)."""
    shape = shape_of(x, B)
    d_y, x, dt, B, C = (_tokens(t) for t in (d_y, x, dt, B, C))
    at = _steps(shape, dt, A, dt_bias, doc_ids, n_docs, chunk, softplus, low, high)
    enter = None if initial is None else initial.contiguous()
    d_initial = torch.empty(0 if initial is None else initial.shape, dtype=torch.float32, device=x.device)
    d_final = None if d_final is None else d_final.contiguous()
    leave = None if initial is None else d_initial
    if hopper is not None and hopper.fits(shape, at.chunks.size, d_y, x, B, C):
        _, states = hopper.run(shape, at, x, B, None, None, doc_ids, enter, None, back=False, keep=True)
        d_x, d_states = hopper.run(
            shape, at, d_y, C, B, D, doc_ids, d_final, leave, back=True, keep=True, out=to_x
        )
    else:
        states, d_states = _walk(shape, at, x, B, enter, None, (d_y, C, d_final, leave))
        d_x = _sources(shape, at, d_y, B, C, D, d_states, to_x)
    d_gram, direct, spans, skips, selves = _pairs(shape, at, x, d_y, B, C)
    d_B, fed, through = _through_states(shape, at, x, B, C, d_gram, d_states, states, to_B)
    d_C, read, _ = _through_states(shape, at, d_y, C, B, d_gram, states, None, to_C)
    chunks, BH = at.chunks, min(16, triton.next_power_of_2(shape.heads))
    d_dt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    sums = torch.empty(2 if D is None else 3, chunks.n, shape.heads, dtype=torch.float32, device=x.device)
    launch(
        steps_backward,
        (chunks.n, triton.cdiv(shape.heads, BH)),
        dt,
        A,
        dt_bias,
        chunks.table,
        direct,
        fed,
        spans,
        read,
        through,
        at.logs,
        skips,
        selves,
        d_dt,
        sums,
        dt.stride(1),
        shape.length,
        chunks.per_row,
        chunks.n,
        shape.heads,
        shape.per_group,
        low,
        high,
        Q=chunks.size,
        BH=BH,
        READS=read.shape[2],
        HAS_D=D is not None,
        HAS_BIAS=dt_bias is not None,
        SOFTPLUS=softplus,
        PACKED=chunks.packed,
    )
    d_A, d_bias, *d_D = (row.clone() for row in _sum_chunks(sums).unbind())
    d_bias = d_A.new_empty(0) if dt_bias is None else d_bias.to(dt_bias.dtype)
    return d_x, d_dt, d_A, d_B, d_C, d_D[0] if d_D else d_A.new_empty(0), d_bias, d_initial


def _sources(
    shape: Shape,
    at: Steps,
    d_y: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    d_states: Tensor,
    to: Tensor | None,
) -> Tensor:
    """Return the gradient of x, in `to` if given."""
    chunks = at.chunks
    config = configuration("sources", shape, chunks.size, d_y.device)
    BM, BH = config.pop("BM"), _heads_at_once(config.pop("BH"), shape, chunks.n)
    runs = triton.cdiv(shape.per_group, BH)
    d_x = torch.empty(d_y.shape, dtype=d_y.dtype, device=d_y.device) if to is None else to
    launch(
        sources,
        (chunks.n * shape.groups * runs * (chunks.size // BM) * triton.cdiv(shape.P, config["BP"]),),
        d_y,
        B,
        C,
        D,
        at.steps,
        at.logs,
        d_states,
        d_x,
        chunks.table,
        d_y.stride(1),
        B.stride(1),
        C.stride(1),
        d_x.stride(1),
        *_sizes(shape, chunks),
        BM=BM,
        BH=BH,
        SPLIT=config["BP"] < shape.P,
        HAS_D=D is not None,
        **_constants(shape, chunks),
        **config,
    )
    return d_x


def _pairs(shape: Shape, at: Steps, x: Tensor, d_y: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    """Return the shares in the gradient of C B^T, and what `steps_backward` reads."""
    chunks, heads = at.chunks, shape.heads
    config = configuration("pairs", shape, chunks.size, x.device)
    BM, BH = config.pop("BM"), _heads_of_a_run(shape, chunks)
    runs = triton.cdiv(shape.per_group, BH)

    def new(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=x.device)

    size = (chunks.n, shape.groups, runs, chunks.size, chunks.size)
    d_gram = torch.empty(size, dtype=torch.float32 if shape.exact else x.dtype, device=x.device)
    direct, spans, skips = (new(chunks.n, heads, chunks.size) for _ in range(3))
    selves = new(chunks.n, shape.groups, chunks.size)
    launch(
        pairs,
        (chunks.n * shape.groups * runs,),
        x,
        d_y,
        B,
        C,
        at.steps,
        at.logs,
        d_gram,
        direct,
        spans,
        skips,
        selves,
        chunks.table,
        x.stride(1),
        d_y.stride(1),
        B.stride(1),
        C.stride(1),
        *_sizes(shape, chunks),
        BM=BM,
        BH=BH,
        **_constants(shape, chunks),
        **config,
    )
    return d_gram, direct, spans, skips, selves


def _through_states(
    shape: Shape,
    at: Steps,
    source: Tensor,
    other: Tensor,
    partner: Tensor,
    d_gram: Tensor,
    states: Tensor,
    others: Tensor | None,
    to: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of `other`, B, or C when there are no others, in `to` if given, and what
    `steps_backward` reads."""
    chunks = at.chunks
    config = configuration("through_states", shape, chunks.size, source.device)
    config.pop("BM")
    BN, BH = config.pop("BN"), _heads_of_a_run(shape, chunks)
    runs, pieces = d_gram.shape[2], triton.cdiv(shape.N, BN)

    def new(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=source.device)

    gradient = torch.empty(other.shape, dtype=other.dtype, device=other.device) if to is None else to
    shares = new(chunks.n, shape.groups, runs, chunks.size, shape.N) if runs > 1 else gradient
    sums = new(chunks.n, shape.heads, pieces, chunks.size)
    passed = new(chunks.n, shape.heads, pieces)
    launch(
        through_states,
        (chunks.n * shape.groups * runs * pieces,),
        source,
        other,
        partner,
        d_gram,
        at.steps,
        at.logs if others is None else at.rests,
        states,
        others,
        shares,
        sums,
        passed,
        chunks.table,
        source.stride(1),
        other.stride(1),
        partner.stride(1),
        gradient.stride(1),
        *_sizes(shape, chunks),
        BN=BN,
        BH=BH,
        READER=others is None,
        WHOLE=runs == 1,
        **_constants(shape, chunks),
        **config,
    )
    if runs > 1:
        BN = min(shape.BN, 64)
        launch(
            gather,
            (chunks.n * shape.groups * triton.cdiv(shape.N, BN),),
            shares,
            gradient,
            chunks.table,
            gradient.stride(1),
            shape.length,
            chunks.per_row,
            shape.groups,
            shape.N,
            runs,
            Q=chunks.size,
            BN=BN,
            PACKED=chunks.packed,
        )
    return gradient, sums, passed


def _sum_chunks(values: Tensor) -> Tensor:
    """Sum values (kinds, n, columns) over n in a fixed order."""
    kinds, n, columns = values.shape
    out = torch.empty(kinds, columns, dtype=torch.float32, device=values.device)
    launch(sum_chunks, (triton.cdiv(columns, 8), kinds), values, out, n, columns, ROWS=256, COLS=8)
    return out


def _back_arguments(args: tuple, fakes: tuple, results: tuple[Tensor, Tensor]) -> tuple:
    """Return the arguments of `scan_back` after a call of `scan`, all without memory."""
    y, final = results
    rooms = [fakes[i] if place_of(args[i]) else None for i in (0, 3, 4)]  # they lie as the inputs do
    return (
        y,
        final if args[14] else None,
        *fakes[:14],
        *(rooms if any(r is not None for r in rooms) else ()),
    )


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial,"
    " Tensor? doc_ids, int n_docs, int chunk, bool softplus, float low, float high"
)
_scan = op(
    "ssd",
    schema=f"({_INPUTS}, bool want_final) -> (Tensor, Tensor)",
)(compiled_first(scan, Back(scan_back, _back_arguments)))
_scan_back = op(
    "ssd_back",
    schema=f"(Tensor d_y, Tensor? d_final, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)(compiled_first(scan_back))


@_scan.register_fake
def _(x, dt, A, B, C, D, dt_bias, initial, doc_ids, n_docs, chunk, softplus, low, high, want_final):
    """Shapes of `scan`."""
    return x.new_empty(x.shape), A.new_empty(_final_shape(x, B, n_docs, want_final))


@_scan_back.register_fake
def _(d_y, d_final, x, dt, A, B, C, D, dt_bias, initial, doc_ids, n_docs, chunk, softplus, low, high):
    """Shapes of `scan_back`."""
    return (
        x.new_empty(x.shape),
        dt.new_empty(dt.shape),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        A.new_empty(0 if D is None else D.shape),
        A.new_empty(0) if dt_bias is None else dt_bias.new_empty(dt_bias.shape),
        A.new_empty(0 if initial is None else initial.shape),
    )


def _keep(ctx, inputs, output) -> None:
    tensors, rest = inputs[:9], inputs[9:14]
    x, _, _, B, C, *_ = tensors
    ctx.places = place_of(x), place_of(B), place_of(C)
    ctx.save_for_backward(*tensors)
    ctx.rest, ctx.want_final = rest, inputs[14]


def _backward(ctx, d_y, d_final):
    x, dt, A, B, C, D, dt_bias, initial, doc_ids = ctx.saved_tensors
    d_final = d_final if ctx.want_final else None
    grads = _scan_back.into(*ctx.places)(
        d_y, d_final, x, dt, A, B, C, D, dt_bias, initial, doc_ids, *ctx.rest
    )
    d_x, d_dt, d_A, d_B, d_C, d_D, d_bias, d_initial = grads
    optional = (
        None if D is None else d_D,
        None if dt_bias is None else d_bias,
        None if initial is None else d_initial,
    )
    return (d_x, d_dt, d_A, d_B, d_C, *optional, *[None] * 7)


_scan.register_autograd(_backward, setup_context=_keep)
