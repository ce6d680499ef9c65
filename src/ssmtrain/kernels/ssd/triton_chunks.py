"""Where the chunks of a packed batch lie, their step sizes and decays, and the way back to dt.

A chunk never holds two documents: each document is cut into chunks of Q tokens from its own start, so that
nothing is masked at its boundary, a packed document gives the very bits that it gives alone (sums over heads
or over all tokens excepted), and its initial and final states are those of its first and last chunk. The
batch is seen as one string of B * L tokens; documents are row-major, so each is a run in it.

Per chunk and head four fp32 rows are kept, (chunks, H, Q): the step sizes; `logs`, the running sum of the
log decays, in units of log 2 because the hardware's exponential is exp2; `late`, that less log2 of the step
size, so that a source's decay and step size up to a reader t are the one exponential exp2(logs[t] - late[s]);
and `rests`, what decays after the token, logs[Q - 1] - logs. Tokens past a chunk's end have step 0, and late
is infinite there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmtrain.kernels.ahead import launch

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-70.0)
"""The log decay at which a decay is as good as 0: sums of log decays stay small, hence exact."""
ANY_SIZE = ["length", "per_row"]
"""Arguments whose values Triton shall not compile in: for rows of one token it may round another way."""


class Chunks(NamedTuple):
    """How a batch of B rows of L tokens is cut."""

    n_docs: int
    n: int
    """Chunks there is room for: known on the host, never too few."""
    size: int
    """Tokens of a whole chunk, Q."""
    length: int
    """L"""
    table: Tensor
    """(n, 2) int64: first token and number of tokens of each chunk; empty when rows are documents."""
    docs: Tensor
    """(n_docs + 1, 3) int64: a document's first token, chunk, block of 64; empty when rows are documents."""

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents."""
        return self.table.numel() > 0

    @property
    def per_row(self) -> int:
        """Chunks of a row that is one document."""
        return -(-self.length // self.size)


def cut(batch: int, length: int, size: int, doc_ids: Tensor | None, n_docs: int, like: Tensor) -> Chunks:
    """Cut a batch into chunks of up to `size` tokens, documents each from their start; never syncs."""
    if doc_ids is None:
        nothing = torch.empty(0, dtype=torch.int64, device=like.device)
        return Chunks(batch, batch * -(-length // size), size, length, nothing, nothing)
    n = batch * length // size + n_docs
    table = torch.empty(n, 2, dtype=torch.int64, device=like.device)
    docs = first_tokens(doc_ids, n_docs)
    launch(_place_chunks, (n_docs + 1,), docs, table, n, n_docs, Q=size, K=64, DOCS=1024, BLOCK=128)
    return Chunks(n_docs, n, size, length, table, docs)


def first_tokens(doc_ids: Tensor, n_docs: int) -> Tensor:
    """Return (n_docs + 1, 3) int64 with documents' first tokens, and past the last the number of all tokens,
    in column 0."""
    docs = torch.empty(n_docs + 1, 3, dtype=torch.int64, device=doc_ids.device)
    tokens = doc_ids.numel()
    launch(
        _find_documents, (triton.cdiv(tokens, 1024),), doc_ids.contiguous(), docs, tokens, n_docs, BLOCK=1024
    )
    return docs


@triton.jit(do_not_specialize=["tokens", "n_docs"])
def _find_documents(doc_ids, docs, tokens, n_docs, BLOCK: tl.constexpr):
    """Write the first token of each document, from the places where the id changes, and for the end of the
    last, and all that there could have been after it, the number of tokens."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < tokens
    here = tl.load(doc_ids + at, mask=live, other=0)
    before = tl.load(doc_ids + at - 1, mask=live & (at > 0), other=-1)
    tl.store(docs + 3 * here.to(tl.int64), at, mask=live & (here != before))
    if tl.program_id(0) == 0:
        after = tl.load(doc_ids + tokens - 1).to(tl.int32) + 1
        for start in range(after, n_docs + 1, BLOCK):
            d = start + tl.arange(0, BLOCK)
            tl.store(docs + 3 * d, tl.zeros((BLOCK,), tl.int64) + tokens, mask=d <= n_docs)


@triton.jit
def _place_chunks(
    docs, table, n, n_docs, Q: tl.constexpr, K: tl.constexpr, DOCS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write a document's first chunk and block of K, and first token and size of its chunks.

    Past the last document, empty chunks. Each program counts the chunks before its document by itself: DOCS
    documents at a time, that costs less than the launch of another kernel.
    """
    d = tl.program_id(0)
    chunk = tl.zeros((), tl.int64)
    block = tl.zeros((), tl.int64)
    for start in range(0, d, DOCS):
        i = start + tl.arange(0, DOCS)
        before = tl.load(docs + 3 * i, mask=i < d, other=0)
        size = tl.load(docs + 3 * i + 3, mask=i < d, other=0) - before
        chunk += tl.sum((size + Q - 1) // Q, 0)
        block += tl.sum((size + K - 1) // K, 0)
    tl.store(docs + 3 * d + 1, chunk)
    tl.store(docs + 3 * d + 2, block)
    first = tl.load(docs + 3 * d)
    if d < n_docs:
        after = tl.load(docs + 3 * d + 3)
        count = ((after - first + Q - 1) // Q).to(tl.int32)
    else:
        after = first
        count = (n - chunk).to(tl.int32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        token = tl.minimum(first + i.to(tl.int64) * Q, after)
        tl.store(table + 2 * (chunk + i), token, mask=i < count)
        tl.store(table + 2 * (chunk + i) + 1, tl.minimum(after - token, Q), mask=i < count)


@triton.jit
def place(c, table, length, per_row, Q: tl.constexpr, PACKED: tl.constexpr):
    """Return the first token (int64) and the number of tokens of chunk c."""
    if PACKED:
        first = tl.load(table + 2 * c.to(tl.int64))
        size = tl.load(table + 2 * c.to(tl.int64) + 1).to(tl.int32)
    else:
        row = c // per_row
        start = (c - row * per_row) * Q
        first = row.to(tl.int64) * length + start
        size = tl.minimum(length - start, Q)
    return first, size


@triton.jit
def share_of(pid, parts, H, per_group, BH: tl.constexpr):
    """Return what is program pid's, of `parts` for each run of up to BH heads of each group and chunk.

    That is: part, run, group, first head and one past the last, chunk. Parts of a run are neighbours, and so
    are runs of a chunk: what they read twice is in the cache.
    """
    runs = tl.cdiv(per_group, BH)
    run = (pid // parts) % runs
    group = (pid // (parts * runs)) % (H // per_group)
    begin = group * per_group + run * BH
    end = begin + tl.minimum(BH, per_group - run * BH)
    return pid % parts, run, group, begin, end, pid // (parts * (H // per_group) * runs)


@triton.jit
def softplus(v):
    """Return log(1 + exp(v)), to fp32 rounding at any v.

    log(1 + u) with u = exp(-|v|) in (0, 1] is 2 atanh(u / (2 + u)), whose series converges by 1/9 a term:
    no logarithm near 1 is taken, where it would lose what small step sizes are made of.
    """
    u = tl.exp2(-tl.abs(v) * LOG2E)
    s = u / (2.0 + u)
    r = s * s
    p = 1.0 / 15 + r * (1.0 / 17)
    p = 1.0 / 13 + r * p
    p = 1.0 / 11 + r * p
    p = 1.0 / 9 + r * p
    p = 1.0 / 7 + r * p
    p = 1.0 / 5 + r * p
    p = 1.0 / 3 + r * p
    return tl.maximum(v, 0.0) + 2.0 * s * (1.0 + r * p)


@triton.jit
def step_size(raw, low, high, SOFTPLUS: tl.constexpr):
    """Return the step size of dt + dt_bias, and its derivative."""
    if SOFTPLUS:
        step = softplus(raw)
        slope = 1.0 / (1.0 + tl.exp2(-raw * LOG2E))
    else:
        step = raw
        slope = tl.full(raw.shape, 1.0, tl.float32)
    inside = (step >= low) & (step <= high)
    return tl.minimum(tl.maximum(step, low), high), tl.where(inside, slope, 0.0)


@triton.jit(do_not_specialize=ANY_SIZE)
def steps_forward(
    dt,
    A,
    bias,
    table,
    steps,
    logs,
    late,
    rests,
    s_token,
    length,
    per_row,
    H,
    low,
    high,
    Q: tl.constexpr,
    BH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write steps, logs, late and rests (chunks, H, Q) of one chunk, BH heads."""
    c = tl.program_id(0)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    q = tl.arange(0, Q)
    first, size = place(c, table, length, per_row, Q, PACKED)
    live = (q < size)[:, None] & (h < H)[None, :]
    raw = tl.load(dt + (first + q)[:, None] * s_token + h[None, :], mask=live, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    step, _ = step_size(raw, low, high, SOFTPLUS)
    step = tl.where(live, step, 0.0)
    a = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32)
    log = tl.cumsum(tl.maximum(step * a[None, :], FLOOR) * LOG2E, 0)
    at = (c.to(tl.int64) * H + h)[None, :] * Q + q[:, None]
    tl.store(steps + at, step, mask=(h < H)[None, :])
    tl.store(logs + at, log, mask=(h < H)[None, :])
    tl.store(late + at, log - tl.log2(step), mask=(h < H)[None, :])
    last = tl.sum(tl.where((q == Q - 1)[:, None], log, 0.0), 0)
    tl.store(rests + at, last[None, :] - log, mask=(h < H)[None, :])


@triton.jit(do_not_specialize=[*ANY_SIZE, "n_chunks"])
def steps_backward(
    dt,
    A,
    bias,
    table,
    direct,
    fed,
    spans,
    read,
    through,
    logs,
    skips,
    selves,
    d_dt,
    sums,
    s_token,
    length,
    per_row,
    n_chunks,
    H,
    per_group,
    low,
    high,
    Q: tl.constexpr,
    BH: tl.constexpr,
    READS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write the gradient of dt of one chunk, BH heads, and the chunk's share in those of A, dt_bias and D.

    The decay at token k lies between every source before k and every reader from k on, so its gradient is the
    sum of four kinds of pairs: source and reader in the chunk, a source before it, a reader after it, both
    outside. Of pairs in the chunk `spans` (H, Q) holds each reader's, and `direct` (H, Q) each source's, yet
    to be multiplied by its step size, as is `fed` (H, pieces, Q), what it feeds to the state that leaves;
    `read` (H, pieces, Q) is what a token reads from the state that enters, `through` (H, pieces) the inner
    product of the state that enters and the gradient of the one that leaves, the pairs outside but for the
    chunk's decay. Each is the sum of its pieces. A token's pair with itself is skips times selves, (G, Q).
    """
    c = tl.program_id(0)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    q = tl.arange(0, Q)
    first, size = place(c, table, length, per_row, Q, PACKED)
    heads = c.to(tl.int64) * H + h
    at = heads[:, None] * Q + q[None, :]
    some = (h < H)[:, None] & (q < size)[None, :]
    token = (first + q)[None, :] * s_token + h[:, None]
    raw = tl.load(dt + token, mask=some, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32)[:, None]
    step, slope = step_size(raw, low, high, SOFTPLUS)
    feeding = tl.zeros((BH, Q), tl.float32)
    for i in tl.static_range(READS):
        feeding += tl.load(fed + (heads * READS + i)[:, None] * Q + q[None, :], mask=some, other=0.0)
    d_step = tl.load(direct + at, mask=some, other=0.0) + feeding
    reach = tl.load(spans + at, mask=some, other=0.0) - d_step * step
    feeding *= step
    # A token's pair with itself spans no decay.
    skip = tl.load(skips + at, mask=some, other=0.0)
    own = (c.to(tl.int64) * (H // per_group) + h // per_group)[:, None] * Q + q[None, :]
    d_step += skip * tl.load(selves + own, mask=some, other=0.0)
    for i in tl.static_range(READS):
        reach += tl.load(read + (heads * READS + i)[:, None] * Q + q[None, :], mask=some, other=0.0)
    over = tl.sum(feeding, 1)
    passed = tl.zeros((BH,), tl.float32)
    for i in tl.static_range(READS):
        passed += tl.load(through + heads * READS + i, mask=h < H, other=0.0)
    over += passed * tl.exp2(tl.load(logs + heads * Q + Q - 1, mask=h < H, other=0.0))
    d_log = tl.cumsum(reach, 1, reverse=True) + over[:, None]
    a = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32)
    d_step += d_log * a[:, None]
    d_raw = tl.where(some, d_step * slope, 0.0)
    out = (first + q)[None, :] * H + h[:, None]
    tl.store(d_dt + out, d_raw.to(d_dt.dtype.element_ty), mask=some)
    tl.store(sums + heads, tl.sum(tl.where(some, d_log * step, 0.0), 1), mask=h < H)
    tl.store(sums + n_chunks.to(tl.int64) * H + heads, tl.sum(d_raw, 1), mask=h < H)
    if HAS_D:
        tl.store(sums + 2 * n_chunks.to(tl.int64) * H + heads, tl.sum(skip, 1), mask=h < H)


@triton.jit
def sum_chunks(values, out, n, columns, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sum values (kinds, n, columns) over n, always in the same order; grid (blocks of columns, kinds)."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    kind = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, n, ROWS):
        at = (kind * n + start + row)[:, None] * columns + col[None, :]
        live = (start + row < n)[:, None] & (col < columns)[None, :]
        total += tl.load(values + at, mask=live, other=0.0)
    tl.store(out + kind * columns + col, tl.sum(total, 0), mask=col < columns)
