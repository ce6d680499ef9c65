"""The Triton AdamW against float64 and the torch reference: sizes, where addresses end, copies, norms."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.cases import distance
from kernels.triton import shim
from ssmtrain.kernels import backend
from ssmtrain.kernels.adamw import Moved, Rates, adamw, fits, norm, prepare, reference
from ssmtrain.kernels.adamw import triton as ours

SIZES = (1, 3, 4, 511, 512, 513, 2047, 2048, 2049, 4096, 5000)
"""Around a block and a span."""
RATES = Rates(1e-3, (0.9, 0.95), 1e-8, 0.1, 3, 0.37)
FIELDS = ("parameter", "exp_avg", "exp_avg_sq")


@pytest.fixture(autouse=True)
def triton(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_current", None)
    backend.configure("triton", device.type)


def draw(n: int, device: torch.device, low: torch.dtype | None = torch.bfloat16, offset: int = 0) -> Moved:
    """Random tensors of n numbers inside others, `offset` numbers from where memory was given; beside them
    is NaN."""
    generator = torch.Generator().manual_seed(n)

    def held(values: Tensor) -> Tensor:
        room = torch.full((n + offset + 70,), float("nan"), dtype=values.dtype, device=device)
        return room[offset : offset + n].copy_(values)

    p, g, m = (torch.randn(n, generator=generator) for _ in range(3))
    v = torch.rand(n, generator=generator)
    copy = None if low is None else held(torch.full((n,), float("nan"), dtype=low))
    return Moved(held(p), held(g), held(m), held(v), copy)


def run(moved: list[Moved], rates: Rates) -> None:
    """A step of these alone."""
    with reach(moved):
        adamw(prepare(moved), rates)


def reach(moved: list[Moved]) -> AbstractContextManager[None]:
    """Let a kernel find what a table names."""
    return shim.reachable(t for one in moved for t in vars(one).values() if t is not None)


def clone(one: Moved, dtype: torch.dtype = torch.float32) -> Moved:
    p, g, m, v = (t.to(dtype, copy=True) for t in (one.parameter, one.grad, one.exp_avg, one.exp_avg_sq))
    return Moved(p, g, m, v)


def around(one: Moved) -> list[Tensor]:
    """All memory that an op may not touch."""
    tensors = [t for t in (one.parameter, one.exp_avg, one.exp_avg_sq, one.copy) if t is not None]
    return [
        torch.cat([t._base[: t.storage_offset()], t._base[t.storage_offset() + t.numel() :]])  # type: ignore[index]
        for t in tensors
    ]


@pytest.mark.parametrize("rates", [RATES, replace(RATES, step=1, scale=1.0, weight_decay=0.0)], ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
def test_against_float64(offset: int, rates: Rates, device: torch.device) -> None:
    """All sizes in one launch: at most twice the reference's error, and nothing else is written."""
    lows = (torch.bfloat16, None)
    moved = [draw(n, device, lows[i % 2], offset) for i, n in enumerate(SIZES)]
    plain, exact = [clone(one) for one in moved], [clone(one, torch.float64) for one in moved]
    prepared = prepare(moved)
    assert prepared.table is not None and prepared.table.aligned == (offset == 0)
    run(moved, rates)
    reference.adamw(plain, rates)
    reference.adamw(exact, rates)
    for field in FIELDS:
        found, near, truth = (
            torch.cat([getattr(one, field) for one in some]) for some in (moved, plain, exact)
        )
        assert distance(found, truth) < 2 * distance(near, truth) < 1e-6, field
    for one in moved:
        assert all(t.isnan().all() for t in around(one))
        if one.copy is not None:
            assert torch.equal(one.copy, one.parameter.to(torch.bfloat16))


def test_many_steps_are_those_of_torch(device: torch.device) -> None:
    """Twenty steps with another gradient each, against torch.optim.AdamW in float64."""
    one = draw(700, device, torch.float16)
    one.exp_avg.zero_()
    one.exp_avg_sq.zero_()
    p = torch.nn.Parameter(one.parameter.double())
    theirs = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 21):
        one.grad.copy_(torch.randn(700, generator=generator))
        p.grad = one.grad.double() * 0.5
        theirs.step()
        run([one], Rates(1e-2, (0.9, 0.95), 1e-8, 0.1, step, 0.5))
    assert distance(one.parameter, p.detach()) < 3e-7
    assert one.copy is not None and torch.equal(one.copy, one.parameter.half())


def test_the_norm(device: torch.device) -> None:
    """Of several lists of tensors as of one vector; NaN and infinity come through."""
    moved = [draw(n, device, None) for n in SIZES]
    exact = torch.cat([one.grad for one in moved]).double().norm()
    lists = [prepare(moved[:4]), prepare(moved[4:])]
    with reach(moved):
        found = norm(lists)
        assert found.dtype == torch.float32 and found.shape == ()
        assert abs(float(found) / float(exact) - 1) < 1e-6
        assert torch.equal(norm(lists), found)
        for bad in (float("inf"), float("nan")):
            moved[-1].grad[-1] = bad
            assert not norm(lists).isfinite()


def test_a_table_is_made_once(device: torch.device) -> None:
    """The same addresses find the same table; other ones another, and few are kept."""
    moved = [draw(100, device), draw(3000, device)]
    first = prepare(moved).table
    assert prepare(moved).table is first
    assert prepare([*moved, draw(10, device)]).table is not first
    for _ in range(2 * ours.KEPT):
        prepare([draw(10, device), *[draw(11, device) for _ in range(3)]])
    assert all(kept.cache_info().currsize <= ours.KEPT for kept in (ours.table, ours._spread))


def test_what_the_kernel_does_not_take(device: torch.device) -> None:
    """float64, 16 bits and gaps between numbers are left to torch."""
    assert fits(torch.zeros(3, 4, device=device))
    for other in (
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.bfloat16),
        torch.zeros(4, 3).t(),
    ):
        assert not fits(other.to(device))
    one = clone(draw(10, device), torch.float64)
    assert prepare([one]).table is None and prepare([]).table is None
    other = draw(10, device)
    assert prepare([replace(other, grad=other.grad.bfloat16())]).table is None
    before = one.parameter.clone()
    adamw(prepare([one]), RATES)
    assert not torch.equal(one.parameter, before)


@pytest.mark.gpu
def test_more_than_32_bits_count(device: torch.device) -> None:
    """A parameter of more than 2^31 numbers: 2^33 bytes."""
    n = 2**31 + 5000
    p, g, m, v = (torch.zeros(n, device=device) for _ in range(4))
    copy = torch.zeros(n, device=device, dtype=torch.bfloat16)
    g[-5000:] = 1.0
    adamw(prepare([Moved(p, g, m, v, copy)]), Rates(1e-2, (0.9, 0.95), 1e-8, 0.0, 1))
    assert float(p[:-5000].abs().max()) == 0.0 and float((p[-5000:] + 1e-2).abs().max()) < 1e-8
    assert torch.equal(copy[-5000:], p[-5000:].bfloat16())
    assert float(norm([prepare([Moved(p, g, m, v)])])) == pytest.approx(5000**0.5)
