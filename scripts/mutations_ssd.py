"""Mutations of the SSD of Mamba-2."""

from __future__ import annotations

from mutation import KERNELS, OFFSETS, Mutation

WIDE_SSD = f"{OFFSETS} -k ssd"
WIDE_STEPS = f"{OFFSETS} -k steps"


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


PROPERTIES = "tests/kernels/triton/test_triton_ssd_properties.py"
EXTREMES, STILL, FAR = (f"{PROPERTIES} -k {test}" for test in ("extremes", "step_of_zero", "far_apart"))
MASKED = "gram = tl.where(past, product(read, tl.trans(keys), PRECISION), 0.0)"
MASKED_BACK = "gram = tl.where(later, product(keys, tl.trans(read), PRECISION), 0.0)"

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
    ssd(
        "documents past the last have any size",
        "_chunks",
        "range(after, n_docs + 1, BLOCK)",
        "range(n_docs, n_docs + 1, BLOCK)",
        tests=f"{PROPERTIES} -k room",
    ),
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
        "through states in fp32: no step",
        "_grads",
        "found *= tl.load(steps + head * Q + t)[:, None]",
        "found *= 1.0",
    ),
    ssd(
        "through states in fp32: no decay",
        "_grads",
        "summed_apart(g * weight[:, None], of",
        "summed_apart(g, of",
    ),
    ssd(
        "through states in fp32: the first channels alone",
        "_grads",
        "tl.static_range(0, BP, SLICE)",
        "tl.static_range(0, SLICE, SLICE)",
    ),
    ssd(
        "through states in fp32: tokens past the end",
        "_grads",
        "mask=live & (k < P)[None, :]",
        "mask=(k < P)[None, :]",
    ),
    ssd("through states in fp32: nothing passes", "_grads", "tl.sum(entered * state)", "0.0 * tl.sum(state)"),
    ssd(
        "sums of parts: the even half twice",
        "_outputs",
        "product(more_a, tl.trans(more_b), PRECISION)",
        "product(a, tl.trans(b), PRECISION)",
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
    ssd("through states: the first group's gradient", "_grads", "s_out + group * N", "s_out + 0 * N"),
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
    hopper(
        "the last document is the last that there is room for",
        "d = gl.load(doc_ids + (tokens - 1)).to(gl.int32) + 1",
        "d = gl.to_tensor(n_docs)",
    ),
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
