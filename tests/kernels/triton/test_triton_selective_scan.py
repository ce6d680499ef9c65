"""The Triton selective scan against its oracle in float64 and the torch reference in its own dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter

from kernels.cases import assert_all_close, cut_rows, distance, outputs_and_grads, spans
from kernels.oracle_selective_scan import selective_scan_oracle
from kernels.triton.shim import poisoned
from ssmtrain.kernels import tuned
from ssmtrain.kernels.selective_scan import reference, triton_backward, triton_forward
from ssmtrain.kernels.selective_scan import triton as ours
from ssmtrain.kernels.ssd import triton_chunks

Inputs = dict[str, Tensor]
PARAMETERS = {"A", "D", "dt_bias", "initial_state"}
"""What stays in fp32 when u has 16 bits."""
PER_TOKEN = ("u", "dt", "B", "C", "z")
ALL = ("D", "z", "dt_bias", "initial_state")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def quick_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, calls between these functions patch tl again as the launch has: half of the time."""
    upstream = interpreter.InterpretedFunction.__call__
    inner = (vars(triton_forward), vars(triton_backward))

    def called(self, *args, **kwargs):
        if any(self.fn.__globals__ is names for names in inner):
            return self.rewrite()(*args, **kwargs)
        return upstream(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", called)


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that a kernel forgets to write shows."""
    poisoned(monkeypatch, ours, triton_chunks)


def use(monkeypatch: pytest.MonkeyPatch, window: int = 8, every: int = 4, **config: int) -> None:
    """Cut a few tokens as the kernels cut thousands."""
    real = tuned.lookup
    changes = {"BE": 8, "UNROLL": 2, "SPAN": 2} | config
    monkeypatch.setattr(ours, "window_length", lambda channels, length: window)
    monkeypatch.setattr(ours, "EVERY", every)
    monkeypatch.setattr(tuned, "lookup", lambda *asked: real(*asked) | changes)


def draw(
    length: int,
    n_docs: int,
    optional: tuple[str, ...] = ALL,
    *,
    batch: int = 2,
    channels: int = 12,
    N: int = 4,
    seed: int = 0,
) -> Inputs:
    """Random inputs, float64 but with fp32's digits; z is half of a projection, B and C parts of another."""
    generator = torch.Generator().manual_seed(1000 * seed + length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    B, C = normal(batch, length, 3 + 2 * N)[..., 3:].split(N, dim=-1)
    inputs = {
        "u": normal(batch, length, channels),
        "dt": normal(batch, length, channels) - 1,
        "A": -normal(channels, N).exp(),
        "B": B,
        "C": C,
        "D": normal(channels),
        "z": normal(batch, length, 2 * channels)[..., channels:],
        "dt_bias": normal(channels),
        "initial_state": normal(n_docs, channels, N),
    }
    return {name: inputs[name] for name in ("u", "dt", "A", "B", "C", *optional)}


def rounded(inputs: Inputs, device: torch.device, dtype: torch.dtype = FP32) -> Inputs:
    """The inputs as the op gets them."""
    return {name: t.to(device, FP32 if name in PARAMETERS else dtype) for name, t in inputs.items()}


def call(module, doc_ids: Tensor | None = None, n_docs: int | None = None, final: bool = True, **options):
    """The op of a module as a function of its tensors."""
    settings = {"dt_softplus": True, "dt_limit": (0.0, float("inf"))} | options

    def run(tensors: Inputs) -> tuple[Tensor, ...]:
        absent = {name: None for name in ALL if name not in tensors}
        ids = None if doc_ids is None else doc_ids.to(tensors["u"].device)
        packed = {"doc_ids": ids, "n_docs": n_docs, "return_final_state": final}
        y, state = module.selective_scan(**tensors, **absent, **packed, **settings)
        return (y, state) if final else (y,)

    return run


def oracle(inputs: Inputs, doc_ids: Tensor | None, final: bool = True, **options) -> Inputs:
    """Outputs and gradients of the oracle, in float64, on the CPU."""

    def run(tensors: Inputs) -> tuple[Tensor, ...]:
        found = selective_scan_oracle(**tensors, doc_ids=doc_ids, **options)
        return found if final else found[:1]

    return outputs_and_grads(run, {name: t.double().cpu() for name, t in inputs.items()})


def pulled(run: Callable[[Inputs], tuple[Tensor, ...]], inputs: Inputs) -> Inputs:
    """Outputs and gradients, on the CPU."""
    device = inputs["u"].device
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    outputs = run(leaves)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    torch.autograd.backward(outputs, [g.to(device, y.dtype) for g, y in zip(grads, outputs, strict=True)])
    found = {f"output {i}": y.detach().cpu() for i, y in enumerate(outputs)}
    return found | {f"grad {k}": t.grad.cpu() for k, t in leaves.items() if t.grad is not None}


def check(
    inputs: Inputs,
    doc_ids: Tensor | None,
    n_docs: int | None,
    device: torch.device,
    tolerance: float = 1e-6,
    final: bool = True,
    **options,
) -> None:
    """Hold outputs and gradients in fp32 against the oracle's."""
    low = rounded(inputs, device)
    found = pulled(call(ours, doc_ids, n_docs, final, **options), low)
    assert_all_close(found, oracle(low, doc_ids, final, **options), tolerance)


ROWS = {
    "one document a row": None,
    "several": [[3, 16, 1], [1, 19]],
    "at windows' edges": [[8, 12], [16, 4]],
    "short": [[1] * 11 + [9], [2] * 10],
}


def documents(rows: list[list[int]] | None) -> tuple[Tensor | None, int | None]:
    """Document ids from the lengths of each row's documents."""
    if rows is None:
        return None, None
    numbers = itertools.count()
    ids = [[d for length in row for d in [next(numbers)] * length] for row in rows]
    return torch.tensor(ids, dtype=torch.int32), next(numbers)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("window,every", [(64, 64), (64, 4), (8, 4)])
def test_documents_and_windows(
    window: int, every: int, rows: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, window, every)
    doc_ids, n_docs = documents(ROWS[rows])
    check(draw(20, n_docs or 2), doc_ids, n_docs, device)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 17])
def test_lengths(length: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    check(draw(length, 2), None, None, device)


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("optional", [(), *((name,) for name in ALL)], ids=str)
def test_what_is_optional(
    optional: tuple[str, ...], final: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch)
    check(draw(11, 2, optional), None, None, device, final=final)


@pytest.mark.parametrize("options", [{"dt_softplus": False}, {"dt_limit": (0.2, 0.9)}], ids=str)
def test_step_sizes(options: dict, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    inputs = draw(11, 2)
    if "dt_softplus" in options:
        inputs |= {"dt": inputs["dt"].abs(), "dt_bias": inputs["dt_bias"].abs()}
    check(inputs, None, None, device, **options)


@pytest.mark.parametrize("channels,N,BE", [(1, 1, 8), (3, 5, 8), (40, 16, 32), (16, 64, 8)])
def test_channels_and_states(
    channels: int, N: int, BE: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, BE=BE)
    check(draw(11, 2, channels=channels, N=N), None, None, device)


@pytest.mark.parametrize("UNROLL,SPAN", [(1, 1), (4, 4), (4, 1)])
def test_group_sizes(UNROLL: int, SPAN: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, UNROLL=UNROLL, SPAN=SPAN)
    doc_ids, n_docs = documents([[5, 20], [25]])
    assert n_docs is not None
    check(draw(25, n_docs), doc_ids, n_docs, device)


def strain(cases: Iterator[Inputs], doc_ids: Tensor | None, n_docs: int | None) -> dict[str, float]:
    """Our distance from float64 over that of the reference in the same dtype, over all cases."""
    gaps: dict[str, list[Tensor]] = {}
    for inputs in cases:
        found = pulled(call(ours, doc_ids, n_docs), inputs)
        theirs = pulled(call(reference, doc_ids, n_docs), inputs)
        truth = pulled(call(reference, doc_ids, n_docs), {name: t.double() for name, t in inputs.items()})
        for name, exact in truth.items():
            assert found[name].dtype == theirs[name].dtype and found[name].isfinite().all(), name
            norms = [(t[name].double() - exact).norm() ** 2 for t in (found, theirs)]
            gaps.setdefault(name, []).append(torch.stack([*norms, exact.norm() ** 2]))
    sums = {name: torch.stack(values).sum(0).sqrt().tolist() for name, values in gaps.items()}
    # Of inputs of 16 bits, states too are fp32, and decays the GPU's own exponential, good to 2^-22.
    least = 0.0 if all(t.dtype == FP32 for t in inputs.values()) else 5e-7
    return {name: a / (b + least * size) for name, (a, b, size) in sums.items()}


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_16_bits(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    doc_ids, n_docs = documents([[5, 20], [25]])
    assert n_docs is not None
    strains = strain(iter([rounded(draw(25, n_docs), device, dtype)]), doc_ids, n_docs)
    assert max(strains.values()) <= 2, strains


def apart(doc_ids: Tensor):
    """The op on each document alone, put together again."""

    def run(tensors: Inputs) -> tuple[Tensor, Tensor]:
        rows: list[list[Tensor]] = [[] for _ in range(doc_ids.shape[0])]
        states = []
        for number, (row, start, end) in enumerate(spans(doc_ids)):
            here = {
                name: t[row : row + 1, start:end] if name in PER_TOKEN else t for name, t in tensors.items()
            }
            here["initial_state"] = tensors["initial_state"][number : number + 1]
            y, state = call(ours)(here)
            rows[row].append(y)
            states.append(state)
        return torch.cat([torch.cat(ys, 1) for ys in rows]), torch.cat(states)

    return run


def assert_alone(doc_ids: Tensor, n_docs: int, inputs: Inputs) -> None:
    """Assert the bits of documents alone; sums over tokens may be added up in another order."""
    packed, alone = pulled(call(ours, doc_ids, n_docs), inputs), pulled(apart(doc_ids), inputs)
    sums = {"grad A", "grad D", "grad dt_bias"}
    wrong = [name for name in packed if name not in sums and not torch.equal(packed[name], alone[name])]
    assert not wrong, wrong
    assert all(distance(packed[name], alone[name]) < 1e-5 for name in sums)


def test_packed_documents_have_the_bits_of_documents_alone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch)
    doc_ids, n_docs = documents([[3, 16, 1], [10, 10]])
    assert doc_ids is not None and n_docs is not None
    assert_alone(doc_ids, n_docs, rounded(draw(20, n_docs), device))


def test_nothing_crosses_a_boundary(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinity in one document stays there, forwards and backwards."""
    use(monkeypatch)
    doc_ids, n_docs = documents([[3, 16, 1], [10, 10]])
    assert doc_ids is not None and n_docs is not None
    clean = rounded(draw(20, n_docs), device)
    spoilt = {name: t.clone() for name, t in clean.items()}
    spoilt["u"][0, 12] = float("inf")
    a, b = (pulled(call(ours, doc_ids, n_docs), inputs) for inputs in (clean, spoilt))
    others = doc_ids != doc_ids[0, 12]
    for name in ("output 0", "grad u", "grad dt", "grad B", "grad C", "grad z"):
        assert torch.equal(a[name][others], b[name][others]), name
    assert not b["output 0"][~others].isfinite().all()


def test_decays_to_nothing_and_not_at_all(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    inputs = draw(30, 1, batch=1)
    inputs["A"] = torch.where(torch.arange(4) < 2, -1000.0, -1e-6).double().expand(12, 4).clone()
    inputs["dt"][:, 10:20] = 30.0
    inputs["dt"][:, 20:30] = -30.0
    check(inputs, None, None, device, 2e-6)


def test_the_same_bits_each_time(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    inputs = rounded(draw(10, 2), device)
    first, second = (pulled(call(ours), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("more", [1, 40])
def test_room_for_more_documents_changes_no_bit(
    more: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch)
    doc_ids, n_docs = documents([[1, 20], [5, 9, 7]])
    inputs = rounded(draw(21, n_docs, ("D", "z", "dt_bias")), device)
    exact, roomy = (pulled(call(ours, doc_ids, n, final=False), inputs) for n in (n_docs, n_docs + more))
    assert all(torch.equal(exact[name], roomy[name]) for name in exact)


def test_recomputed_activations_give_the_same_gradients(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch)
    inputs = rounded(draw(6, 1, batch=1), device)

    def again(tensors: Inputs) -> tuple[Tensor, ...]:
        return checkpoint(call(ours), tensors, use_reentrant=False)

    plain, recomputed = pulled(call(ours), inputs), pulled(again, inputs)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_the_op_is_registered_as_torch_wants(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    t = rounded(draw(20, 2, batch=1), device)
    t["initial_state"] = t["initial_state"][:1].transpose(1, 2)
    tensors = [t[name] for name in ("u", "dt")] + [t["A"].t()]
    tensors += [t[name] for name in ("B", "C", "D", "z", "dt_bias", "initial_state")]
    leaves = [x.detach().requires_grad_() for x in tensors]
    arguments = (*leaves, None, 1, True, 0.0, float("inf"), True, True)
    torch.library.opcheck(
        torch.ops.ssmtrain.selective_scan,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_a_step_is_a_token_of_the_scan(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    inputs = rounded(draw(6, 2), device)
    with torch.no_grad():
        expected, final = call(ours)(inputs)
        state = inputs.pop("initial_state").clone()
        for t in range(6):
            here = {name: x[:, t] if name in PER_TOKEN else x for name, x in inputs.items()}
            y = ours.selective_scan_step(state, **here, dt_softplus=True, dt_limit=(0.0, float("inf")))
            assert distance(y, expected[:, t]) < 1e-6
    assert distance(state, final) < 1e-6


@triton.jit
def powers(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, triton_forward.power(tl.load(x + i, mask=i < n, other=0.0), True), mask=i < n)


def test_exact_powers(device: torch.device) -> None:
    """To less than a unit of fp32, 1 of no step at all, and nothing of what is beyond fp32."""
    x = torch.cat(
        [-torch.logspace(-9, 2.09, 4000), torch.tensor([0.0, -0.0, -1e4, -1e30, -torch.inf, torch.nan])]
    )
    x = x.to(device)
    y = torch.full_like(x, 7.0)
    powers[(1,)](x, y, len(x), BLOCK=4096)
    exact = torch.exp2(x.double())
    assert ((y[:4000] - exact[:4000]).abs() / exact[:4000]).max() < 0.8 * 2**-23
    assert y[4000:-1].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0] and y[-1].isnan()


SIZES = {"batch": 2, "channels": 96, "N": 16}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 255, 257, 1000, 4096])
def test_every_length_on_a_gpu(length: int, packed: bool, dtype: torch.dtype) -> None:
    """Windows of 512 tokens: the longest have several."""
    doc_ids, n_docs = cut_rows(2, length) if packed else (None, None)
    cases = (
        rounded(draw(length, n_docs or 2, seed=seed, **SIZES), CUDA, dtype)
        for seed in range(1 if length > 999 else 4)
    )
    strains = strain(cases, doc_ids, n_docs)
    assert max(strains.values()) <= 2, strains


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 7, 40, 192])
@pytest.mark.parametrize("N", [1, 3, 8, 16, 32, 64, 128, 256])
def test_every_size_on_a_gpu(N: int, channels: int) -> None:
    doc_ids, n_docs = cut_rows(2, 700)
    cases = (rounded(draw(700, n_docs, channels=channels, N=N, seed=seed), CUDA, BF16) for seed in range(2))
    strains = strain(cases, doc_ids, n_docs)
    assert max(strains.values()) <= 2.5, strains


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("length", [300, 2600])
def test_packed_documents_have_the_bits_of_documents_alone_on_a_gpu(length: int, dtype: torch.dtype) -> None:
    doc_ids, n_docs = cut_rows(2, length)
    assert_alone(doc_ids, n_docs, rounded(draw(length, n_docs, **SIZES), CUDA, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_multiprocessors_change_no_bit(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor into how many turns the backward pass takes a window: as on a GPU of one, and of very many."""
    doc_ids, n_docs = cut_rows(2, 2600) if packed else (None, None)
    inputs = rounded(draw(2600, n_docs or 2, channels=1600, N=16), CUDA, BF16)
    found = []
    for multiprocessors in (1, 2**20, 1):
        monkeypatch.setattr(tuned, "multiprocessors", lambda device, n=multiprocessors: n)
        found.append(pulled(call(ours, doc_ids, n_docs), inputs))
    for name, one in found[0].items():
        assert all(torch.equal(one, other[name]) for other in found[1:]), name


@pytest.mark.gpu
def test_a_million_tokens() -> None:
    """Windows pass states on: the end of the row is that of its last tokens from the state before them."""
    length, rest = 1 << 20, 5000
    inputs = rounded(draw(4096, 1, ("D", "z", "dt_bias"), batch=1, channels=64, N=16), CUDA, BF16)
    inputs = {name: t.repeat(1, length // 4096, 1) if name in PER_TOKEN else t for name, t in inputs.items()}
    with torch.no_grad():
        y, final = call(ours)(inputs)
        _, state = call(ours)({k: t[:, :-rest] if k in PER_TOKEN else t for k, t in inputs.items()})
        end = {k: t[:, -rest:] if k in PER_TOKEN else t for k, t in inputs.items()}
        expected, last = call(reference)({k: t.double() for k, t in end.items()} | {"initial_state": state})
    assert y.isfinite().all()
    assert distance(y[:, -rest:], expected) < 5e-3 and distance(final, last) < 1e-5
