"""Linear under autocast: autocast's output, and a weight's gradient that is not rounded to 16 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssmtrain.layers import linear
from ssmtrain.layers.linear import Linear

BF16 = torch.bfloat16


def build(bias: bool, device: str) -> tuple[Linear, torch.Tensor, torch.Tensor]:
    """A layer, an input, and a gradient of its output."""
    torch.manual_seed(0)
    layer = Linear(24, 40, bias=bias)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x, dy = torch.randn(3, 50, 24), torch.randn(3, 50, 40).to(BF16)
    return layer.to(device), x.to(device).requires_grad_(), dy.to(device)


def check(bias: bool, dtype: torch.dtype, device: str) -> None:
    """Hold output and gradients against autocast's own, and the weight's against float64."""
    layer, x, dy = build(bias, device)
    x = x.detach().to(dtype).requires_grad_()
    with torch.autocast(device, BF16):
        y = layer(x)
        plain = F.linear(x, layer.weight, layer.bias)
    assert y.dtype == BF16 and torch.equal(y, plain)
    wanted = [x, *layer.parameters()]
    found = torch.autograd.grad(y, wanted, dy)
    theirs = torch.autograd.grad(plain, wanted, dy)
    assert [g.dtype for g in found] == [g.dtype for g in theirs]
    assert torch.equal(found[0], theirs[0])
    rows, inputs = dy.double().flatten(0, 1), x.detach().to(BF16).double().flatten(0, 1)
    exact = [rows.t() @ inputs, rows.sum(0)]
    for ours, other, truth in zip(found[1:], theirs[1:], exact, strict=False):
        error, before = ((g.double() - truth).norm() / truth.norm() for g in (ours, other))
        assert error < 2e-3 and error < 1.1 * before
        if device == "cuda":
            assert error < 1e-6 < before


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_under_autocast(bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, which has no product of that kind, the gradient is the rounded one."""
    monkeypatch.setattr(linear, "DEVICES", {"cpu"})
    check(bias, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_under_autocast_on_a_gpu(bias: bool) -> None:
    check(bias, torch.float32, "cuda")


def test_elsewhere_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without autocast, without gradients, with a weight that is not fp32, or frozen."""
    monkeypatch.setattr(linear, "DEVICES", {"cpu"})
    layer, x, _ = build(True, "cpu")

    def node(y: torch.Tensor) -> str:
        return type(y.grad_fn).__name__

    assert "_Mixed" not in node(layer(x))
    with torch.autocast("cpu", BF16):
        assert "_Mixed" in node(layer(x))
        with torch.no_grad():
            assert layer(x).dtype == BF16
        layer.weight.requires_grad_(False)
        assert "_Mixed" not in node(layer(x))
        layer.weight.requires_grad_(True)
        layer.bfloat16()
        assert "_Mixed" not in node(layer(x))


class Doubled(torch.autograd.Function):
    """2x, with a gradient of its own, whose address is kept."""

    at = 0

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        made = 2 * grad
        Doubled.at = made.data_ptr()
        return made


def check_beside(bias: bool, device: str) -> None:
    """Both readers' gradients, summed in one product where the other's lie, and rounded once."""
    layer, x, dy = build(bias, device)
    x, du = x.detach().to(BF16).requires_grad_(), torch.randn(x.shape).to(BF16).to(device)
    wanted, seen = [x, *layer.parameters()], []
    x.register_hook(lambda grad: seen.append(grad.data_ptr()))

    def gradients(beside: bool) -> list[torch.Tensor]:
        with torch.autocast(device, BF16):
            u, y = layer.beside(x) if beside else (x, layer(x))
        return list(torch.autograd.grad([Doubled.apply(u), y], wanted, [du, dy]))

    plain, found = gradients(False), gradients(True)
    assert seen[1] == Doubled.at
    truth = 2 * du.double() + dy.double() @ layer.weight.detach().to(BF16).double()
    errors = [float((g[0].double() - truth).norm() / truth.norm()) for g in (plain, found)]
    assert errors[1] <= errors[0] and errors[1] < 3e-3
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], found[1:], strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_beside(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "DEVICES", {"cpu"})
    check_beside(bias, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_beside_on_a_gpu(bias: bool) -> None:
    check_beside(bias, "cuda")


def test_beside_what_cannot_be_added_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number read everywhere, another dtype, nothing on either side; and without autocast."""
    monkeypatch.setattr(linear, "DEVICES", {"cpu"})
    layer, x, dy = build(False, "cpu")
    with torch.autocast("cpu", BF16):
        low = x.detach().to(BF16).requires_grad_()
        for leaf, other in ((low, lambda u: u.sum()), (x, lambda u: (u * u).sum()), (x, None)):
            plain, found = leaf, layer.beside(leaf)
            sides = [(y.float() * dy).sum() for y in (layer(plain), found[1])]
            if other is not None:
                sides = [side + other(u).float() for side, u in zip(sides, (plain, found[0]), strict=True)]
            expected, ours = (torch.autograd.grad(side, leaf)[0] for side in sides)
            assert ours.dtype == leaf.dtype
            torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)
        u, _ = layer.beside(x)
        assert torch.equal(torch.autograd.grad((u * dy[..., :24]).sum(), x)[0], dy[..., :24].float())
    assert layer.beside(x)[0] is x
