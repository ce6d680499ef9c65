"""Grouped matrix products against one product per expert, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cases import assert_all_close, distance, outputs_and_grads
from ssmtrain.kernels.grouped_gemm import grouped_gemm

COUNTS = [[4, 0, 6], [0, 0, 10], [10, 0, 0], [3, 3, 4], [0, 0, 0]]


def make_inputs(counts: list[int], d_in: int = 5, d_out: int = 7) -> dict[str, Tensor]:
    """Random float64 rows and weights."""
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(sum(counts), d_in, generator=generator, dtype=torch.float64),
        "weight": torch.randn(len(counts), d_out, d_in, generator=generator, dtype=torch.float64),
    }


def row_by_row(leaves: dict[str, Tensor], counts: list[int]) -> tuple[Tensor, ...]:
    """Multiply every row by a copy of its expert's weight."""
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return (torch.einsum("td,tfd->tf", leaves["x"], leaves["weight"][expert]),)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_matches_a_product_per_row(counts: list[int], dtype: torch.dtype) -> None:
    inputs = make_inputs(counts)
    sizes = torch.tensor(counts, dtype=dtype)
    ours = outputs_and_grads(lambda leaves: (grouped_gemm(**leaves, counts=sizes),), inputs)
    truth = outputs_and_grads(lambda leaves: row_by_row(leaves, counts), inputs)
    assert all(value.dtype == torch.float64 for value in ours.values())
    assert_all_close(ours, truth, 1e-14)
    for expert, count in enumerate(counts):
        assert count or not ours["grad weight"][expert].any()


def test_strides_do_not_matter() -> None:
    counts = [3, 0, 7]
    inputs = make_inputs(counts)
    sizes = torch.tensor(counts)
    truth = outputs_and_grads(lambda leaves: row_by_row(leaves, counts), inputs)

    def turned(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        x = leaves["x"].t().contiguous().t()
        weight = leaves["weight"].transpose(1, 2).contiguous().transpose(1, 2)
        return (grouped_gemm(x, weight, sizes).t().contiguous().t(),)

    assert_all_close(outputs_and_grads(turned, inputs), truth, 1e-14)


def test_only_the_gradients_that_are_wanted() -> None:
    counts = torch.tensor([4, 0, 6])
    inputs = make_inputs(counts.tolist())
    for name, tensor in inputs.items():
        leaf = tensor.clone().requires_grad_()
        grouped_gemm(**{**inputs, name: leaf}, counts=counts).square().sum().backward()
        both = {key: value.clone().requires_grad_() for key, value in inputs.items()}
        grouped_gemm(**both, counts=counts).square().sum().backward()
        assert leaf.grad is not None and torch.equal(leaf.grad, both[name].grad)


def test_autocast_multiplies_in_bf16() -> None:
    counts = [4, 0, 6]
    inputs = {name: tensor.float() for name, tensor in make_inputs(counts).items()}
    truth = outputs_and_grads(lambda leaves: row_by_row(leaves, counts), inputs)

    def cast(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return (grouped_gemm(**leaves, counts=torch.tensor(counts)),)

    ours = outputs_and_grads(cast, inputs)
    assert ours["output 0"].dtype == torch.bfloat16 and ours["grad weight"].dtype == torch.float32
    assert all(1e-6 < distance(ours[name], truth[name]) < 1e-2 for name in truth)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[17, 0, 300, 1, 94], [0, 0, 5, 0, 0], [128, 128, 128, 64, 64]])
@pytest.mark.parametrize("d_in,d_out", [(64, 128), (72, 40), (30, 50)])
def test_the_gpu_agrees_in_bf16_and_fp32(counts: list[int], d_in: int, d_out: int) -> None:
    inputs = make_inputs(counts, d_in, d_out)
    sizes = torch.tensor(counts, device="cuda")
    for dtype, tolerance in ((torch.bfloat16, 5e-3), (torch.float32, 1e-6)):
        narrow = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        truth = outputs_and_grads(
            lambda leaves: row_by_row(leaves, counts), {name: t.double() for name, t in narrow.items()}
        )
        ours = outputs_and_grads(
            lambda leaves: (grouped_gemm(leaves["x"].cuda(), leaves["weight"].cuda(), sizes).cpu(),), narrow
        )
        assert_all_close(ours, truth, tolerance)
