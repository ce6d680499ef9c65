"""RMSNorm as layers: which dtype comes out, under autocast and without, and the stream beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmtrain.layers.norm import RMSNorm, Stream, StreamNorm

BF16 = torch.bfloat16


def make(kind: type[RMSNorm] | type[StreamNorm], keep_fp32: bool = False) -> RMSNorm | StreamNorm:
    """A norm of 16 channels whose weight is not one."""
    norm = kind(16, keep_fp32=keep_fp32)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0, generator=torch.Generator().manual_seed(0))
    return norm


def draw(seed: int = 1) -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed))


def formula(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16, torch.float16])
def test_without_autocast_the_dtype_stays(dtype: torch.dtype) -> None:
    x, norm, stream_norm = draw().to(dtype), make(RMSNorm), make(StreamNorm)
    y, (stream, n) = norm(x), stream_norm(Stream(x))
    assert y.dtype == n.dtype == dtype and torch.equal(y, n) and torch.equal(stream, x)
    eps = max(torch.finfo(dtype).eps, 1e-7)
    torch.testing.assert_close(
        y.double(), formula(x.double(), norm.weight.double()), rtol=2 * eps, atol=2 * eps
    )


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_autocast_rounds_an_fp32_stream_once(dtype: torch.dtype) -> None:
    x, norm, stream_norm = draw(), make(RMSNorm), make(StreamNorm)
    plain = norm(x)
    with torch.autocast("cpu", dtype):
        y, (stream, n) = norm(x), stream_norm(Stream(x))
        kept, (_, kept_n) = make(RMSNorm, keep_fp32=True)(x), make(StreamNorm, keep_fp32=True)(Stream(x))
        wide = norm(x.double())
    assert y.dtype == n.dtype == dtype and stream.dtype == torch.float32
    assert torch.equal(y, plain.to(dtype)) and torch.equal(n, y)
    assert torch.equal(kept, plain) and torch.equal(kept_n, plain)
    assert wide.dtype == torch.float64


def test_another_low_dtype_is_left_as_it_is() -> None:
    with torch.autocast("cpu", BF16):
        assert make(RMSNorm)(draw().half()).dtype == torch.float16


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_stream_and_norm(autocast: bool) -> None:
    norm, x = make(StreamNorm), draw().requires_grad_()
    dx, dn = draw(2), draw(3).to(BF16)
    with torch.autocast("cpu", BF16, enabled=autocast):
        stream, n = norm(Stream(x))
        torch.autograd.backward([stream, n], [dx, dn.to(n.dtype)])
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    torch.autograd.backward([wide, formula(wide, weight)], [dx.double(), dn.double()])
    assert x.grad.dtype == norm.weight.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)


def test_a_branch_is_scaled_and_added_before_the_norm() -> None:
    x, branch = draw().requires_grad_(), draw(4).to(BF16).requires_grad_()
    norm = StreamNorm(x.shape[-1], scale=0.25)
    torch.nn.init.constant_(norm.weight, 1.0)
    with torch.autocast("cpu", BF16):
        stream, n = norm(Stream(x, branch))
    total = x.detach() + 0.25 * branch.detach().float()
    assert n.dtype == BF16 and torch.equal(stream, total)
    assert torch.equal(stream, Stream(x, branch).total(0.25)) and torch.equal(Stream(x).total(0.25), x)
    torch.testing.assert_close(n.double(), formula(total.double(), norm.weight.double()), rtol=4e-3, atol=0)
    (stream * draw(2)).sum().backward()
    assert torch.equal(x.grad, draw(2)) and torch.equal(branch.grad, (0.25 * draw(2)).to(BF16))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_as_eager(autocast: bool) -> None:
    norm, x = make(StreamNorm), draw()
    torch._dynamo.reset()
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", BF16, enabled=autocast):
        for found, expected in zip(compiled(Stream(x)), norm(Stream(x)), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected)
