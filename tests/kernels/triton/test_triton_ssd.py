"""The Triton SSD against its oracle in float64; on a GPU against the reference in float64, at real sizes.

An error is a relative L2 distance from float64. On a GPU it may be at most twice that of torch in the same
dtype, and no more than 1e-2 in 16 bits, 1e-5 in fp32. Torch is `reference.ssd` for what has 16 bits: it works
in fp32, so its error is the rounding of a result. For what has fp32 (states, the gradients of A, D, dt_bias
and the states; all in fp32) torch is `same_dtype.ssd`, whose products take rounded operands as ours do.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.cases import assert_all_close, cut_rows, distance, spans
from kernels.triton.shim import poisoned
from kernels.triton.ssd_cases import ALL, call, check, documents, doubled, draw, pulled, rounded, strain, use
from kernels.triton.ssd_cases import quick_reduce as quick_reduce
from ssmtrain.kernels.ssd import reference, triton_chunks
from ssmtrain.kernels.ssd import triton as ours

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # a GPU says nothing about log2(0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that a kernel forgets to write shows."""
    poisoned(monkeypatch, ours, triton_chunks)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33])
def test_one_block_of_tokens_a_chunk(
    length: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, blocks=1)
    check(draw(length), None, 1, device, chunk_size=16)


@pytest.mark.parametrize("length", [1, 16, 17, 31, 33, 64, 65])
def test_two_blocks_of_tokens_a_chunk(
    length: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, blocks=2)
    check(draw(length), None, 1, device, chunk_size=32)


@pytest.mark.parametrize(
    "blocks,rows",
    [
        (1, [[1, 1]]),
        (1, [[1, 15], [16]]),
        (1, [[16, 17, 1]]),
        (2, [[1, 16, 1, 34]]),
        (2, [[31, 1, 15], [17, 29, 1]]),
    ],
    ids=str,
)
def test_documents(
    blocks: int, rows: list[list[int]], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one token, of a chunk, a token more and less, at both ends of a row, and over a row's end."""
    use(monkeypatch, blocks)
    doc_ids, n_docs = documents(*rows)
    inputs = draw(doc_ids.shape[1], n_docs, batch=len(rows))
    check(inputs, doc_ids, n_docs, device, chunk_size=16 * blocks)


@pytest.mark.parametrize(
    "packed,heads,groups,at_once",
    [(False, 4, 1, 3), (True, 4, 1, 3), (False, 4, 2, 2), (True, 4, 2, 2), (True, 2, 2, 1)],
)
def test_groups_and_runs_of_heads(
    packed: bool, heads: int, groups: int, at_once: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program takes one head, all of a group's, or three and one."""
    use(monkeypatch, 2, at_once)
    doc_ids, n_docs = documents([3, 17], [20]) if packed else (None, 2)
    inputs = draw(20, n_docs, batch=2, heads=heads, groups=groups)
    check(inputs, doc_ids, n_docs, device, chunk_size=32)


@pytest.mark.parametrize("blocks", [1, 2])
def test_sizes_that_are_no_power_of_two_and_tiles_smaller_than_a_state(
    blocks: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"walk": {"BP": 16, "BN": 16, "BK": 16}, "outputs": {"BP": 16}, "sources": {"BP": 16}}
    use(monkeypatch, blocks, through_states={"BN": 16}, **small)
    doc_ids, n_docs = documents([3, 30])
    check(draw(33, n_docs, P=20, N=24), doc_ids, n_docs, device, chunk_size=32)


@pytest.mark.parametrize("blocks", [1, 2])
def test_sums_over_more_channels_and_states_than_are_taken_at_once(
    blocks: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, blocks)
    check(draw(24, P=48, N=72, heads=1), None, 1, device, chunk_size=32)


def test_more_heads_than_a_program_takes_steps_of(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, 1, heads=18)
    check(draw(2, heads=18), None, 1, device, chunk_size=16)


def test_many_chunks_and_documents(device: torch.device) -> None:
    """More than a program takes at once: tokens, a document's chunks, documents, and chunks to sum."""
    doc_ids, n_docs = documents([2500, 1, 33], [17, 2517])
    chunks = triton_chunks.cut(2, 2534, 16, doc_ids.to(device), n_docs, torch.empty(0, device=device))
    expected = [
        [row * 2534 + at, min(16, end - at)]
        for row, start, end in spans(doc_ids)
        for at in range(start, end, 16)
    ]
    assert chunks.table[: len(expected)].tolist() == expected
    assert chunks.n == len(chunks.table) >= len(expected) and not chunks.table[len(expected) :, 1].any()
    starts = torch.tensor([0, 2500, 2501, 2534, 2551, 5068])
    assert chunks.docs[:, 0].tolist() == starts.tolist()
    for column, size in ((1, 16), (2, 64)):
        counts = -(-starts.diff() // size)
        assert chunks.docs[1:, column].tolist() == counts.cumsum(0).tolist()
    assert not chunks.docs[0].any()
    one_each = torch.arange(1100, dtype=torch.int32, device=device)[None]
    chunks = triton_chunks.cut(1, 1100, 16, one_each, 1100, torch.empty(0, device=device))
    assert torch.equal(chunks.docs, torch.arange(1101, device=device)[:, None].expand(-1, 3))
    values = torch.randn(2, 600, 10, generator=torch.Generator().manual_seed(1)).to(device)
    assert distance(ours._sum_chunks(values), values.double().sum(1)) < 1e-6


@pytest.mark.parametrize(
    "optional", [(), ("D",), ("dt_bias",), ("initial_state", "z"), ("D", "z", "dt_bias")], ids=str
)
def test_what_is_optional(optional: tuple[str, ...], device: torch.device) -> None:
    """Also a D for each channel, where there is one."""
    check(draw(5, 1, optional, wide_d="z" in optional), None, 1, device, chunk_size=16)


@pytest.mark.parametrize(
    "options",
    [
        {"dt_softplus": False},
        {"dt_softplus": False, "dt_limit": (0.1, 0.9)},
        {"dt_limit": (0.05, 0.4)},
        {"dt_limit": (0.3, None)},
    ],
    ids=str,
)
def test_step_sizes_and_their_limits(options: dict, device: torch.device) -> None:
    inputs = draw(12)
    inputs["dt"][0, 3:6] = 40.0
    if not options.get("dt_softplus", True) and "dt_limit" not in options:
        inputs["dt"] = inputs["dt"] % 1.5  # far from 0, where the limit has a corner
        inputs.pop("dt_bias")
    # Sums of log decays of up to 70 a step cost digits, the reference as well.
    check(inputs, None, 1, device, 1e-5, chunk_size=16, **options)


@pytest.mark.parametrize("used", [0, 1], ids=["y", "final state"])
def test_gradient_through_one_output_alone(used: int, device: torch.device) -> None:
    doc_ids, n_docs = documents([2, 14])
    inputs = rounded(draw(16, n_docs), device)

    def part(module, **leaves: Tensor) -> tuple[Tensor, ...]:
        return call(module, doc_ids, n_docs, chunk_size=16)(**leaves)[used : used + 1]

    found = pulled(partial(part, ours), inputs)
    truth = pulled(partial(part, reference), doubled(inputs))
    truth = {name: truth.get(name, torch.zeros_like(found[name])) for name in found}
    assert_all_close(found, truth, 2e-6)
    if used == 0:
        alone = pulled(call(ours, doc_ids, n_docs, final=False, chunk_size=16), inputs)
        assert all(torch.equal(alone[name], found[name]) for name in found)


def test_mixed_dtypes(device: torch.device) -> None:
    """Each gradient has its input's dtype."""
    inputs = rounded(draw(3), device) | {"x": draw(3)["x"].to(device, BF16)}
    inputs |= {name: inputs[name].to(dtype) for name, dtype in (("B", FP16), ("dt_bias", BF16), ("A", FP16))}
    found, truth = pulled(call(ours), inputs), pulled(call(reference), doubled(inputs))
    assert found["output 0"].dtype == BF16 and found["output 1"].dtype == FP32
    assert all(found[f"grad {name}"].dtype == t.dtype for name, t in inputs.items())
    assert_all_close(found, truth, 2e-2)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_views_of_a_wider_projection_are_read_in_place(
    packed: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As layers/mamba2.py cuts them, and bits no other than a copy's; then layouts that must be copied."""
    doc_ids, n_docs = documents([2, 3], [5]) if packed else (None, 2)
    inputs = rounded(draw(5, n_docs, ("D",), batch=2), device)
    run = call(ours, doc_ids, n_docs, chunk_size=16)
    truth = pulled(run, inputs)
    names = ("x", "B", "C", "dt")
    nan = torch.full((2, 5, 3), torch.nan, device=device)
    wide = torch.cat([nan, *(inputs[name].flatten(2) for name in names), nan], -1)
    sizes = [3, *(inputs[name][0, 0].numel() for name in names), 3]
    seen: list[Tensor] = []
    real = ours._tokens
    monkeypatch.setattr(ours, "_tokens", lambda t: seen.append(t) or real(t))

    def cut(wide: Tensor, A: Tensor, D: Tensor) -> tuple[Tensor, ...]:
        parts = wide.split(sizes, -1)[1:-1]
        views = {k: part.view(inputs[k].shape) for k, part in zip(names, parts, strict=True)}
        return run(**views, A=A, D=D)

    found = pulled(cut, {"wide": wide, "A": inputs["A"], "D": inputs["D"]})
    assert torch.equal(found["output 0"], truth["output 0"])
    assert torch.equal(found["output 1"], truth["output 1"])
    expected = torch.cat([truth[f"grad {name}"].flatten(2) for name in names], -1)
    assert torch.equal(found["grad wide"][..., 3:-3], expected)
    assert sum(not t.is_contiguous() for t in seen) >= 8 and all(real(t) is t for t in seen)
    turned = {
        k: t.transpose(0, 1).contiguous().transpose(0, 1) if k in names else t for k, t in inputs.items()
    }
    assert torch.equal(run(**turned)[0], truth["output 0"])


def test_expanded_gradients(device: torch.device) -> None:
    inputs = rounded(draw(3, optional=()), device)
    x = inputs["x"].requires_grad_()
    y, final = call(ours)(**inputs)
    (y.sum() + final.sum()).backward()
    summed, x.grad = x.grad, None
    torch.autograd.backward(call(ours)(**inputs), [torch.ones_like(y), torch.ones_like(final)])
    assert torch.equal(summed, x.grad)


@pytest.mark.parametrize("dtype,packed", [(BF16, False), (BF16, True), (FP16, True)], ids=str)
def test_16_bits_cost_little_more_than_rounded_operands(
    dtype: torch.dtype, packed: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, blocks=2)
    doc_ids, n_docs = documents([14, 33]) if packed else (None, 1)
    cases = [rounded(draw(47, n_docs), device, dtype)]
    strains = strain(cases, doc_ids, n_docs, chunk_size=32)
    assert max(strains.values()) <= 1, strains


VARIANTS = {
    "plain": (False, False),
    "documents": (True, False),
    "states": (False, True),
    "both": (True, True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 255, 257, 1000, 4096])
def test_every_length_and_dtype_on_a_gpu(length: int, variant: str, dtype: torch.dtype) -> None:
    packed, states = VARIANTS[variant]
    doc_ids, n_docs = cut_rows(2, length) if packed else (None, 2)
    optional = ALL if states else ("D", "dt_bias")
    sizes = {"batch": 2, "heads": 16, "groups": 2, "P": 64, "N": 128}
    cases = (
        rounded(draw(length, n_docs, optional, seed=seed, **sizes), CUDA, dtype)
        for seed in range(2 if length > 999 else 4 if length > 9 else 24)
    )
    strains = strain(cases, doc_ids, n_docs)
    assert max(strains.values()) <= 1, strains


SIZES = [(P, N, BF16) for P in (32, 64, 80, 128) for N in (16, 32, 64, 128, 256)]
SIZES += [
    (128, 128, FP32),
    (64, 256, FP32),
    (128, 256, FP32),
    (20, 24, FP32),
    (80, 96, BF16),
    (128, 256, FP16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("P,N,dtype", SIZES, ids=str)
def test_every_size_on_a_gpu(P: int, N: int, dtype: torch.dtype) -> None:
    doc_ids, n_docs = cut_rows(2, 300)
    sizes = {"batch": 2, "heads": 16, "groups": 2, "P": P, "N": N}
    strains = strain(
        (rounded(draw(300, n_docs, seed=i, **sizes), CUDA, dtype) for i in range(3)), doc_ids, n_docs
    )
    assert max(strains.values()) <= 1, strains


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("heads,groups", [(48, 1), (40, 1), (16, 2), (16, 8), (8, 8)])
def test_groups_on_a_gpu(heads: int, groups: int, dtype: torch.dtype) -> None:
    """40 chunks or more, so that the many heads of one group go to programs that take several."""
    sizes = {"batch": 2, "heads": heads, "groups": groups, "P": 64, "N": 128}
    strains = strain((rounded(draw(2600, 2, seed=i, **sizes), CUDA, dtype) for i in range(2)), None, 2)
    assert max(strains.values()) <= 1, strains


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [16, 32, 64])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_chunk_sizes_on_a_gpu(dtype: torch.dtype, chunk: int) -> None:
    doc_ids, n_docs = cut_rows(2, 300)
    sizes = {"batch": 2, "heads": 16, "P": 64, "N": 64}
    cases = (rounded(draw(300, n_docs, seed=i, **sizes), CUDA, dtype) for i in range(2))
    strains = strain(cases, doc_ids, n_docs, chunk_size=chunk)
    assert max(strains.values()) <= 1, strains


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_no_bias(dtype: torch.dtype) -> None:
    """Errors cancel: what truncates instead of rounding, or drops a term that is always positive, does not.

    The mean error is in tests/test_loss_compare_gpu.py, for all kernels. Here, much sharper, the error's
    projection on the truth, relative to the truth, has a mean of zero over draws, to four standard errors, or
    to a fiftieth of the error: squares of errors, which do not cancel, are far below. Matrix units cut the
    low bits of fp32 sums off where they add (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of
    NVIDIA tensor cores", 2021), for which four times fp32's epsilon is left.
    """
    least = 4 * torch.finfo(torch.float32).eps
    shares: dict[str, list[float]] = {}
    sizes = {"batch": 2, "heads": 8, "P": 64, "N": 64}
    errors: dict[str, float] = {}
    for seed in range(24):
        inputs = rounded(draw(300, 2, seed=seed, **sizes), CUDA, dtype)
        found = pulled(call(ours, None, 2), inputs, dtype, seed=seed)
        truth = pulled(call(reference, None, 2), doubled(inputs), dtype, seed=seed)
        for name, exact in truth.items():
            gap = found[name].double() - exact
            shares.setdefault(name, []).append(float((gap * exact).sum() / exact.norm() ** 2))
            errors[name] = max(errors.get(name, 0.0), distance(found[name], exact))
    biased = {}
    for name, values in shares.items():
        mean, deviation = torch.tensor(values).mean().item(), torch.tensor(values).std().item()
        if abs(mean) > max(4 * deviation / len(values) ** 0.5, errors[name] / 50, least):
            biased[name] = (mean, deviation, errors[name])
    assert not biased, biased
