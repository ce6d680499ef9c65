# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 - in a kernel a tuple grows by +, and changes its type
"""Linear cross-entropy in Triton: the chunks and products of the reference, one kernel for what is between.

Logits are as many as rows times the vocabulary, so what is between the products is limited by memory. Here it
reads fp32 logits once and writes softmax - onehot once: a program owns a row, sweeps it for the maximum and
the sum of exponentials, and sweeps it again, from the end where its last sweep has just been, while the L2
cache holds it. The first HELD blocks stay in registers, of which each thread has 64, so that two programs
share a multiprocessor: of the four that would fit without, the rows are too much for the cache. A sweep keeps
a maximum and a sum for every EACH neighbours, so that there is one more exponential for EACH of them and no
thread waits for another before the row's end; Triton's pipeliner copies the next STAGES - 1 blocks to shared
memory meanwhile.

Both buffers are reused from chunk to chunk, and their rows lie a multiple of PITCH elements apart, so that
a vocabulary of 50257 too is read and multiplied 16 bytes at a time. What is beyond the vocabulary is read
with it and then left out: a mask that ends anywhere would make Triton load element by element.

A label that is neither ignore_index nor in [0, V) is not looked up: its row's loss is NaN, and so are the
gradients that the row enters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmtrain.kernels import tuned
from ssmtrain.kernels.linear_cross_entropy import reference
from ssmtrain.kernels.matmul import mm

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The least fp32: a maximum over nothing, whose distance to itself is no NaN."""

PITCH = 64
"""Elements: rows begin at multiples of 128 bytes in 16 bits too."""
LANES = 4096
"""Of a block, at most: 16 KiB of logits."""
LANES_OF_WARP = 256
"""Two of a thread's 16-byte loads."""
KEPT = 4
"""Blocks that stay in registers between the sweeps, at most: half of a thread's 64."""
STAGES = 4
"""With three blocks of each program on their way there are 96 KiB of loads in flight."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    logit_scale: float,
    ignore_index: int,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.linear_cross_entropy`; float64 is left to the reference."""
    if reference.matmul_dtype(hidden, weight) == torch.float64:
        return reference.linear_cross_entropy(
            hidden, weight, labels, logit_scale=logit_scale, ignore_index=ignore_index, chunk=chunk
        )
    rows = chunk or reference.chunk_rows(weight.shape[0], on_gpu=True)
    residual = _Residual(float(logit_scale), ignore_index)
    return reference.in_chunks(residual, rows, hidden, weight, labels, float(logit_scale), ignore_index)


@triton.jit
def _scaled(logits, at, reach, vocab, scale):
    """Read scaled logits; what is beyond the vocabulary is none."""
    logit = tl.load(logits + at, mask=at < reach, other=0.0) * scale
    return tl.where(at < vocab, logit, float("-inf"))


@triton.jit
def _counted(logit, tops, sums):
    """The maxima, and the sums of exponentials relative to them, with these logits among them."""
    higher = tl.maximum(tops, tl.max(logit, 1))
    here = tl.sum(tl.exp2((logit - higher[:, None]) * LOG2E), 1)
    return higher, sums * tl.exp2((tops - higher) * LOG2E) + here


@triton.jit
def _write(p, at, logit, top, inverse, column, live, pitch):
    """Write softmax - onehot."""
    share = tl.exp2((logit - top) * LOG2E) * inverse
    share = tl.where(live, tl.where(at == column, share - 1.0, share), 0.0)
    tl.store(p + at, share.to(p.dtype.element_ty), mask=at < pitch)


@triton.jit(do_not_specialize=["vocab", "ignored"])
def _softmax(
    logits,  # (Q, pitch), of which vocab count
    labels,  # (Q,)
    losses,  # (Q,)
    p,  # (Q, pitch): softmax - onehot; or None
    vocab,
    pitch,
    ignored,
    scale,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Cross-entropy of a row of scaled logits, and its gradient by them."""
    # 64 bits: rows times their pitch pass 2^31 where a caller sets large chunks.
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    live = label != ignored
    known = (label >= 0) & (label < vocab)
    column = tl.where(live & known, label, -1).to(tl.int32)
    logits += row * pitch
    reach = tl.where(live, pitch, 0)  # a row to be ignored is not read
    lane = tl.arange(0, BLOCK // EACH)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    own = tl.load(logits + column, mask=column >= 0, other=0.0) * scale
    tops = tl.full((BLOCK // EACH,), LOWEST, tl.float32)
    sums = tl.zeros((BLOCK // EACH,), tl.float32)
    held = ()
    for piece in tl.static_range(HELD):
        logit = _scaled(logits, piece * BLOCK + lane, reach, vocab, scale)
        tops, sums = _counted(logit, tops, sums)
        held = held + (logit,)
    for base in tl.range(HELD * BLOCK, reach, BLOCK, num_stages=STAGES):
        tops, sums = _counted(_scaled(logits, base + lane, reach, vocab, scale), tops, sums)
    top = tl.max(tops, 0)
    total = tl.sum(sums * tl.exp2((tops - top) * LOG2E), 0)
    total = tl.where(live, tl.where(known, total, float("nan")), 1.0)
    tl.store(losses + row, tl.where(live, top - own + tl.log(total), 0.0))
    if p is not None:
        p += row * pitch
        inverse = 1.0 / total
        last = (pitch - 1) // BLOCK * BLOCK
        for base in tl.range(HELD * BLOCK, pitch, BLOCK, num_stages=STAGES):
            at = last + HELD * BLOCK - base + lane
            logit = tl.load(logits + at, mask=at < reach, other=0.0) * scale
            _write(p, at, logit, top, inverse, column, live, pitch)
        for piece in tl.static_range(HELD):
            _write(p, piece * BLOCK + lane, held[piece], top, inverse, column, live, pitch)


def _config(pitch: int) -> tuned.Config:
    """How to sweep a row: EACH is a 16-byte load."""
    block = min(triton.next_power_of_2(pitch), LANES)
    held = min(KEPT, pitch // block)
    return {
        "EACH": 4,
        "BLOCK": block,
        "HELD": held,
        "STAGES": STAGES,
        "num_warps": max(1, block // LANES_OF_WARP),
        "maxnreg": 64,
    }


class _Residual:
    """`reference.Residual` with the kernel between the products, in buffers of its own."""

    def __init__(self, scale: float, ignore_index: int) -> None:
        self._scale, self._ignored = scale, ignore_index
        self._logits: Tensor | None = None
        self._p: Tensor | None = None

    def __call__(self, h: Tensor, W: Tensor, labels: Tensor, losses: Tensor, wanted: bool) -> Tensor | None:
        (rows, _), vocab = h.shape, W.shape[0]
        pitch = triton.cdiv(vocab, PITCH) * PITCH
        if self._logits is None:  # the first chunk is the largest
            self._logits = torch.empty(rows, pitch, dtype=losses.dtype, device=h.device)
            self._p = torch.empty(rows, pitch, dtype=h.dtype, device=h.device) if wanted else None
        mm(h, W.t(), losses.dtype, out=self._logits[:rows, :vocab])
        with torch.cuda.device_of(h):
            _softmax[(rows,)](
                *(self._logits, labels.contiguous(), losses, self._p),
                *(vocab, pitch, self._ignored, self._scale),
                **_config(pitch),
            )
        return None if self._p is None else self._p[:rows, :vocab]
