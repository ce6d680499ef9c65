"""The Triton causal convolution against its oracle in float64 and the torch reference in its own dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter

from kernels.cases import assert_all_close, cut_rows, distance
from kernels.oracle_causal_conv1d import causal_conv1d_oracle
from kernels.triton.shim import poisoned
from ssmtrain.kernels import tuned
from ssmtrain.kernels.causal_conv1d import reference
from ssmtrain.kernels.causal_conv1d import triton as ours

Results = dict[str, Tensor]
PARAMETERS = {"weight", "bias", "initial_state"}
"""What stays in fp32 when x has 16 bits."""


@pytest.fixture(autouse=True)
def quick_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, calls between these functions patch tl again as the launch has: half of the time."""
    upstream = interpreter.InterpretedFunction.__call__

    def called(self, *args, **kwargs):
        if self.fn.__globals__ is vars(ours):
            return self.rewrite()(*args, **kwargs)
        return upstream(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", called)


@pytest.fixture
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that a kernel forgets to write shows."""
    poisoned(monkeypatch, ours)


def use(monkeypatch: pytest.MonkeyPatch, tokens: int, **changes: int) -> None:
    """Put runs of this many tokens, and other changes, in the place of the configuration for the shape."""
    real = ours._config

    def config(*args) -> tuned.Config:
        return real(*args) | {"TOKENS": tokens, "UNROLL": min(4, tokens)} | changes

    monkeypatch.setattr(ours, "_config", config)


def draw(
    batch: int, length: int, n_docs: int, state: bool = True, taps: int = 4, channels: int = 5
) -> dict[str, Tensor]:
    """Random float64 inputs."""
    generator = torch.Generator().manual_seed(length + taps)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": normal(batch, length, channels),
        "weight": normal(channels, taps),
        "bias": normal(channels),
    }
    return inputs | ({"initial_state": normal(n_docs, channels, taps)} if state else {})


def rounded(inputs: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs as the op gets them."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: t.to(device, kept if name in PARAMETERS else dtype) for name, t in inputs.items()}


def pulled(run: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor], dtype: torch.dtype) -> Results:
    """Outputs and gradients; cotangents are what `dtype` can hold."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = run(**leaves)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=generator).to(dtype) for out in outputs]
    torch.autograd.backward(outputs, [c.to(out) for c, out in zip(cotangents, outputs, strict=True)])
    result = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return {k: v.cpu() for k, v in (result | {f"grad {k}": leaf.grad for k, leaf in leaves.items()}).items()}


def call(module, doc_ids: Tensor | None, n_docs: int, activation: str | None = "silu", final: bool = True):
    """The op of a module as a function of its tensors."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_state: Tensor | None = None):
        y, last = module.causal_conv1d(
            x,
            weight,
            bias,
            activation=activation,
            doc_ids=None if doc_ids is None else doc_ids.to(x.device),
            n_docs=n_docs,
            initial_state=initial_state,
            return_final_state=final,
        )
        return (y, last) if final else (y,)

    return run


def check(
    inputs: dict[str, Tensor],
    doc_ids: Tensor | None,
    n_docs: int,
    device: torch.device,
    activation: str | None = "silu",
    tolerance: float = 1e-6,
) -> None:
    """Hold outputs and gradients in fp32 against the oracle's."""
    single = rounded(inputs, device, torch.float32)
    found = pulled(call(ours, doc_ids, n_docs, activation), single, torch.float32)

    def oracle(**leaves: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d_oracle(**leaves, activation=activation, doc_ids=doc_ids)

    exact = {name: t.double().cpu() for name, t in single.items()}
    assert_all_close(found, pulled(oracle, exact, torch.float32), tolerance)


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 63, 64, 65])
def test_matches_the_oracle_at_every_length(length: int, packed: bool, device: torch.device) -> None:
    batch = 1 if length > 5 else 2
    doc_ids, n_docs = cut_rows(batch, length) if packed else (None, batch)
    check(draw(batch, length, n_docs), doc_ids, n_docs, device)


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("packed,state", itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_matches_the_oracle_with_each_option(
    taps: int, packed: bool, state: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, 4, UNROLL=2)
    doc_ids, n_docs = cut_rows(2, 7) if packed else (None, 2)
    inputs = draw(2, 7, n_docs, state, taps, channels=33)
    if state == packed:
        del inputs["bias"]
    check(inputs, doc_ids, n_docs, device, None if taps == 3 else "silu")


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("lengths", [[1] * 11, [2, 1, 3, 2, 3], [4, 4, 3], [3, 8]], ids=str)
def test_documents_shorter_than_the_window_and_at_the_seams(
    lengths: list[int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of 4 tokens: documents begin and end before, at and after each seam, and span it."""
    use(monkeypatch, 4)
    row = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    doc_ids = torch.stack([row, row + len(lengths)])
    check(draw(2, 11, 2 * len(lengths)), doc_ids, 2 * len(lengths), device)


@pytest.mark.skipif(not tuned.interpreting(), reason="a GPU chooses the order itself")
def test_programs_in_reverse_give_the_same_bits(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What two programs wrote would be the last one's."""
    use(monkeypatch, 4)
    doc_ids = torch.tensor([[0, 0, 0, 1, 2, 3, 3, 3, 4]], dtype=torch.int32)
    inputs = rounded(draw(1, 9, 5), device, torch.float32)
    forth = pulled(call(ours, doc_ids, 5), inputs, torch.float32)
    builder = interpreter.interpreter_builder
    upstream = builder.set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda x, y, z: upstream(builder.grid_dim[0] - 1 - x, y, z), raising=False
    )
    back = pulled(call(ours, doc_ids, 5), inputs, torch.float32)
    assert all(torch.equal(back[name], forth[name]) for name in forth)


@pytest.mark.parametrize("tokens,unroll,block", [(2, 1, 64), (8, 8, 32)])
def test_any_configuration(
    tokens: int, unroll: int, block: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, tokens, UNROLL=unroll, BLOCK_C=block)
    doc_ids, n_docs = cut_rows(1, 9)
    check(draw(1, 9, n_docs, channels=40), doc_ids, n_docs, device)


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("documents", [False, True])
def test_a_slice_of_a_projection_is_read_in_place(documents: bool, device: torch.device) -> None:
    doc_ids, n_docs = cut_rows(2, 5) if documents else (None, 2)
    inputs = rounded(draw(2, 5, n_docs, state=False, channels=16), device, torch.float32)
    run = call(ours, doc_ids, n_docs)
    truth = pulled(run, inputs, torch.float32)
    nan = torch.full((2, 5, 8), torch.nan, device=device)
    wide = torch.cat([nan, inputs["x"], nan], -1)
    found = pulled(lambda x, **rest: run(x[..., 8:24], **rest), inputs | {"x": wide}, torch.float32)
    assert torch.equal(found["output 0"], truth["output 0"])
    assert torch.equal(found["grad x"][..., 8:24], truth["grad x"]) and not found["grad x"][..., :8].any()
    odd = torch.cat([nan[..., :3], inputs["x"], nan], -1)[..., 3:19]  # no alignment for wide loads
    assert torch.equal(run(odd, inputs["weight"], inputs["bias"])[0].cpu(), truth["output 0"])
    swapped = inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(swapped, inputs["weight"], inputs["bias"])[0].cpu(), truth["output 0"])


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("used", [0, 1], ids=["y", "final state"])
def test_gradient_through_one_output_alone(used: int, device: torch.device) -> None:
    doc_ids, n_docs = cut_rows(2, 7)
    inputs = draw(2, 7, n_docs)
    found = pulled(
        lambda **leaves: call(ours, doc_ids, n_docs)(**leaves)[used : used + 1],
        rounded(inputs, device, torch.float32),
        torch.float32,
    )
    exact = {name: t.float().double() for name, t in inputs.items()}
    # What the final state does not depend on has no gradient by the oracle, and zeros from the kernel.
    truth = pulled(
        lambda **leaves: tuple(
            out + 0 * (leaves["weight"].sum() + leaves["bias"].sum())
            for out in causal_conv1d_oracle(**leaves, doc_ids=doc_ids)[used : used + 1]
        ),
        exact,
        torch.float32,
    )
    assert_all_close(found, truth, 1e-6)


@pytest.mark.usefixtures("unwritten_is_nan")
def test_expanded_gradients_and_states_of_any_layout(device: torch.device) -> None:
    inputs = rounded(draw(2, 3, 2), device, torch.float32)
    run = call(ours, None, 2)
    carried = run(**inputs)[1]
    assert carried.dtype == torch.float32 and carried.shape == (2, 5, 4)
    swapped = run(**inputs | {"initial_state": carried})
    copied = run(**inputs | {"initial_state": carried.contiguous()})
    assert all(torch.equal(a, b) for a, b in zip(swapped, copied, strict=True))
    x = inputs["x"].requires_grad_()
    run(**inputs)[0].sum().backward()
    summed, x.grad = x.grad, None
    y = run(**inputs)[0]
    y.backward(torch.ones_like(y))
    assert torch.equal(summed, x.grad)


def excess(
    dtype: torch.dtype, inputs: dict[str, Tensor], doc_ids: Tensor | None, n_docs: int, device: torch.device
) -> dict[str, float]:
    """By how much our distance from float64 passes twice the reference's."""
    low = rounded(inputs, device, dtype)
    found, theirs = (pulled(call(module, doc_ids, n_docs), low, dtype) for module in (ours, reference))
    truth = pulled(call(reference, doc_ids, n_docs), {name: t.double() for name, t in low.items()}, dtype)
    return {k: distance(found[k], truth[k]) - 2 * distance(theirs[k], truth[k]) for k in truth}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [5, 6])
def test_16_bits_cost_no_more_than_in_the_reference(
    channels: int, dtype: torch.dtype, device: torch.device
) -> None:
    """An even number of channels is read in pairs."""
    doc_ids, n_docs = cut_rows(1, 12)
    over = excess(dtype, draw(1, 12, n_docs, channels=channels), doc_ids, n_docs, device)
    assert max(over.values()) <= 1e-6, over


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taps", [2, 4])
def test_steps_equal_the_pass(taps: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs = rounded(draw(2, 5, 2, taps=taps), device, dtype)
    y, final = call(ours, None, 2)(**inputs)
    padded = torch.zeros(2, 5, taps + 1, device=device)
    state = padded[..., 1:].copy_(inputs["initial_state"])  # rows further apart than they are long
    parameters = inputs["weight"], inputs["bias"]
    for t in range(5):
        out = ours.causal_conv1d_step(state, inputs["x"][:, t], *parameters, activation="silu")
        assert out.dtype == dtype
        torch.testing.assert_close(out, y[:, t])
    assert torch.equal(state, final) and not padded[..., 0].any()
    narrow = inputs["initial_state"].to(torch.bfloat16)
    theirs = narrow.clone()
    out = ours.causal_conv1d_step(narrow, inputs["x"][:, 0], *parameters, activation=None)
    truth = reference.causal_conv1d_step(theirs, inputs["x"][:, 0], *parameters, activation=None)
    torch.testing.assert_close(out, truth)
    assert torch.equal(narrow, theirs)


def test_float64_is_the_reference(device: torch.device) -> None:
    inputs = {name: t.to(device) for name, t in draw(2, 6, 2).items()}
    ours_out, theirs = (call(module, None, 2)(**inputs) for module in (ours, reference))
    assert all(torch.equal(a, b) for a, b in zip(ours_out, theirs, strict=True))


def test_the_ops_are_what_they_say(device: torch.device) -> None:
    """Schemas, fakes and gradients, with and without what is optional."""
    doc_ids, n_docs = cut_rows(1, 2)
    inputs = rounded(draw(1, 2, n_docs), device, torch.float32)
    leaves = [t.requires_grad_() for t in inputs.values()]
    x, weight, bias, initial = leaves
    # opcheck pulls on both outputs, and an empty one has nothing to pull on.
    full = (x, weight, bias, doc_ids.to(device), initial.transpose(1, 2), n_docs, True, True)
    torch.library.opcheck(torch.ops.ssmtrain.causal_conv1d.default, full)
    plain = [t.detach() for t in (x, weight)]
    schemas = ("test_schema", "test_faketensor")
    bare = (*plain, None, None, None, 1, False, False)
    torch.library.opcheck(torch.ops.ssmtrain.causal_conv1d.default, bare, test_utils=schemas)
    back = (x.detach(), None, *plain, None, None, None, True)
    torch.library.opcheck(torch.ops.ssmtrain.causal_conv1d_back.default, back, test_utils=schemas)
    step = (torch.zeros(1, 5, 4, device=device), x.detach()[:, 0], weight.detach(), None, True)
    torch.library.opcheck(torch.ops.ssmtrain.causal_conv1d_step.default, step, test_utils=schemas)


def test_compiles_whole_and_recomputes(device: torch.device) -> None:
    doc_ids, n_docs = cut_rows(1, 3)
    inputs = rounded(draw(1, 3, n_docs), device, torch.float32)
    inputs["x"] = torch.cat([inputs["x"], inputs["x"]], -1)
    doc_ids = doc_ids.to(device)

    def run(x: Tensor, **rest: Tensor) -> tuple[Tensor, ...]:
        return call(ours, doc_ids, n_docs)(x[..., 2:7], **rest)

    truth = pulled(run, inputs, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_all_close(pulled(compiled, inputs, torch.float32), truth, 1e-7)
    kept = pulled(lambda **leaves: checkpoint(run, use_reentrant=False, **leaves), inputs, torch.float32)
    assert all(torch.equal(kept[name], truth[name]) for name in truth)


@pytest.mark.gpu
@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 255, 257, 1000, 4096])
def test_every_length_and_dtype_on_a_gpu(length: int, packed: bool, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    for taps, channels, state in ((4, 776, True), (4, 5376 if length > 999 else 37, False), (2, 512, True)):
        doc_ids, n_docs = cut_rows(3, length) if packed else (None, 3)
        inputs = draw(3, length, n_docs, state, taps, channels)
        over = excess(dtype, inputs, doc_ids, n_docs, device)
        # fp32: the two round differently, in the last bits.
        assert max(over.values()) <= 1e-6, (taps, channels, over)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_the_same_bits_each_time(packed: bool) -> None:
    device = torch.device("cuda")
    doc_ids, n_docs = cut_rows(4, 2048) if packed else (None, 4)
    inputs = rounded(draw(4, 2048, n_docs, packed, channels=1792), device, torch.bfloat16)
    first = pulled(call(ours, doc_ids, n_docs, final=packed), inputs, torch.bfloat16)
    for _ in range(10):
        again = pulled(call(ours, doc_ids, n_docs, final=packed), inputs, torch.bfloat16)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_inductor_takes_a_slice_whole(packed: bool) -> None:
    device = torch.device("cuda")
    doc_ids, n_docs = cut_rows(2, 513) if packed else (None, 2)
    doc_ids = None if doc_ids is None else doc_ids.to(device)
    inputs = rounded(draw(2, 513, n_docs, packed, channels=384), device, torch.bfloat16)
    inputs["x"] = torch.cat([inputs["x"], inputs["x"]], -1)

    def run(x: Tensor, **rest: Tensor) -> tuple[Tensor, ...]:
        return call(ours, doc_ids, n_docs, final=packed)(2 * x[..., 64:448], **rest)

    truth = pulled(run, inputs, torch.bfloat16)
    torch._dynamo.reset()
    found = pulled(torch.compile(run, fullgraph=True), inputs, torch.bfloat16)
    assert_all_close(found, truth, 1e-2)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    device = torch.device("cuda")
    length, channels = 420_000, 5376
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, length, channels, device=device, dtype=torch.bfloat16, generator=generator)
    weight = torch.randn(channels, 4, device=device, generator=generator)
    y, final = call(ours, None, 1)(x, weight)
    tail, theirs = call(reference, None, 1)(x[:, -40:], weight)
    torch.testing.assert_close(y[:, -30:], tail[:, -30:], rtol=2e-2, atol=2e-2)
    assert torch.equal(final, theirs)
