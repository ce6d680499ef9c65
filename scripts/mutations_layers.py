"""Mutations of what stands around the scans: convolution, norm, head, gradients and memory."""

from __future__ import annotations

from mutation import KERNELS, LAYERS, OFFSETS, Mutation

WIDE_CONV, WIDE_NORM = (f"{OFFSETS} -k {op}" for op in ("conv1d", "norm"))
WIDE_STEPS = f"{OFFSETS} -k steps"
FORGET = "tests/layers/test_layers_forget.py"
IN_PLACE = "tests/layers/test_layers_parts.py"


def conv(name: str, old: str, new: str, occurrence: int = 0, tests: str = "") -> Mutation:
    """A mutation of the convolution."""
    file, found = f"{KERNELS}/causal_conv1d/triton.py", tests or "tests/kernels/triton/test_triton_conv.py"
    return Mutation(f"conv: {name}", file, old, new, tuple(found.split()), occurrence)


def norm(name: str, old: str, new: str, occurrence: int = 0, tests: str = "") -> Mutation:
    """A mutation of the gated norm."""
    file = f"{KERNELS}/gated_norm/triton.py"
    found = tests or "tests/kernels/triton/test_triton_gated_norm.py"
    return Mutation(f"norm: {name}", file, old, new, tuple(found.split()), occurrence)


def projected(name: str, old: str, new: str) -> Mutation:
    """A mutation of the gated norm with the product behind it."""
    tests = ("tests/kernels/triton/test_triton_gated_norm.py", "-k", "product_behind")
    return Mutation(f"norm: {name}", f"{KERNELS}/gated_norm/projected.py", old, new, tests)


def head(name: str, old: str, new: str, occurrence: int = 0) -> Mutation:
    """A mutation of the linear cross-entropy."""
    file = f"{KERNELS}/linear_cross_entropy/triton.py"
    found = "tests/kernels/triton/test_triton_linear_cross_entropy.py"
    return Mutation(f"head: {name}", file, old, new, (found,), occurrence)


def ssd(name: str, old: str, new: str, occurrence: int = 0) -> Mutation:
    """A mutation of where the scan's gradients are written."""
    file = f"{KERNELS}/ssd/triton_grads.py"
    return Mutation(f"ssd in place: {name}", file, old, new, (IN_PLACE,), occurrence)


def parts(name: str, old: str, new: str) -> Mutation:
    """A mutation of parts.py."""
    return Mutation(f"parts: {name}", f"{KERNELS}/parts.py", old, new, (IN_PLACE,))


def forget(name: str, old: str, new: str) -> Mutation:
    """A mutation of layers/forget.py."""
    return Mutation(
        f"forget: {name}", f"{LAYERS}/forget.py", old, new, ("tests/layers/test_layers_forget.py",)
    )


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
    conv("32-bit offsets of dx", "dx_step.to(tl.int64) * ALIGN", "dx_step * ALIGN", tests=WIDE_CONV),
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
    norm("the stream's gradient is dropped", "scales, d_stream, branch if", "scales, None, branch if"),
    norm("the kernel drops the stream's gradient", "inner_grad += more", "inner_grad += 0.0 * more"),
    norm("the stream's gradient is scaled too", "inner_grad += more", "inner_grad += more * scale"),
    norm("the stream's gradient by x's strides", "row * add_stride * UNIT", "row * x_stride * UNIT"),
    norm(
        "no gradient of a stream that nothing else reads",
        "dx, d_branch, d_weight = d_stream, None, None",
        "dx, d_branch, d_weight = None, None, None",
    ),
    norm("branches are not scaled", "+ factor * branch", "+ branch"),
    norm("the norm of a sum that is not rounded", ".to(total.dtype.element_ty).to(tl.float32)", ""),
    norm("a branch's gradient is not scaled", "inner_grad * factor", "inner_grad"),
    norm("nor where only the stream is read", "(dx * ctx.factor).to(branch)", "dx.to(branch)"),
    norm("a scaled branch has the stream's gradient", " or ctx.factor != 1.0", ""),
    norm(
        "made again without its gate",
        'if GATE == "first":\n                    inner',
        "if False:\n                    inner",
    ),
    norm("made again in one row", "again + out + at", "again + channel + at"),
    projected("the projection's gradient from x", "outer(rows, y.flatten", "outer(rows, x.flatten"),
    projected("the bias's gradient is rounded", "dtype=torch.float32", "dtype=rows.dtype"),
]


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
    head("the first block stands for all that stay", "held[piece]", "held[0]"),
    head("what stays is counted twice", "tl.range(HELD * BLOCK, reach", "tl.range(0, reach"),
    head("the end of a row is not written", "last + HELD * BLOCK - base", "last - base"),
    head("gradients of the first chunk's rows", "self._p[:rows, :vocab]", "self._p[:, :vocab]"),
]


PARTS = [
    conv("the gradient's pitch is the input's", "token * sinks[2] + c", "token * C + c", tests=IN_PLACE),
    conv("rows of the gradient's room", "dx + row * L * step", "dx + row * L * C", tests=IN_PLACE),
    norm(
        "the gate's gradient lies close",
        "gates = row * dz_stride * UNIT + channel",
        "gates = out",
        tests=IN_PLACE,
    ),
    ssd("x's gradient lies close", "i[:, None] * s_dx", "i[:, None] * (H * P)"),
    ssd("gradients of B and C lie close", "* s_out", "* (H // per_group * N)", 0),
    ssd("added from shares, they lie close", "* s_out", "* (groups * N)", 1),
    parts("a second pass writes over the first", "or index in self.taken", "or False"),
    parts("gradients elsewhere are not fetched", "grad.data_ptr() != room.data_ptr() or", "False and"),
    parts("gradients in place are copied", "grad.data_ptr() != room.data_ptr() or", "True or"),
    parts("what nothing reads has any gradient", "room.zero_()", "pass"),
    forget("addresses are used again", "result.dtype, reference, autocast", "result.dtype, None, autocast"),
    forget("each reader computes", "if value is None:", "if True:"),
    forget("kept to the end of the graph", "if self.served == self.readers:", "if False:"),
    forget("the whole for a part", "kept.stride, value.storage_offset() + kept.offset", "kept.stride, 0"),
    forget(
        "computed without autocast",
        "torch.autocast(device, dtype, enabled)",
        "torch.autocast(device, dtype, False)",
    ),
    forget("parts of something are forgotten", "if storage.nbytes() != result.nbytes:", "if False:"),
]
