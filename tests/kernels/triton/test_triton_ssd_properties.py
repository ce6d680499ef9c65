"""What must hold of the Triton SSD whatever its numbers, at the ends of the number range, and as an op."""

from __future__ import annotations

import math
from functools import partial
from mmap import mmap

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter

from kernels.cases import assert_all_close, cut_rows, distance
from kernels.triton.shim import poisoned
from kernels.triton.ssd_cases import (
    ALL,
    PER_TOKEN,
    Results,
    apart,
    assert_equal,
    call,
    check,
    documents,
    doubled,
    draw,
    part,
    pulled,
    rounded,
    use,
)
from kernels.triton.ssd_cases import quick_reduce as quick_reduce
from ssmtrain.kernels import tuned
from ssmtrain.kernels.ssd import reference, triton_chunks, triton_step
from ssmtrain.kernels.ssd import triton as ours

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # a GPU says nothing about log2(0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CUDA = torch.device("cuda")
REAL = {"batch": 2, "heads": 16, "groups": 2, "P": 64, "N": 128}


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that a kernel forgets to write shows."""
    poisoned(monkeypatch, ours, triton_chunks, triton_step)


@pytest.mark.parametrize("blocks", [1, 2])
def test_packed_documents_have_the_bits_of_documents_alone(
    blocks: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, blocks)
    doc_ids, n_docs = documents([1, 33])
    inputs = rounded(draw(34, n_docs), device)
    packed = pulled(call(ours, doc_ids, n_docs, chunk_size=32), inputs)
    assert_equal(packed, pulled(apart(doc_ids, chunk_size=32), inputs), "A", "D", "dt_bias")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("length", [300, 2600])
def test_packed_documents_have_the_bits_of_documents_alone_on_a_gpu(length: int, dtype: torch.dtype) -> None:
    """Of B and C too as long as the same number of heads are added in a run, which depends on the sizes."""
    doc_ids, n_docs = cut_rows(2, length)
    inputs = rounded(draw(length, n_docs, **REAL), CUDA, dtype)
    packed, alone = (pulled(run, inputs, dtype) for run in (call(ours, doc_ids, n_docs), apart(doc_ids)))
    if length > 1000:
        for results in (packed, alone):
            B, C = results.pop("grad B"), results.pop("grad C")
            assert B.isfinite().all() and C.isfinite().all()
    assert_equal(packed, alone, "A", "D", "dt_bias")


@pytest.mark.parametrize("more", [1, 40])
def test_room_for_more_documents_changes_no_bit(more: int, device: torch.device) -> None:
    doc_ids, n_docs = documents([1, 33], [20, 14])
    inputs = rounded(draw(34, n_docs, ("D", "dt_bias"), batch=2), device)
    exact, roomy = (
        pulled(call(ours, doc_ids, n, final=False, chunk_size=16), inputs) for n in (n_docs, n_docs + more)
    )
    assert_equal(roomy, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("length", [300, 9000])
def test_room_for_more_documents_on_a_gpu(length: int, dtype: torch.dtype) -> None:
    """The gradients of B and C are sums whose order depends on the room."""
    doc_ids, n_docs = cut_rows(2, length)
    inputs = rounded(draw(length, n_docs, ("D", "dt_bias"), **REAL), CUDA, dtype)
    exact, roomy = (pulled(call(ours, doc_ids, n, final=False), inputs, dtype) for n in (n_docs, n_docs + 70))
    summed = [("grad B", 4e-3), ("grad C", 4e-3), ("grad dt", 4e-3), ("grad A", 1e-4), ("grad dt_bias", 1e-4)]
    for name, near in summed:
        assert distance(roomy.pop(name).float(), exact.pop(name).float()) < near
    assert_equal(roomy, exact)


def split(at: int, chunk: int | None):
    """The op on the tokens before and after a cut, with the state carried."""
    run = call(ours, n_docs=1, chunk_size=chunk)

    def halves(initial_state: Tensor | None = None, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = {} if initial_state is None else {"initial_state": initial_state}
        first, state = run(**part(tensors, slice(None), slice(0, at)), **given)
        second, state = run(**part(tensors, slice(None), slice(at, None)), initial_state=state)
        return torch.cat([first, second], 1), state

    return halves


@pytest.mark.parametrize("at", [1, 16, 32])
def test_split_and_carry_equals_the_whole(at: int, device: torch.device) -> None:
    """To the bit where chunks end."""
    inputs = rounded(draw(41), device)
    whole = pulled(call(ours, chunk_size=16), inputs)
    halves = pulled(split(at, 16), inputs)
    if at > 1:
        assert_equal(halves, whole, "A", "D", "dt_bias")
    else:
        assert_all_close(halves, whole, 5e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_chunk_size_changes_nothing(packed: bool, device: torch.device) -> None:
    doc_ids, n_docs = documents([5, 31]) if packed else (None, 1)
    inputs = rounded(draw(36, n_docs), device)
    truth = pulled(call(ours, doc_ids, n_docs), inputs)
    for chunk in (16, 37):
        assert_all_close(pulled(call(ours, doc_ids, n_docs, chunk_size=chunk), inputs), truth, 5e-5)
    shape = ours.shape_of(inputs["x"], inputs["B"])
    lengths = [ours.chunk_length(shape, asked, device) for asked in (1, 16, 31, 32, 37, 1000)]
    assert lengths == [16, 16, 16, 32, 32, 64]


@pytest.mark.parametrize("blocks,t", [(1, 20), (2, 13), (2, 20), (2, 34)])
def test_no_output_depends_on_what_comes_later_or_on_other_documents(
    blocks: int, t: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly: not one bit of a gradient."""
    use(monkeypatch, blocks)
    doc_ids, n_docs = documents([4, 44])
    inputs = rounded(draw(48, n_docs), device)
    grads = pulled(lambda **leaves: (call(ours, doc_ids, n_docs, chunk_size=32)(**leaves)[0][:, t],), inputs)
    for name in PER_TOKEN:
        grad = grads[f"grad {name}"]
        assert not grad[:, t + 1 :].any() and not grad[:, :4].any(), name
        own = grad[:, t] if name == "C" else grad[:, 4 : t + 1]
        assert own.any(), name
    states = grads["grad initial_state"]
    assert states[1].any() and not states[0].any()


def test_linear_in_x_and_the_initial_state(device: torch.device) -> None:
    one, other = rounded(draw(21), device), rounded(draw(21, seed=1), device)
    mixed = {k: 2 * one[k] - 3 * other[k] for k in ("x", "initial_state")}
    run = call(ours, chunk_size=16)
    found = run(**one | mixed)
    theirs = run(**one | {k: other[k] for k in mixed})
    for mine, first, second in zip(found, run(**one), theirs, strict=True):
        torch.testing.assert_close(mine, 2 * first - 3 * second, rtol=1e-4, atol=1e-4)


def test_rows_and_heads_may_be_permuted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 2, heads=2)
    inputs = rounded(draw(19, 2, batch=2, heads=4), device)
    rows, heads = torch.tensor([1, 0], device=device), torch.tensor([2, 0, 3, 1], device=device)
    per_head = {"x": 2, "dt": 2, "A": 0, "D": 0, "dt_bias": 0, "initial_state": 1, "B": None, "C": None}

    def move(name: str, t: Tensor) -> Tensor:
        axis = per_head[name]
        t = t if axis is None else t.index_select(axis, heads)
        return t[rows] if t.dim() > 1 else t

    run = call(ours, n_docs=2, chunk_size=32)
    truth = dict(zip(("output 0", "output 1"), run(**inputs), strict=True))
    moved = {name: move(name, t) for name, t in inputs.items()}
    expected = {
        "output 0": move("x", truth["output 0"]),
        "output 1": move("initial_state", truth["output 1"]),
    }
    y, final = run(**moved)
    assert torch.equal(y, expected["output 0"]) and torch.equal(final, expected["output 1"])


def test_a_step_of_zero_changes_nothing_and_no_input_gives_nothing(device: torch.device) -> None:
    inputs = rounded(draw(35, optional=("initial_state",), N=20), device)
    still = inputs | {"dt": torch.zeros_like(inputs["dt"])}
    found = pulled(call(ours, chunk_size=16, dt_softplus=False), still)
    assert torch.equal(found["output 1"], inputs["initial_state"])
    seen = torch.einsum("bhpn,blgn->blhp", inputs["initial_state"], inputs["C"])
    torch.testing.assert_close(found["output 0"], seen, rtol=1e-5, atol=1e-5)
    assert not found["grad x"].any() and all(t.isfinite().all() for t in found.values())
    silent = {k: torch.zeros_like(t) if k in ("x", "initial_state") else t for k, t in inputs.items()}
    assert not any(out.any() for out in call(ours, chunk_size=16)(**silent))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_steps_equal_the_scan(dtype: torch.dtype, device: torch.device) -> None:
    inputs = rounded(draw(5, 2, (*ALL, "z"), batch=2, heads=4, groups=2, P=20, N=24), device, dtype)
    limits = {"dt_limit": (0.2, 1.5)}
    truth, final = call(reference, n_docs=2, **limits)(**inputs)
    state = inputs["initial_state"].clone()
    for t in range(5):
        token = {k: inputs[k][:, t] for k in (*PER_TOKEN, "z")}
        fixed = {k: inputs[k] for k in ("A", "D", "dt_bias")}
        y = ours.ssd_step(state, **token, **fixed, dt_softplus=True, **limits)
        assert y.dtype == dtype
        assert distance(y, truth[:, t]) < (1e-6 if dtype == FP32 else 5e-3)
    assert distance(state, final) < 1e-6


def test_the_same_bits_in_any_order(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run again, and interpreted with each launch's programs in reverse: none waits for another."""
    use(monkeypatch, 2, heads=1, walk={"BN": 16}, through_states={"BN": 16})
    doc_ids, n_docs = documents([1, 18])
    inputs = rounded(draw(19, n_docs, N=32), device)
    run = partial(pulled, call(ours, doc_ids, n_docs, chunk_size=32), inputs)
    forth = run()
    assert_equal(run(), forth)
    if tuned.interpreting():
        builder = interpreter.interpreter_builder
        upstream = builder.set_grid_idx

        def turned(x: int, y: int, z: int) -> None:
            upstream(builder.grid_dim[0] - 1 - x, builder.grid_dim[1] - 1 - y, z)

        monkeypatch.setattr(builder, "set_grid_idx", turned, raising=False)
        assert_equal(run(), forth)


def extremes() -> dict[str, tuple[Results, dict]]:
    """Inputs at the ends of the range; A runs from -1e-4 to -1e3 over the heads."""
    generator = torch.Generator().manual_seed(3)
    heads = 4
    base = draw(40, heads=heads) | {"A": -torch.logspace(-4, 3, heads).double()}
    raw = {k: t for k, t in base.items() if k != "dt_bias"}

    def steps(low: float, high: float) -> Tensor:
        uniform = torch.rand(base["dt"].shape, generator=generator, dtype=torch.float64)
        return torch.exp(uniform * (math.log(high) - math.log(low)) + math.log(low))

    ones = {name: torch.ones_like(raw[name]) for name in PER_TOKEN}
    infinite = raw["dt"].clone()
    infinite[:, ::3] = math.inf
    plain, limited = {"dt_softplus": False}, {"dt_limit": (1e-4, 2.0)}
    return {
        "tiny steps": (raw | {"dt": steps(1e-8, 1e-6)}, plain),
        "huge steps": (raw | {"dt": steps(1.0, 50.0)}, plain),
        "mixed steps": (raw | {"dt": steps(1e-8, 50.0)}, plain),
        "huge x": (base | {"x": base["x"] * 1e4}, {}),
        "all equal": (raw | ones, plain),
        "all equal, huge steps": (raw | ones | {"dt": 50 * ones["dt"]}, plain),
        "softplus far out": (raw | {"dt": torch.where(base["dt"] > -0.5, 80.0, -80.0).double()}, {}),
        "infinite, limited": (raw | {"dt": infinite}, limited),
    }


@pytest.mark.parametrize("name", list(extremes()))
def test_extremes_stay_finite_and_near_float64(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, 2, heads=4)
    inputs, options = extremes()[name]
    # Pairs of later tokens cancel in a log decay's gradient but for rounding: A, -1000, times steps of 80 of
    # it are left where tokens in between do not decay at all.
    of_steps = 2e-3 if name == "softplus far out" else 2e-5
    check(inputs, None, 1, device, 1e-5, of_steps=of_steps, chunk_size=32, **options)


def test_states_beyond_fp16(device: torch.device) -> None:
    """A state of 10^6 is read with a C of 10^-3: outputs and gradients fit, the state would not."""
    inputs = draw(70, optional=("initial_state",))
    shrunk = {"A": torch.full((2,), -1e-4), "dt": torch.ones_like(inputs["dt"]), "C": 1e-3 * inputs["C"]}
    grown = {"x": 1000 + inputs["x"], "B": 20 + inputs["B"]}
    low = rounded(inputs | shrunk | grown, device, FP16)
    options = {"dt_softplus": False}
    run = partial(pulled, dtype=FP16, scale=1e-3)
    found = run(call(ours, **options), low)
    truth = run(call(reference, **options), doubled(low))
    assert found["output 1"].max() > 1e6 and truth["output 0"].abs().max() < 6e4
    assert all(t.isfinite().all() for t in found.values())
    assert_all_close(found, truth, 1e-3)


@pytest.mark.skipif(not tuned.interpreting(), reason="needs memory that nothing touches")
def test_tokens_far_apart(device: torch.device) -> None:
    """A row's last tokens lie past 2^31 elements from its first: in a parent 2^24 wide, mostly untouched."""
    length, width = 192, 1 << 24
    try:
        memory = mmap(-1, 2 * length * width)
    except OSError:
        pytest.skip("the system grants no 6 GiB of memory, used or not")
    inputs = rounded(draw(length, optional=()), device, BF16)
    parent = torch.frombuffer(memory, dtype=BF16).view(1, length, width)
    far, at = dict(inputs), 0
    for name in PER_TOKEN:
        size = inputs[name][0, 0].numel()
        far[name] = parent[..., at : at + size].view(inputs[name].shape).copy_(inputs[name])
        at += size
    near = pulled(call(ours, chunk_size=64), inputs, BF16)
    assert_equal(pulled(call(ours, chunk_size=64), far, BF16), near)


def test_the_ops_are_what_they_say(device: torch.device) -> None:
    """Schemas, fakes and gradients, with and without what is optional."""
    doc_ids, n_docs = documents([2])
    inputs = rounded(draw(2, n_docs), device)
    x, dt, A, B, C, D, bias, initial = (t.requires_grad_() for t in inputs.values())
    rest = (doc_ids.to(device), n_docs, 16, True, 0.0, math.inf)
    torch.library.opcheck(torch.ops.ssmtrain.ssd.default, (x, dt, A, B, C, D, bias, initial, *rest, True))
    schemas = ("test_schema", "test_faketensor")
    check_schema = partial(torch.library.opcheck, test_utils=schemas)
    low = [t.detach().to(BF16) for t in (x, dt, B, C)]
    bare = (low[0], low[1], A.detach(), low[2], low[3], None, None, None, None, 1, 0, False, 0.0, 1.0)
    check_schema(torch.ops.ssmtrain.ssd.default, (*bare, False))
    check_schema(torch.ops.ssmtrain.ssd_back.default, (low[0], None, *bare))
    full = [t.detach() for t in (x, dt, A, B, C, D, bias, initial)]
    d_y, d_final = torch.ones_like(full[0]), torch.ones_like(full[-1])
    check_schema(torch.ops.ssmtrain.ssd_back.default, (d_y, d_final, *full, *rest))
    state, token = torch.zeros_like(full[-1])[:1], [full[0][:, 0], full[1][:, 0], A.detach()]
    step = (state, *token, full[3][:, 0], full[4][:, 0], None, None, True, 0.0, math.inf)
    check_schema(torch.ops.ssmtrain.ssd_step.default, step)


def test_compiles_whole_and_recomputes(device: torch.device) -> None:
    doc_ids, n_docs = documents([1, 2])
    doc_ids = doc_ids.to(device)
    inputs = rounded(draw(3, n_docs, ("D", "initial_state", "z")), device)
    inputs["x"] = torch.cat([inputs["x"]] * 2, -2)

    def run(x: Tensor, **rest: Tensor) -> tuple[Tensor, ...]:
        return call(ours, doc_ids, n_docs)(x=x[:, :, 1:3], **rest)

    truth = pulled(run, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_all_close(pulled(compiled, inputs), truth, 1e-6)
    kept = pulled(lambda **leaves: checkpoint(run, use_reentrant=False, **leaves), inputs)
    assert_equal(kept, truth)


def test_what_the_kernels_do_not_take_goes_to_the_reference(device: torch.device) -> None:
    for sizes, dtype in (({"P": 129, "N": 3}, FP32), ({"P": 3, "N": 257}, FP32), ({}, torch.float64)):
        inputs = {k: t.to(device, dtype) for k, t in draw(3, **sizes).items()}
        pairs = zip(call(ours)(**inputs), call(reference)(**inputs), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_inductor_takes_it_whole(packed: bool) -> None:
    doc_ids, n_docs = cut_rows(2, 513) if packed else (None, 2)
    doc_ids = None if doc_ids is None else doc_ids.to(CUDA)
    inputs = rounded(draw(513, n_docs, (*ALL, "z"), **REAL), CUDA, BF16)
    inputs["x"] = torch.cat([inputs["x"]] * 2, -2)

    def run(x: Tensor, **rest: Tensor) -> tuple[Tensor, ...]:
        return call(ours, doc_ids, n_docs)(x=2 * x[:, :, 8:24], **rest)

    truth = pulled(run, inputs, BF16)
    torch._dynamo.reset()
    assert_all_close(pulled(torch.compile(run, fullgraph=True), inputs, BF16), truth, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_the_same_bits_each_time(packed: bool, dtype: torch.dtype) -> None:
    doc_ids, n_docs = cut_rows(2, 4096) if packed else (None, 2)
    inputs = rounded(draw(4096, n_docs, **REAL | {"heads": 48, "groups": 1}), CUDA, dtype)
    first = pulled(call(ours, doc_ids, n_docs), inputs, dtype)
    for _ in range(10):
        assert_equal(pulled(call(ours, doc_ids, n_docs), inputs, dtype), first)


def on_gpu(length: int, heads: int, dtype: torch.dtype, seed: int = 0) -> Results:
    """A row made on the GPU, where it would take the CPU minutes; decays from one token's to a million's."""
    generator = torch.Generator(CUDA).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=CUDA, dtype=dtype)

    dt = normal(1, length, heads).sub_(4)
    tensors = {"x": normal(1, length, heads, 64), "dt": dt, "A": -torch.logspace(-4, 1, heads, device=CUDA)}
    tensors |= {"B": normal(1, length, 1, 128), "C": normal(1, length, 1, 128)}
    return tensors | {"D": torch.ones(heads, device=CUDA), "dt_bias": torch.zeros(heads, device=CUDA)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_quarter_of_a_million_tokens(dtype: torch.dtype) -> None:
    inputs = on_gpu(262_144, 8, dtype)
    found = pulled(call(ours), inputs, dtype)
    truth = pulled(call(reference), doubled(inputs), dtype)
    # What decays over 10^5 tokens is a sum of as many log decays.
    assert_all_close(found, truth, 1e-2 if dtype == BF16 else 1e-4)


@pytest.mark.gpu
def test_a_million_tokens() -> None:
    inputs = on_gpu(1 << 20, 2, BF16)
    whole = pulled(call(ours), inputs, BF16)
    assert all(t.isfinite().all() for t in whole.values())
    with torch.no_grad():
        y, final = split(1 << 19, None)(**inputs)
    # On Hopper a state that is carried and one that is joined differ by fp32's rounding.
    assert distance(final, whole["output 1"]) < 1e-5 and distance(y, whole["output 0"]) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_offsets_past_two_to_the_31(packed: bool) -> None:
    """The end of a row of 2^31 elements of x, and of states, is what the op makes of the end alone.

    A document's has the same bits; a row's but for the rounding of the state at the cut.
    """
    heads, tail = 128, 1024 + 77
    length = (1 << 18) + tail
    inputs = on_gpu(length, heads, BF16)
    assert inputs["x"].numel() > 2**31
    doc_ids, n_docs = documents([length - tail, tail]) if packed else (None, 1)
    found = pulled(call(ours, doc_ids, n_docs), inputs, BF16)
    with torch.no_grad():
        state = call(ours)(**part(inputs, slice(None), slice(0, length - tail)))[1]
    end = part(inputs, slice(None), slice(length - tail, None))
    if not packed:
        end["initial_state"] = state
    generator = torch.Generator(CUDA).manual_seed(1)
    d_y = torch.randn(1, length, heads, 64, generator=generator, device=CUDA)[:, -tail:].to(BF16)
    d_final = torch.randn(n_docs, heads, 64, 128, generator=generator, device=CUDA)[-1:].to(BF16)
    leaves = {name: t.detach().requires_grad_() for name, t in end.items()}
    y, final = call(ours)(**leaves)
    torch.autograd.backward([y, final], [d_y, d_final.float()])
    ends = {f"grad {name}": (found[f"grad {name}"][:, -tail:], leaves[name].grad) for name in PER_TOKEN}
    ends |= {"y": (found["output 0"][:, -tail:], y), "final": (found["output 1"][-1:], final)}
    for name, (mine, alone) in ends.items():
        # Over the heads of a group, gradients of B and C are added in runs as long as the sizes allow.
        same = packed and name not in ("grad B", "grad C")
        assert torch.equal(mine, alone) if same else distance(mine, alone) < 5e-3, name
