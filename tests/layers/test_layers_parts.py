"""Gradients that are written where the whole's gradient will be: the same numbers, without a copy."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.triton.gluon_shim import on_cpu
from kernels.triton.shim import repaired
from ssmtrain.kernels import backend, parts, tuned
from ssmtrain.layers.base import Context
from ssmtrain.layers.mamba1 import Mamba1Config
from ssmtrain.layers.mamba2 import Mamba2Config
from ssmtrain.parallel.recompute import forgetful, recomputed

MIXERS = {
    "mamba1": Mamba1Config(d_state=4),
    "mamba2": Mamba2Config(d_state=16, head_dim=16),
    "mamba2, a group for each head": Mamba2Config(d_state=16, head_dim=16, n_groups=2),
    "mamba2, gate last": Mamba2Config(d_state=16, head_dim=16, norm_before_gate=True),
}


class Written(torch.autograd.Function):
    """x, and a gradient that is written where it belongs, when somebody claims that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.place = parts.place_of(x)
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if ctx.place is None else ctx.place.room().copy_(grad)


def whole(*sizes: int) -> Tensor:
    """A leaf with as many columns as all parts."""
    torch.manual_seed(0)
    return torch.randn(2, 3, sum(sizes), requires_grad=True)


def test_parts_are_a_split() -> None:
    """Read by ops that know nothing of it, once, twice, or not at all."""
    x = whole(2, 3, 4)
    for cut in (lambda t: parts.parts(t, [(2,), (3,), (4,)]), lambda t: t.split([2, 3, 4], dim=-1)):
        a, b, c = cut(x * 1.0)
        assert (a.shape, b.shape, c.shape) == ((2, 3, 2), (2, 3, 3), (2, 3, 4))
        x.grad, before = None, x.grad
        ((a * 2).sum() + (c.square() * c).sum()).backward()
    assert before is not None and torch.equal(x.grad, before)
    assert before[..., 2:5].abs().max() == 0


def test_parts_of_heads() -> None:
    """Cut in the shapes that an op reads, and a gradient with its place among them is not copied."""
    x = whole(2, 6, 4)
    a, b, c = parts.parts(x * 1.0, [(2,), (3, 2), (1, 4)])
    assert (a.shape, b.shape, c.shape) == ((2, 3, 2), (2, 3, 3, 2), (2, 3, 1, 4))
    room = parts.place_of(b).room()
    assert room.shape == b.shape and room.stride() == (36, 12, 2, 1)
    (a.square().sum() + Written.apply(b).square().sum() + (c * 3).sum()).backward()
    expected = torch.cat([2 * x.detach()[..., :8], torch.full((2, 3, 4), 3.0)], -1)
    assert torch.equal(x.grad, expected)


def test_a_claimed_place_costs_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    x = whole(2, 3)
    y = x * 1.0
    received: list[Tensor] = []
    y.register_hook(received.append)
    a, b = parts.parts(y, [(2,), (3,)])
    loss = (Written.apply(a) * 2).sum() + Written.apply(b).square().sum()
    copies: list[int] = []
    real = Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda *tensors: copies.append(1) or real(*tensors))
    loss.backward()
    assert len(copies) == 2  # those of Written
    assert torch.equal(received[0], torch.cat([torch.full((2, 3, 2), 2.0), 2 * b.detach()], -1))


def test_two_readers_of_a_part() -> None:
    """Each writes in memory of its own, and both are added."""
    x = whole(2, 3)
    a, b = parts.parts(x * 1.0, [(2,), (3,)])
    (Written.apply(a).sum() + (Written.apply(a) * 3).sum() + b.sum()).backward()
    assert torch.equal(x.grad, torch.tensor([4.0, 4, 1, 1, 1]).expand(2, 3, 5))


def test_a_second_pass_has_memory_of_its_own() -> None:
    """Also when the first ended at a part, and its result is still in use."""
    x = whole(2, 3)
    a, b = parts.parts(x * 1.0, [(2,), (3,)])
    out = Written.apply(a)
    loss = (out * out).sum() + Written.apply(b).sum()
    (first,) = torch.autograd.grad(loss, a, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(3 * loss, x, retain_graph=True)
    (third,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, kept) and torch.equal(second[..., :2], 3 * kept)
    assert torch.equal(3 * third, second)


def test_without_gradients_and_under_a_compiler_it_is_a_split() -> None:
    x = whole(2, 3)
    with torch.no_grad():
        assert parts.place_of(parts.parts(x, [(2,), (3,)])[0]) is None
    assert parts.place_of(parts.parts(x.detach(), [(2,), (3,)])[0]) is None
    compiled = torch.compile(lambda t: parts.parts(t, [(2,), (3,)])[1] * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x[..., 2:] * 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not tuned.interpreting(), reason="the gpu test of the models runs them compiled")
@pytest.mark.parametrize("lanes", [False, True], ids=["plain", "gluon"])
@pytest.mark.parametrize("name", MIXERS)
def test_mixers(name: str, lanes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the Triton kernels: to the bit as with torch.split, and the large gradients are not copied."""
    if lanes and name != "mamba1":
        pytest.skip("no Gluon kernels for the CPU")
    ops = {op: "triton" if backend.has_triton(op) else "reference" for op in backend.op_names()}
    monkeypatch.setattr(backend, "_current", backend.Backend("auto", "cpu", ops, "a test"))
    torch.manual_seed(0)
    mixer = MIXERS[name].build(16)
    for p in mixer.parameters():
        torch.nn.init.uniform_(p, -0.5, 0.5)
    x = torch.randn(1, 20, 16)
    module = "ssmtrain.layers." + name.split(",")[0]
    rooms: list[int] = []
    real = parts.Place.room
    monkeypatch.setattr(parts.Place, "room", lambda self: rooms.append(self.index) or real(self))
    found = []
    with ExitStack() as stack:
        stack.enter_context(repaired())
        if lanes:
            n16 = pytest.importorskip("ssmtrain.kernels.selective_scan.triton_n16")
            back = pytest.importorskip("ssmtrain.kernels.selective_scan.triton_n16_backward")
            monkeypatch.setattr(tuned, "architecture", lambda device: "sm_90")
            stack.enter_context(on_cpu(n16, n16.forward, back.backward))
        for cut, wrap in ((None, forgetful), (None, recomputed), (parts.cut, forgetful)):
            if cut is not None:
                monkeypatch.setattr(f"{module}.parts", cut)
            mixer.zero_grad()
            y = wrap(mixer.forward)(x, Context())[0]
            y.square().sum().backward()
            found.append([y.detach(), *(p.grad for p in mixer.parameters())])
    # x and z, or z and xBC of the projection, then x, B and C of the convolution; forgotten and recomputed.
    expected = [0, 1] if name == "mamba1" else [0, 1, 0, 1, 2]
    assert sorted(rooms) == sorted(2 * expected), rooms
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(tuned.interpreting(), reason="for compiled kernels; TRITON_INTERPRET=1 is set")
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, with what is cheap forgotten: to the bit as with torch.split and everything kept."""
    monkeypatch.setattr(backend, "_current", None)
    torch.manual_seed(0)
    mixer = MIXERS[name].build(256).cuda()
    for p in mixer.parameters():
        torch.nn.init.uniform_(p, -0.05, 0.05)
    x, dy = torch.randn(2, 4, 700, 256, device="cuda").bfloat16()
    found = []
    for cut, wrap in ((parts.parts, forgetful), (parts.cut, lambda f: f)):
        monkeypatch.setattr("ssmtrain.layers." + name.split(",")[0] + ".parts", cut)
        mixer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            y = wrap(mixer.forward)(x, Context())[0]
        y.backward(dy)
        found.append([y.detach(), *(p.grad for p in mixer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(g.isfinite().all() for g in found[0])
