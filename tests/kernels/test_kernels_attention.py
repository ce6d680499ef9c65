"""Attention against the query-by-query oracle, its masks, and the GPU path against the dense one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels.cases import cut_rows, distance, outputs_and_grads
from kernels.oracle_attention import attention_oracle, make_inputs
from ssmtrain.kernels.attention import attention, attention_mask
from ssmtrain.kernels.attention.flex import BLOCK, block_mask, to_dense
from ssmtrain.kernels.attention.masks import dense_mask


def both(
    inputs: dict[str, Tensor], dtype: torch.dtype = torch.float64, **options
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the kernel, at the dtype, and of the oracle."""
    truth = outputs_and_grads(lambda leaves: (attention_oracle(**leaves, **options),), inputs)
    narrow = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    return outputs_and_grads(lambda leaves: (attention(**leaves, **options),), narrow), truth


def assert_near(ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """Assert each value within the tolerance of the truth, relative to it or, where it is small, to 1.

    A token that sees one key has no gradient on its scores: there the truth itself is rounding.
    """
    assert ours.keys() == truth.keys()
    far = {name: (ours[name].double() - truth[name]).norm() / (truth[name].norm() + 1) for name in truth}
    wrong = {name: float(gap) for name, gap in far.items() if not gap <= tolerance}
    assert not wrong, f"distance over {tolerance}: {wrong}"


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 33, 64, 65])
def test_plain_causal_attention(length: int, kv_heads: int) -> None:
    inputs = make_inputs(length, length, kv_heads=kv_heads)
    ours, truth = both(inputs)
    assert ours["output 0"].dtype == torch.float64 and ours["output 0"].shape == inputs["q"].shape
    assert_near(ours, truth, 1e-12)
    ours, _ = both(inputs, torch.float32)
    assert_near(ours, truth, 2e-6)


@pytest.mark.parametrize("window,packed", itertools.product([None, 1, 5, 37, 100], [False, True]))
def test_windows_and_documents(window: int | None, packed: bool) -> None:
    doc_ids, _ = cut_rows(2, 41) if packed else (None, 2)
    inputs = make_inputs(41, 41)
    ours, truth = both(inputs, window=window, doc_ids=doc_ids)
    assert_near(ours, truth, 1e-12)


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_the_scale_and_both_directions(scale: float) -> None:
    doc_ids, _ = cut_rows(2, 19)
    for causal, window, ids in itertools.product([True, False], [None, 4], [None, doc_ids]):
        ours, truth = both(make_inputs(19, 19), scale=scale, causal=causal, window=window, doc_ids=ids)
        assert_near(ours, truth, 1e-12)


@pytest.mark.parametrize(
    "length,n_keys,offset", [(1, 30, 29), (1, 30, 12), (1, 1, 0), (7, 30, 23), (7, 30, 4)]
)
@pytest.mark.parametrize("window", [None, 3, 12])
@pytest.mark.parametrize("packed", [False, True])
def test_queries_against_a_cache(
    length: int, n_keys: int, offset: int, window: int | None, packed: bool
) -> None:
    doc_ids = cut_rows(2, n_keys)[0] if packed else None
    ours, truth = both(make_inputs(length, n_keys), window=window, q_offset=offset, doc_ids=doc_ids)
    assert_near(ours, truth, 1e-12)


def test_a_mask_made_once_is_used() -> None:
    doc_ids, _ = cut_rows(2, 41)
    inputs = make_inputs(41, 41)
    mask = attention_mask(doc_ids, 9, 41, 41)
    given = attention(**inputs, window=9, doc_ids=doc_ids, mask=mask)
    assert torch.equal(given, attention(**inputs, window=9, doc_ids=doc_ids))
    # The mask alone decides.
    assert torch.equal(given, attention(**inputs, mask=mask))


def test_no_mask_where_none_is_needed() -> None:
    assert attention_mask(None, None, 10, 10) is None
    assert attention_mask(None, 10, 10, 10) is None
    assert attention_mask(None, None, 4, 10, 3, causal=False) is None
    for made in (attention_mask(None, 9, 10, 10), attention_mask(None, None, 4, 10, 6)):
        assert isinstance(made, Tensor) and made.dtype == torch.bool and made.shape[:2] == (1, 1)


@pytest.mark.parametrize("offset,n_docs_shape", [(7, (2, 10)), (-1, (2, 10)), (0, (2, 9))])
def test_queries_and_documents_must_fit_the_keys(offset: int, n_docs_shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="keys"):
        attention_mask(torch.zeros(n_docs_shape, dtype=torch.int32), None, 4, 10, offset)


def test_the_future_and_other_documents_change_nothing() -> None:
    inputs = {name: tensor.float() for name, tensor in make_inputs(60, 60).items()}
    doc_ids = torch.tensor([[0] * 25 + [1] * 35, [2] * 60])
    before = attention(**inputs, doc_ids=doc_ids)
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    for name in ("k", "v"):
        changed[name][0, :25] += 1.0
        changed[name][1, 40:] += 1.0
    after = attention(**changed, doc_ids=doc_ids)
    assert torch.equal(before[0, 25:], after[0, 25:]) and torch.equal(before[1, :40], after[1, :40])
    assert not torch.equal(before[0, :25], after[0, :25]) and not torch.equal(before[1, 40:], after[1, 40:])


def test_projections_of_one_tensor_and_autocast() -> None:
    inputs = make_inputs(40, 40, kv_heads=4)
    joint = torch.cat(list(inputs.values()), dim=-1)
    views = dict(zip(inputs, joint.split(8, dim=-1), strict=True))
    assert torch.equal(attention(**views), attention(**inputs))
    with torch.autocast("cpu", torch.bfloat16):
        half = attention(**{name: tensor.float() for name, tensor in inputs.items()})
    assert half.dtype == torch.bfloat16 and distance(half, attention(**inputs)) < 1e-2


BLOCK_CASES = [
    (length, n_keys, offset, window, packed, causal)
    for length, n_keys, offset in [
        (300, 300, 0),
        (512, 512, 0),
        (1, 300, 299),
        (130, 400, 270),
        (90, 600, 200),
    ]
    for window in (None, 1, 100, 129, 256)
    for packed in (False, True)
    for causal in (True, False)
]


@pytest.mark.parametrize("length,n_keys,offset,window,packed,causal", BLOCK_CASES)
def test_block_masks_are_the_dense_masks(
    length: int, n_keys: int, offset: int, window: int | None, packed: bool, causal: bool
) -> None:
    """What FlexAttention will skip, take whole and look into, against the dense mask cut into blocks."""
    doc_ids = cut_rows(2, n_keys, seed=window or 0)[0] if packed else None
    case = (doc_ids, window, length, n_keys, offset, causal, torch.device("cpu"))
    dense, blocks = dense_mask(*case), block_mask(*case)
    assert torch.equal(to_dense(blocks), dense)
    pad = (0, -n_keys % BLOCK, 0, -length % BLOCK)
    cells = torch.nn.functional.pad(dense, pad)[:, 0].unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    some, whole = cells.any(4).any(2), cells.all(4).all(2)  # (B, nq, nk)
    partial = listed(blocks.kv_num_blocks, blocks.kv_indices)
    full = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not (partial & full).any()
    assert torch.equal(partial | full, some)
    assert torch.equal(full, whole)


def listed(counts: Tensor | None, indices: Tensor | None) -> Tensor:
    """The blocks (B, nq, nk) that are among the first `counts` of `indices`."""
    assert counts is not None and indices is not None
    kept = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros(indices.shape, dtype=torch.bool).scatter_(-1, indices.long(), kept)[:, 0]


# Each case compiles kernels of its own: few, and each for a reason.
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
GPU_CASES = [
    (BF16, 4, 2, 64, 1000, 1000, 0, None, True),
    (BF16, 4, 2, 64, 1000, 1000, 0, 200, True),
    (BF16, 4, 2, 64, 1024, 1024, 0, None, False),
    (BF16, 4, 2, 64, 257, 700, 443, 100, True),
    (BF16, 4, 2, 64, 65, 65, 0, None, True),
    (BF16, 6, 6, 80, 1000, 1000, 0, 200, True),
    (FP32, 4, 2, 64, 1000, 1000, 0, 200, True),
    (FP32, 4, 2, 64, 257, 700, 443, None, False),
    (FP64, 4, 2, 64, 1000, 1000, 0, 200, True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,heads,kv_heads,dim,length,n_keys,offset,window,packed", GPU_CASES)
def test_the_gpu_agrees_with_dense_attention(
    heads: int,
    kv_heads: int,
    dim: int,
    length: int,
    n_keys: int,
    offset: int,
    window: int | None,
    packed: bool,
    dtype: torch.dtype,
) -> None:
    """Outputs and gradients against dense float64 attention; bf16 at most twice as far as dense bf16."""
    doc_ids = cut_rows(2, n_keys)[0] if packed else None
    inputs = make_inputs(length, n_keys, heads=heads, kv_heads=kv_heads, dim=dim)
    ids = None if doc_ids is None else doc_ids.cuda()
    mask = attention_mask(ids, window, length, n_keys, offset, device="cuda")
    dense = dense_mask(doc_ids, window, length, n_keys, offset, True, torch.device("cpu"))

    def ours(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        cuda = {name: tensor.cuda() for name, tensor in leaves.items()}
        return (attention(**cuda, mask=mask, window=window, doc_ids=ids, q_offset=offset).cpu(),)

    def plain(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        q, k, v = (leaves[name].transpose(1, 2) for name in ("q", "k", "v"))
        k, v = (tensor.repeat_interleave(heads // kv_heads, 1) for tensor in (k, v))
        scores = (q @ k.transpose(2, 3) * dim**-0.5).masked_fill(~dense, float("-inf"))
        return ((scores.softmax(-1) @ v).transpose(1, 2),)

    narrow = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    truth = outputs_and_grads(plain, {name: tensor.double() for name, tensor in narrow.items()})
    same = outputs_and_grads(plain, narrow)
    found = outputs_and_grads(ours, narrow)
    limit = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    assert_near(found, truth, limit)
    if dtype == torch.bfloat16:
        for name in found:
            assert distance(found[name], truth[name]) <= 2 * distance(same[name], truth[name]), name


@pytest.mark.gpu
def test_the_gpu_runs_packed_documents_under_autocast_in_little_memory() -> None:
    """8 heads over 16,384 packed tokens: their scores would take 4 GB in bf16."""
    length = 16384
    doc_ids = (torch.arange(length, device="cuda") // 3000).int().unsqueeze(0)
    q, k, v = (torch.randn(1, length, h, 64, device="cuda", requires_grad=True) for h in (8, 2, 2))
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        y = attention(q, k, v, doc_ids=doc_ids, window=1024)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and q.grad is not None and q.grad.isfinite().all()
    assert torch.cuda.max_memory_allocated() < 2**30


@pytest.mark.gpu
def test_the_gpu_takes_new_documents_each_step_without_compiling_again() -> None:
    from ssmtrain.kernels.attention import flex

    q, k, v = (torch.randn(2, 512, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    attention(q, k, v, doc_ids=cut_rows(2, 512, 0)[0].cuda())
    assert flex._compiled.cache_info().misses == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(1, 4):
            y = attention(q, k, v, doc_ids=cut_rows(2, 512, seed)[0].cuda())
    assert y.isfinite().all()
