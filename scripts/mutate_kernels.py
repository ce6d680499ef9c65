"""Break the Triton kernels on purpose, one line at a time, and see that a test notices.

    python scripts/mutate_kernels.py                  # all mutations
    python scripts/mutate_kernels.py --only conv      # those whose name has the word
    python scripts/mutate_kernels.py --list

Each mutation replaces a text that occurs in its file, in a copy of the tree, and runs the tests that should
see it, which passed before: killed when they fail now, survived when they pass. The exit code is 1 when one
survives or its text is gone from the file (the kernel has changed: write the mutation anew). Tests run in the
interpreter, on the CPU; what shows on a Hopper GPU alone is left out elsewhere.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "src/ssmtrain/kernels"
OFFSETS = "tests/kernels/triton/test_offsets.py"


@dataclass(frozen=True)
class Mutation:
    """A text to replace, and the tests (files, or files with -k) that should fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    occurrence: int = 0
    """Which of the text's occurrences."""
    gpu: bool = False
    """Whether the tests need a Hopper GPU."""


def conv(name: str, old: str, new: str, occurrence: int = 0, tests: str = "") -> Mutation:
    """A mutation of the convolution."""
    file, found = f"{KERNELS}/causal_conv1d/triton.py", tests or "tests/kernels/triton/test_triton_conv.py"
    return Mutation(f"conv: {name}", file, old, new, tuple(found.split()), occurrence)


def norm(name: str, old: str, new: str, occurrence: int = 0, tests: str = "") -> Mutation:
    """A mutation of the gated norm."""
    file = f"{KERNELS}/gated_norm/triton.py"
    found = tests or "tests/kernels/triton/test_triton_gated_norm.py"
    return Mutation(f"norm: {name}", file, old, new, tuple(found.split()), occurrence)


def head(name: str, old: str, new: str, occurrence: int = 0) -> Mutation:
    """A mutation of the linear cross-entropy."""
    file = f"{KERNELS}/linear_cross_entropy/triton.py"
    found = "tests/kernels/triton/test_triton_linear_cross_entropy.py"
    return Mutation(f"head: {name}", file, old, new, (found,), occurrence)


def ssd(name: str, part: str, old: str, new: str, occurrence: int = 0, tests: str = "") -> Mutation:
    """A mutation of ssd/triton{part}.py."""
    found = tests or "tests/kernels/triton/test_triton_ssd.py"
    return Mutation(
        f"ssd: {name}", f"{KERNELS}/ssd/triton{part}.py", old, new, tuple(found.split()), occurrence
    )


def hopper(name: str, old: str, new: str, occurrence: int = 0, gpu: str = "") -> Mutation:
    """A mutation of ssd/triton_hopper.py; `gpu` has the tests of one that shows on a GPU alone."""
    found = gpu or "tests/kernels/triton/test_hopper_on_cpu.py"
    file = f"{KERNELS}/ssd/triton_hopper.py"
    return Mutation(f"hopper: {name}", file, old, new, tuple(found.split()), occurrence, bool(gpu))


def n16(name: str, part: str, old: str, new: str, occurrence: int = 0) -> Mutation:
    """A mutation of selective_scan/triton_n16{part}.py."""
    file = f"{KERNELS}/selective_scan/triton_n16{part}.py"
    found = "tests/kernels/triton/test_selective_scan_n16_on_cpu.py"
    return Mutation(f"n16: {name}", file, old, new, (found,), occurrence)


def selective(name: str, part: str, old: str, new: str, occurrence: int = 0) -> Mutation:
    """A mutation of selective_scan/triton_{part}.py."""
    file = f"{KERNELS}/selective_scan/triton_{part}.py"
    found = "tests/kernels/triton/test_triton_selective_scan.py"
    return Mutation(f"selective: {name}", file, old, new, (found,), occurrence)


WIDE_CONV, WIDE_NORM, WIDE_SSD = (f"{OFFSETS} -k {op}" for op in ("conv1d", "norm", "ssd"))
WIDE_STEPS = f"{OFFSETS} -k steps"

CONV = [
    conv(
        "a document starts with the window before it",
        "(tl.where(starts, 0.0, window[lag - 1]),)",
        "(window[lag - 1],)",
    ),
    conv(
        "an initial state is not read", "(tl.where(starts, before, window[lag - 1]),)", "(window[lag - 1],)"
    ),
    conv("gradients reach the document before", "(tl.where(starts, 0.0, pending[j]),)", "(pending[j],)"),
    conv("forward: no look at the document before", "t + UNROLL - 1, t + 2", "t + UNROLL, t + 2"),
    conv("forward: no look at the token after", "t + UNROLL - 1, t + 2 *", "t + UNROLL - 1, t + 1 *"),
    conv("forward: no look before the run", "first - 1, first + UNROLL", "first, first + UNROLL"),
    conv("backward: no look at the oldest in reach", "t + UNROLL - (K - 1), t + 2", "t + UNROLL, t + 2"),
    conv("backward: no look before the run", "first - (K - 1), first + UNROLL", "first, first + UNROLL"),
    conv("backward: no look after the run", "after - (K - 1), after + K - 1", "after - (K - 1), after"),
    conv("forward: the first group again", "rows, ends = next_rows, next_ends", "ends = next_ends"),
    conv(
        "backward: the first gradients again",
        "rows, grads, ends = next_rows, next_grads,",
        "rows, ends = next_rows,",
    ),
    conv("neighbours change places", "tl.interleave(even, odd)", "tl.interleave(odd, even)"),
    conv("neighbours of fp16 lose a sign", "(values & 65535)", "(values & 32767)"),
    conv(
        "the next run's first tokens write too",
        "(token >= bounds[0]) & (token < bounds[1])",
        "(token >= bounds[0] - 1)",
    ),
    conv("the gradient of SiLU", "(s + s * a * (1.0 - s))", "(s + a * (1.0 - s))"),
    conv("the final state's gradient is dropped", "pending[j] + more.to(tl.float32)", "pending[j]"),
    conv("rows past the end are read", "inside & (t + i >= 0) & (t + i < L)", "inside & (t + i >= 0)"),
    conv("rows before the start are read", "inside & (t + i >= 0) & (t + i < L)", "inside & (t + i < L)"),
    conv("taps in the wrong order", "k == K - 1 - lag, tile", "k == lag, tile"),
    conv("32-bit rows", "(run // runs).to(tl.int64)", "(run // runs)", tests=f"{OFFSETS} -k many_rows"),
    conv("32-bit offsets of y", "C = units.to(tl.int64) * ALIGN", "C = units * ALIGN", tests=WIDE_CONV),
    conv("32-bit offsets of dx", "C = units.to(tl.int64) * ALIGN", "C = units * ALIGN", 1, WIDE_CONV),
    conv("32-bit steps", "step.to(tl.int64) * ALIGN", "step * ALIGN", tests=WIDE_CONV),
    conv(
        "32-bit rows of a step",
        "(tl.program_id(0) // blocks).to(tl.int64)",
        "(tl.program_id(0) // blocks)",
        tests=WIDE_STEPS,
    ),
]

NORM = [
    norm(
        "32-bit rows",
        "program = tl.program_id(0).to(tl.int64)",
        "program = tl.program_id(0)",
        tests=WIDE_NORM,
    ),
    norm(
        "32-bit rows back",
        "program = tl.program_id(0).to(tl.int64)",
        "program = tl.program_id(0)",
        1,
        WIDE_NORM,
    ),
    norm(
        "32-bit rows of means",
        "program = tl.program_id(0).to(tl.int64)",
        "program = tl.program_id(0)",
        2,
        WIDE_NORM,
    ),
    norm("no epsilon", "/ CHANNELS + eps)", "/ CHANNELS)"),
    norm(
        "the mean over all groups",
        "tl.sum(squares, 1, keep_dims=True) / CHANNELS",
        "tl.sum(squares, 1, keep_dims=True) / (CHANNELS * GROUPS)",
    ),
    norm("the mean of a row that is read twice", "tl.sum(share, 0) / CHANNELS", "tl.sum(share, 0)"),
    norm("the mean back", "tl.sum(share, 1, keep_dims=True) / CHANNELS", "tl.sum(share, 1, keep_dims=True)"),
    norm("channels past the group", "live & (at < CHANNELS)", "live", 0),
    norm("rows past the end of a run", "(run < runs) & (channel < WIDTH)", "(channel < WIDTH)"),
    norm("rounded to x's dtype", "x.new_empty(x.shape, dtype=out_dtype)", "x.new_empty(x.shape)"),
    norm("the stream's gradient is dropped", "scales, 1, False, dx)", "scales, 1, False, None)"),
    norm("the kernel drops the stream's gradient", "inner_grad += more", "inner_grad += 0.0 * more"),
    norm("the stream's gradient is scaled too", "inner_grad += more", "inner_grad += more * scale"),
    norm("the stream's gradient by x's strides", "row * add_stride * UNIT", "row * x_stride * UNIT"),
    norm(
        "no gradient of a stream that nothing else reads", "return dx, None, None, None", "return (None,) * 4"
    ),
]

PROPERTIES = "tests/kernels/triton/test_triton_ssd_properties.py"
EXTREMES, STILL, FAR = (f"{PROPERTIES} -k {test}" for test in ("extremes", "step_of_zero", "far_apart"))
MASKED = "gram = tl.where(past, tl.dot(read, tl.trans(keys), input_precision=PRECISION), 0.0)"
MASKED_BACK = "gram = tl.where(later, tl.dot(keys, tl.trans(read), input_precision=PRECISION), 0.0)"

SSD_CHUNKS = [
    ssd("32-bit rows", "_chunks", "row.to(tl.int64) * length", "row * length", tests=WIDE_SSD),
    ssd(
        "a document's last tokens have no chunk",
        "_chunks",
        "(after - first + Q - 1) // Q",
        "(after - first) // Q",
    ),
    ssd(
        "a chunk goes on into the next document",
        "_chunks",
        "tl.minimum(after - token, Q)",
        "after - after + Q",
    ),
    ssd("chunks left over are not emptied", "_chunks", "(n - chunk).to(tl.int32)", "(n - n).to(tl.int32)"),
    ssd("documents before are not counted", "_chunks", "range(0, d, DOCS)", "range(0, 0, DOCS)"),
    ssd("documents past a block start anew", "_chunks", "chunk += tl.sum(", "chunk = tl.sum("),
    ssd("blocks of documents past a block start anew", "_chunks", "block += tl.sum(", "block = tl.sum("),
    ssd("no part of a chunk is counted", "_chunks", "(size + Q - 1) // Q", "size // Q"),
    ssd("no part of a block is counted", "_chunks", "(size + K - 1) // K", "size // K"),
    ssd("tokens past a chunk's end have a step", "_chunks", "tl.where(live, step, 0.0)", "step + 0.0"),
    ssd(
        "no floor of log decays",
        "_chunks",
        "tl.maximum(step * a[None, :], FLOOR)",
        "step * a[None, :]",
        tests=EXTREMES,
    ),
    ssd("late without the step", "_chunks", "log - tl.log2(step)", "log"),
    ssd(
        "late is finite where the step is 0",
        "_chunks",
        "log - tl.log2(step)",
        "log - tl.where(step > 0, tl.log2(step), 0.0)",
        tests=STILL,
    ),
    ssd("rests from the last token but one", "_chunks", "(q == Q - 1)[:, None]", "(q == Q - 2)[:, None]"),
    ssd("no upper limit", "_chunks", "tl.minimum(tl.maximum(step, low), high)", "tl.maximum(step, low)"),
    ssd("no lower limit", "_chunks", "tl.minimum(tl.maximum(step, low), high)", "tl.minimum(step, high)"),
    ssd("a slope above the limit", "_chunks", "(step >= low) & (step <= high)", "step >= low"),
    ssd("a slope below the limit", "_chunks", "(step >= low) & (step <= high)", "step <= high"),
    ssd("the slope of softplus", "_chunks", "1.0 / (1.0 + tl.exp2(-raw * LOG2E))", "1.0 + 0.0 * raw"),
    ssd("softplus is the first term", "_chunks", "2.0 * s * (1.0 + r * p)", "2.0 * s"),
    ssd("no dt_bias", "_chunks", "raw += tl.load(bias + h", "raw += 0 * tl.load(bias + h"),
    ssd("no dt_bias back", "_chunks", "raw += tl.load(bias + h", "raw += 0 * tl.load(bias + h", 1),
    ssd("what is fed is added, not taken", "_chunks", "- d_step * step", "+ d_step * step"),
    ssd("what is fed is not weighted", "_chunks", "feeding *= step", "feeding *= 1.0"),
    ssd(
        "what passes through does not decay",
        "_chunks",
        "over += passed * tl.exp2",
        "over += passed + 0 * tl.exp2",
    ),
    ssd(
        "log decays are summed from the wrong end",
        "_chunks",
        "tl.cumsum(reach, 1, reverse=True)",
        "tl.cumsum(reach, 1)",
    ),
    ssd("what passes through a chunk is dropped", "_chunks", "+ over[:, None]", "+ 0 * over[:, None]"),
    ssd("A does not reach dt", "_chunks", "d_step += d_log * a[:, None]", "d_step += 0 * d_log * a[:, None]"),
    ssd(
        "rows of sums past a block are dropped",
        "_chunks",
        "for start in range(0, n, ROWS)",
        "for start in range(0, 1, ROWS)",
    ),
]

SSD_STATES = [
    ssd(
        "32-bit documents", "_states", "first = d.to(tl.int64) * length", "first = d * length", tests=WIDE_SSD
    ),
    ssd(
        "32-bit chunks", "_states", "chunk = d.to(tl.int64) * per_row", "chunk = d * per_row", tests=WIDE_SSD
    ),
    ssd(
        "32-bit tokens of a document",
        "_states",
        "shift = block.to(tl.int64) * BK",
        "shift = block * BK",
        tests=FAR,
    ),
    ssd(
        "every document starts at the first chunk",
        "_states",
        "chunk = tl.load(docs + 3 * d + 1)",
        "chunk = tl.load(docs + 1)",
    ),
    ssd("a document does not end", "_states", "(tl.load(docs + 3 * d + 3) - first)", "(length + 0 * first)"),
    ssd(
        "the state does not start at zero",
        "_states",
        "acc = tl.zeros((BP, BN), tl.float32)",
        "acc = tl.zeros((BP, BN), tl.float32) + 0.01",
    ),
    ssd(
        "initial states are not read",
        "_states",
        "acc += tl.load(initial + ends",
        "acc += 0 * tl.load(initial + ends",
    ),
    ssd("the way back starts from the initial state", "_states", "(pid >= 0) & (not back)", "(pid >= 0)"),
    ssd(
        "the final state's gradient is dropped",
        "_states",
        "acc += tl.load(dfinal + ends",
        "acc += 0 * tl.load(dfinal + ends",
    ),
    ssd("the state does not decay", "_states", "acc * tl.exp2(end - begin)", "acc"),
    ssd(
        "a chunk's first block decays from the head before",
        "_states",
        "live & (block % (Q // BK) > 0)",
        "live & (at - 1 >= logs)",
    ),
    ssd(
        "the way back writes the state of the first block",
        "_states",
        "tl.where(back, BLOCKS - 1, 0)",
        "tl.where(back, 0, 0)",
    ),
    ssd(
        "the weight back is the way forth's",
        "_states",
        "tl.where(back, decay - begin, end - decay)",
        "end - decay",
    ),
    ssd(
        "tokens past the end are fed",
        "_states",
        "live & (p < P)[None, :]",
        "(live | True) & (p < P)[None, :]",
    ),
    ssd("a scalar of the block before", "_states", "begin, end = next_begin, next_end", "begin = next_begin"),
]

SSD_OUTPUTS = [
    ssd("outputs: 32-bit heads", "_outputs", "c.to(tl.int64) * H + h", "c * H + h", tests=WIDE_SSD),
    ssd("outputs: later tokens count", "_outputs", MASKED, MASKED.replace("past", "past | True")),
    ssd("outputs: not its own token", "_outputs", "i[:, None] >= i[None, :]", "i[:, None] > i[None, :]"),
    ssd(
        "outputs: no clamp",
        "_outputs",
        "tl.minimum(log[:, None] - here[None, :], 126.0)",
        "log[:, None] - here[None, :]",
        tests=EXTREMES,
    ),
    ssd("outputs: no D", "_outputs", "acc += skip * u", "acc += 0 * u"),
    ssd("outputs: D of the first head", "_outputs", "skip = tl.load(D + h)", "skip = tl.load(D)"),
    ssd("outputs: the state does not decay", "_outputs", "acc *= tl.exp2(log)[:, None]", "acc *= 1.0"),
    ssd("outputs: the state does not decay over a block", "_outputs", "acc * tl.exp2(middle)", "acc"),
    ssd(
        "outputs: no decay in the second block",
        "_outputs",
        "acc *= tl.exp2(log - middle)[:, None]",
        "acc *= 1.0",
    ),
    ssd("outputs: no second block", "_outputs", "second = (i >= 0) & (m > 0)", "second = (i < 0) & (m > 0)"),
    ssd("outputs: a block before the first", "_outputs", "second = (i >= 0) & (m > 0)", "second = i >= 0"),
    ssd(
        "outputs: tokens past the end are written",
        "_outputs",
        "own = (m * BM + i < size)[:, None]",
        "own = (i >= 0)[:, None]",
    ),
    ssd("outputs: the wrong group", "_outputs", "start * s_B + group * N", "start * s_B"),
]

SSD_GRADS = [
    ssd(
        "sources: 32-bit heads", "_grads", "head = c.to(tl.int64) * H + h", "head = c * H + h", tests=WIDE_SSD
    ),
    ssd("sources: earlier tokens count", "_grads", MASKED_BACK, MASKED_BACK.replace("later", "later | True")),
    ssd(
        "sources: no clamp",
        "_grads",
        "tl.minimum(log[None, :] - log[:, None], 0.0)",
        "log[None, :] - log[:, None]",
        tests=EXTREMES,
    ),
    ssd("sources: no D", "_grads", "du += skip * g", "du += 0 * g"),
    ssd("sources: no step", "_grads", "du *= step[:, None]", "du *= 1.0"),
    ssd("sources: D of the first head", "_grads", "skip = tl.load(D + h)", "skip = tl.load(D)"),
    ssd("sources: no readers in the second block", "_grads", "tl.where(m == 0, size, 0)", "0 * size"),
    ssd("sources: the state does not decay", "_grads", "du *= tl.exp2(last - log)[:, None]", "du *= 1.0"),
    ssd("sources: the state does not decay over a block", "_grads", "du * tl.exp2(last - middle)", "du"),
    ssd(
        "sources: no decay in the first block", "_grads", "du *= tl.exp2(middle - log)[:, None]", "du *= 1.0"
    ),
    ssd(
        "pairs: 32-bit shares", "_grads", "dgram + ((c.to(tl.int64) * (H", "dgram + ((c * (H", tests=WIDE_SSD
    ),
    ssd("pairs: earlier tokens count", "_grads", "gram = tl.where(later & ", "gram = tl.where("),
    ssd(
        "pairs: earlier tokens count in block 2", "_grads", "gram_2 = tl.where(later & ", "gram_2 = tl.where("
    ),
    ssd("pairs: own pairs count twice", "_grads", "later & (i[:, None] != i[None, :])", "later"),
    ssd(
        "pairs: own pairs count twice in block 2", "_grads", "later & (i[:, None] != i[None, :])", "later", 1
    ),
    ssd("pairs: no own pairs in block 2", "_grads", "tl.where(same, gram_2, 0.0)", "0.0 * gram_2"),
    ssd("pairs: the first group's own pairs", "_chunks", "h // per_group)[:, None]", "0 * h)[:, None]"),
    ssd("pairs: no clamp", "_grads", "tl.minimum(to - log, 0.0)", "to - log", tests=EXTREMES),
    ssd(
        "pairs: no clamp in the second block",
        "_grads",
        "tl.minimum(to_2 - log_2, 0.0)",
        "to_2 - log_2",
        tests=EXTREMES,
    ),
    ssd("pairs: a bracket of earlier tokens", "_grads", "tl.where(later, bracket, 0.0)", "bracket"),
    ssd(
        "pairs: a second bracket of earlier tokens", "_grads", "tl.where(later, bracket_2, 0.0)", "bracket_2"
    ),
    ssd(
        "pairs: a quarter of the bracket unwritten",
        "_grads",
        "tl.store(share + BM * Q, tl.zeros",
        "tl.store(share + BM * Q + BM, tl.zeros",
    ),
    ssd("pairs: no readers in the second block", "_grads", "(near + far, itself,", "(near, itself,"),
    ssd("pairs: no sources in the first block", "_grads", "near_2 * step_2 + far * step", "near_2 * step_2"),
    ssd("pairs: D sees other tokens", "_grads", "itself = tl.where(same, near, 0.0)", "itself = near"),
    ssd(
        "pairs: D sees other tokens of the second block",
        "_grads",
        "itself_2 = tl.where(same, near_2, 0.0)",
        "itself_2 = near_2",
    ),
    ssd(
        "pairs: decays of the first head",
        "_grads",
        "log, step, to = next_log, next_step, next_to",
        "step, to = next_step, next_to",
    ),
    ssd(
        "through states: 32-bit heads",
        "_grads",
        "head = c.to(tl.int64) * H + h",
        "head = c * H + h",
        1,
        WIDE_SSD,
    ),
    ssd(
        "through states: 32-bit shares",
        "_grads",
        "share = (c.to(tl.int64) * (H",
        "share = (c * (H",
        tests=WIDE_SSD,
    ),
    ssd("through states: no step", "_grads", "weight *= tl.load(steps + head * Q + t)", "weight *= 1.0"),
    ssd(
        "through states: other channels pass",
        "_grads",
        "tl.where(p[:, None] == p[None, :], cross, 0.0)",
        "cross",
    ),
    ssd(
        "through states: tokens past the end",
        "_grads",
        "mask=live & (p < P)[None, :]",
        "mask=(p < P)[None, :]",
    ),
    ssd(
        "through states: sources for readers",
        "_grads",
        "bracket = tl.trans(bracket)",
        "bracket = bracket",
    ),
    ssd(
        "through states: no pairs",
        "_grads",
        "acc = tl.dot(bracket, mate,",
        "acc = 0.0 * tl.dot(bracket, mate,",
    ),
    ssd("through states: its own partner", "_grads", "block_of(partner + first", "block_of(other + first"),
    ssd("through states: partners past the end", "_grads", "s_partner, n, t < size", "s_partner, n, t < Q"),
    ssd(
        "through states: the first run's pairs",
        "_grads",
        "dgram + share * Q * Q",
        "dgram + (share - run) * Q * Q",
    ),
    ssd("through states: the first run's share", "_grads", "out + (share * Q", "out + ((share - run) * Q"),
    ssd("through states: the first group's gradient", "_grads", "* N) + group * N", "* N) + 0 * N"),
    ssd(
        "through states: tokens past the end are written",
        "_grads",
        "mask=live & (n < N)[None, :]",
        "mask=(n < N)[None, :]",
    ),
    ssd(
        "gather: 32-bit shares",
        "_grads",
        "chunk = c.to(tl.int64) * groups",
        "chunk = c * groups",
        tests=WIDE_SSD,
    ),
    ssd("gather: one run of heads", "_grads", "for r in range(runs):", "for r in range(1):"),
    ssd(
        "gather: tokens past the end are written",
        "_grads",
        "mask=(t < size)[:, None] & (n < N)[None, :])",
        "mask=(n < N)[None, :])",
    ),
]

SSD_HOST = [
    ssd(
        "a stride of rows is not looked at",
        "",
        "(t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1))",
        "True",
    ),
    ssd(
        "chunk sizes that are no power of two",
        "",
        "1 << (asked.bit_length() - 1)",
        "asked",
        tests=f"{PROPERTIES} -k chunk_size",
    ),
    ssd(
        "the final state's gradient is dropped on the way",
        "",
        "d_final = d_final if ctx.want_final else None",
        "d_final = None",
    ),
    ssd("an x of fp16 in bf16", "", "self.dtype != torch.bfloat16", "self.dtype == torch.float32"),
    ssd("shares where a run is a whole group", "", "WHOLE=runs == 1", "WHOLE=False"),
    ssd("a share for the gradient", "", "WHOLE=runs == 1", "WHOLE=True"),
    ssd(
        "step: 32-bit rows",
        "_step",
        "tl.program_id(0).to(tl.int64) // H",
        "tl.program_id(0) // H",
        tests=WIDE_STEPS,
    ),
    ssd(
        "step: no decay",
        "_step",
        "other=0.0).to(tl.float32) * decay",
        "other=0.0).to(tl.float32)",
        tests=f"{PROPERTIES} -k steps",
    ),
    ssd(
        "step: no D",
        "_step",
        "out += tl.load(D + h)",
        "out += 0 * tl.load(D + h)",
        tests=f"{PROPERTIES} -k steps",
    ),
    ssd(
        "step: the wrong group",
        "_step",
        "b * s_B + (h // per_group) * N",
        "b * s_B",
        tests=f"{PROPERTIES} -k steps",
    ),
]

SSD = SSD_CHUNKS + SSD_STATES + SSD_OUTPUTS + SSD_GRADS + SSD_HOST

HOPPER_FAR = f"{PROPERTIES} -k past_two_to_the_31"

HOPPER = [
    hopper("32-bit offsets of x", "source + token * s", "source + token.to(gl.int32) * s", 1, HOPPER_FAR),
    hopper("32-bit offsets of y", "out + past * s", "out + past.to(gl.int32) * s", gpu=HOPPER_FAR),
    hopper(
        "32-bit offsets of states",
        "states + (here.to(gl.int64) * H + h)",
        "states + (here * H + h)",
        gpu=HOPPER_FAR,
    ),
    hopper("later tokens count", "row[:, None] >= column[None, :]", "row[:, None] >= 0 * column[None, :]"),
    hopper(
        "earlier tokens count back", "column[None, :] >= row[:, None]", "column[None, :] >= 0 * row[:, None]"
    ),
    hopper("the state does not decay", "S = S * gl.exp2(decay)[:, None]", "S = S * 1.0"),
    hopper("outputs read a state that does not decay", "acc * scale[:, None]", "acc * 1.0"),
    hopper(
        "the weight back is the way forth's", "if BACK:\n            weight", "if False:\n            weight"
    ),
    hopper("the way back has no step", "(late if BACK else logs) + at", "logs + at", 1),
    hopper("no D", "acc += skip * own", "acc += 0.0 * skip * own"),
    hopper("D of the first head", "gl.load(D + h)", "gl.load(D)"),
    hopper("keys of the first group", "keys += (h // per_group) * N", "keys += 0 * N"),
    hopper("a chunk's first block decays from the head before", "(q == 0) & has_before", "q == 0"),
    hopper("the block that keeps back", "(j % PER == PER - 1) | starts if BACK else j % PER", "j % PER"),
    hopper("a document's last chunk keeps nothing", "(j % PER == PER - 1) | starts", "j % PER == PER - 1"),
    hopper("the next document's tokens are read", "mask=(i < size)", "mask=(i < 64)"),
    hopper(
        "a state goes on into the next document",
        "(gl.int32, bitcast=True) & stays",
        "(gl.int32, bitcast=True)",
    ),
    hopper(
        "initial states of the document before",
        "initial + (d.to(",
        "initial + (this.to(",
        1,
    ),
    hopper("final states of the next document", "final + (this.to(", "final + (d.to("),
    hopper("pieces of no tokens", "* W < after", "* W <= after"),
    hopper("what enters is not read", "S = gl.load(enter +", "S = 0.0 * gl.load(enter +"),
    hopper("only the last block's decay leaves", "total += decay", "total = decay"),
    hopper(
        "something enters each document",
        "gl.where(entered, gl.exp2(total), 0.0)",
        "gl.exp2(total)",
    ),
    hopper("what entered does not decay", "decay * carried", "carried"),
    hopper(
        "what entered does not leave",
        "left + tl.where(decay > 0",
        "left + tl.where(decay > 2",
    ),
    hopper("any address", "aligned(t) and t.stride(1) % 8 == 0", "t.stride(1) % 8 == 0"),
    hopper("any stride", "aligned(t) and t.stride(1) % 8 == 0", "aligned(t)"),
]

SELECTIVE = [
    Mutation(
        "selective: 32-bit windows",
        f"{KERNELS}/selective_scan/triton_forward.py",
        "at = w.to(tl.int64) * W",
        "at = w * W",
        (OFFSETS,),
        0,
    ),
    selective(
        "pieces from the row's start",
        "forward",
        "tl.minimum(first + (at - first + W - 1) // W * W, after)",
        "tl.minimum(at, after)",
    ),
    selective(
        "the last token's neighbours count",
        "forward",
        "tl.where(live, step, 0.0)",
        "tl.where(True, step, 0.0)",
    ),
    selective("steps are not clamped", "forward", "tl.maximum(step, low), high)", "step, high)"),
    selective("clamped steps have gradients", "forward", "live & (step >= low) & (step <= high)", "live"),
    selective(
        "one group late", "forward", "xs, raws, gates = next_xs, next_raws,", "raws, gates = next_raws,"
    ),
    selective(
        "documents begin with what enters windows",
        "forward",
        "e, n, E, N, pitch, at != first)",
        "e, n, E, N, pitch, True)",
    ),
    selective(
        "continued pieces begin with initial states",
        "forward",
        "h = kept(initial, d, e, n, E, N, pitch, at == first)",
        "h = kept(initial, d, e, n, E, N, pitch, True)",
    ),
    selective("final states of pieces", "forward", "h, at + size == after)", "h, at == first)"),
    selective(
        "what passes through does not decay",
        "forward",
        "h * tl.exp2(rates * (total * LOG2E)[None, :])",
        "h",
    ),
    selective("nothing passes through", "forward", "through = enters &", "through = (w < 0) & enters &"),
    selective("no skip", "forward", "0) + skip * x", "0)"),
    selective("back: the state after instead of before", "backward", "h = before[SPAN - 1 - j]", "h = h"),
    selective("back: gradients do not decay", "backward", "g *= decays[SPAN - 1 - j]", "g *= 1.0"),
    selective(
        "back: later pieces are not heard",
        "backward",
        "e, n, E, N, pitch, end != after)",
        "e, n, E, N, pitch, end == 0)",
    ),
    selective(
        "back: final gradients in every piece",
        "backward",
        "g = kept(d_final, d, e, n, E, N, pitch, end == after)",
        "g = kept(d_final, d, e, n, E, N, pitch, True)",
    ),
    selective(
        "back: initial gradients of every piece", "backward", "pitch, g, start == first)", "pitch, g, True)"
    ),
    selective(
        "back: blocks begin with the piece's state",
        "backward",
        "e, n, E, N, pitch, base > 0)",
        "e, n, E, N, pitch, base < 0)",
    ),
    selective(
        "back: dead tokens have shares",
        "backward",
        "of_B, mask=(n < N) & (at < size)",
        "of_B, mask=(n < N) & (at < size + 1)",
    ),
    selective(
        "back: the bias of dead tokens",
        "backward",
        "t + i < size, shift, low",
        "t + i < size + 1, shift, low",
    ),
    selective("shares of one block are left out", "backward", "in range(blocks)", "in range(blocks - 1)"),
]

N16 = [
    n16("the last token's neighbours count", "", "live = (t + q < size) & (e < E)", "live = e < E"),
    n16(
        "pieces end late",
        "",
        "mask=(t + i < size)[:, None] & (col",
        "mask=(t + i < size + 1)[:, None] & (col",
    ),
    n16("B and C of the next document", "", "mask=(t + i < size)[:, None] & (n >= 0)", "mask=(n >= 0)"),
    n16("tokens in pairs change places", "", "gl.join(parts[0], parts[2])", "gl.join(parts[2], parts[0])"),
    n16("no copy of channels that are not there", "", "(column + e < columns)", "(e < columns)"),
    n16("a state early", "", "(begin > 0) & (begin % EVERY == 0)", "(begin > 0) & (begin % EVERY == 16)"),
    n16("what entered is left out", "", "inside & (at != first), E, N)", "inside & (at < 0), E, N)"),
    n16(
        "final states of pieces",
        "",
        "h, mask=inside & (at + size == after))",
        "h, mask=inside & (at == first))",
    ),
    n16("states beyond N", "", "(n < N) & (block * BE + e < E)", "block * BE + e < E"),
    n16(
        "ends: nothing of the documents' states",
        "_ends",
        "inside & (at == first), E, N)",
        "inside & (at < 0), E, N)",
    ),
    n16("ends: steps of one token", "_ends", "total += step", "total = step"),
    n16("starts: dead tokens", "_ends", "live = (t + q < size) & (e < E)", "live = e < E"),
    n16("starts: final gradients in every piece", "_ends", "(begin + size == after), E", "(begin > 0), E"),
    n16("starts: no gate", "_ends", "pull *= gate * sigmoid(gate)", "pull *= 1.0"),
    n16("back: the state after instead of before", "_backward", "h = before[2 * i + j]", "h = h"),
    n16("back: gradients do not decay", "_backward", "g *= gl.exp2(rates * both_steps[j])", "g *= 1.0"),
    n16(
        "back: later pieces are not heard",
        "_backward",
        "inside & (end != after), E, N)",
        "inside & (end == 0), E, N)",
    ),
    n16(
        "back: final gradients in every piece", "_backward", "inside & (end == after), E, N)", "inside, E, N)"
    ),
    n16(
        "back: initial gradients of every piece",
        "_backward",
        "mask=inside & (at == first))",
        "mask=inside)",
    ),
    n16("back: a turn begins with the window", "_backward", "end = gl.load(ends + chain)", "end = end"),
    n16(
        "back: a turn begins with no gradient",
        "_backward",
        "g, all_A = gl.load(room + own),",
        "g, all_A = g,",
    ),
    n16("back: a turn forgets D", "_backward", "gl.store(room + 32 * BE + tile_of(q), sum_D)", "pass"),
    n16("back: a turn's piece begins anew", "_backward", "if end == last_of:", "if end > begin:"),
    n16(
        "back: turns of 32 bits", "_backward", "room = carry + chain.to(gl.int64)", "room = carry + chain * 0"
    ),
    n16(
        "back: states of A out of order",
        "",
        "lanes.permute(2, 4, 0, 3, 1)",
        "lanes.permute(2, 4, 0, 1, 3)",
    ),
    n16(
        "back: blocks begin with nothing",
        "_backward",
        "mask=(own >= 0) & (base > 0)",
        "mask=(own >= 0) & (base < 0)",
    ),
    n16(
        "back: shares of dead tokens",
        "_backward",
        "mask=column // 32 < rest - t",
        "mask=column // 32 < rest - t + 1",
    ),
    n16("back: the unit of A", "_backward", "all_A * (1.0 / LOG2E)", "all_A"),
    n16("back: one state late", "_backward", "gl.maximum(s - 1, 0)", "gl.maximum(s, 0)"),
]
"""Of selective_scan/triton_n16*.py."""

KNOWN = "(label >= 0) & (label < vocab)"
SCALED = "other=0.0) * scale"
HEAD = [
    head("32-bit rows", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    head("what is beyond the vocabulary counts", 'tl.where(at < vocab, logit, float("-inf"))', "logit"),
    head("no scale of the label's logit", SCALED, "other=0.0)"),
    head("no scale in the first sweep", SCALED, "other=0.0)", 1),
    head("no scale in the second sweep", SCALED, "other=0.0)", 2),
    head("ignored labels are unknown", "live = label != ignored", "live = label == label"),
    head("ignored rows have a loss", "tl.where(live, top - own + tl.log(total), 0.0)", "top - own"),
    head("ignored rows have gradients", "tl.where(live, tl.where(at", "tl.where(row >= 0, tl.where(at"),
    head("labels below the vocabulary are looked up", KNOWN, "label < vocab"),
    head("labels beyond the vocabulary are looked up", KNOWN, "label >= 0"),
    head("unknown labels pass for ignored ones", 'float("nan")', "1.0"),
    head("the wrong half of a label", "tl.where(live & known, label, -1)", "label"),
    head("sums of blocks are of different maxima", "sums * tl.exp2((tops - higher) * LOG2E)", "sums"),
    head("sums of lanes are of different maxima", "sums * tl.exp2((tops - top) * LOG2E)", "sums"),
    head("no maximum", "higher = tl.maximum(tops, tl.max(logit, 1))", "higher = tl.maximum(tops, 0.0)"),
    head("the last block's maximum", "tl.maximum(tops, tl.max(logit, 1))", "tl.max(logit, 1)"),
    head("no onehot", "share - 1.0", "share"),
    head("shares do not add up to one", "* LOG2E) * inverse", "* LOG2E)"),
    head("a row of whole blocks from its end on", "(pitch - 1) // BLOCK", "pitch // BLOCK"),
    head("writes beyond the row", "mask=at < pitch)", "mask=at >= 0)"),
    head("gradients of the first chunk's rows", "self._p[:rows, :vocab]", "self._p[:, :vocab]"),
]

MUTATIONS = CONV + NORM + HEAD + SSD + HOPPER + SELECTIVE + N16


def mutated(source: str, mutation: Mutation) -> str | None:
    """The file with the mutation, or None where its text is gone."""
    parts = source.split(mutation.old)
    if len(parts) <= mutation.occurrence + 1:
        return None
    at = mutation.occurrence + 1
    return mutation.old.join(parts[:at]) + mutation.new + mutation.old.join(parts[at:])


def pytest(suite: tuple[tuple[str, ...], bool], tree: Path) -> subprocess.CompletedProcess[str]:
    """Run tests, on a GPU or interpreted, in a tree, to the first failure."""
    tests, gpu = suite
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["TRITON_INTERPRET"] = "0" if gpu else "1"
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=900)


def verdict(mutation: Mutation, tree: Path) -> tuple[str, str]:
    """("killed", by what), ("SURVIVED", "") or ("GONE", why) for a mutation tried in a tree of its own."""
    path = tree / mutation.file
    source = path.read_text()
    broken = mutated(source, mutation)
    if broken is None:
        return "GONE", f"the text is not in {mutation.file}"
    path.write_text(broken)
    try:
        done = pytest((mutation.tests, mutation.gpu), tree)
    finally:
        path.write_text(source)
    if done.returncode == 0:
        return "SURVIVED", ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return "killed", failed[1].split("/")[-1] if failed else f"exit code {done.returncode}"


def trees(folder: Path, count: int) -> list[Path]:
    """Copies of what the tests need."""
    made = []
    for number in range(count):
        tree = folder / str(number)
        for name in ("src", "tests", "configs"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        made.append(tree)
    return made


def has_hopper() -> bool:
    """Whether the device is what triton_hopper.py is for."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def main() -> int:
    """Parse the command line, mutate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutations whose name has this in it")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time (default 2)")
    parser.add_argument("--list", action="store_true", help="print the mutations, try none")
    options = parser.parse_args()
    found = [mutation for mutation in MUTATIONS if options.only in mutation.name]
    if options.list:
        print(*(f"{mutation.name}: {' '.join(mutation.tests)}" for mutation in found), sep="\n")
        return 0
    chosen = [mutation for mutation in found if not mutation.gpu or has_hopper()]
    if len(chosen) < len(found):
        print(f"{len(found) - len(chosen)} mutations need a Hopper GPU and are left out")
    bad = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        free = trees(Path(folder), options.jobs)

        def borrowed(work: Callable[[Any, Path], Any], subject: Any) -> Any:
            tree = free.pop()  # as many trees as threads
            try:
                return work(subject, tree)
            finally:
                free.append(tree)

        suites = sorted({(mutation.tests, mutation.gpu) for mutation in chosen})
        for (tests, _), done in zip(suites, pool.map(partial(borrowed, pytest), suites), strict=True):
            if done.returncode:
                sys.exit(
                    f"{' '.join(tests)} must pass before anything is mutated:\n{done.stdout}{done.stderr}"
                )
        attempt = partial(borrowed, verdict)
        for mutation, (fate, remark) in zip(chosen, pool.map(attempt, chosen), strict=True):
            bad += fate != "killed"
            print(f"{fate:8s} {mutation.name}: {remark}", flush=True)
    print(f"{len(chosen)} mutations, {len(chosen) - bad} killed")
    return 1 if bad or not found else 0


if __name__ == "__main__":
    sys.exit(main())
