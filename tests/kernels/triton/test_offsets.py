"""Offsets past 2^31 elements: tensors of that size in memory hardly touched, and the last programs alone.

Everything is zero but the end, so that the end must be what the reference makes of the end alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from mmap import mmap

import pytest
import torch
from torch import Tensor

from kernels.cases import distance
from kernels.triton import shim
from kernels.triton.gluon_shim import on_cpu
from ssmtrain.kernels import tuned
from ssmtrain.kernels.causal_conv1d import reference as conv_reference
from ssmtrain.kernels.gated_norm import reference as norm_reference
from ssmtrain.kernels.selective_scan import reference as scan_reference
from ssmtrain.kernels.ssd import reference as ssd_reference
from ssmtrain.kernels.tuned import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs to choose which programs run")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """Skip where the system promises no more memory than it has."""
    try:
        mmap(-1, 9 << 30).close()
    except OSError:
        pytest.skip("the system grants no 9 GiB of memory, used or not")
    yield


def mostly_zero(*shape: int, tail: Tensor, dim: int = 0, skip: int = 0) -> Tensor:
    """Zeros of a shape, untouched but for the tail along a dimension, after `skip` elements of memory."""
    memory = mmap(-1, (torch.Size(shape).numel() + skip) * tail.element_size())
    whole = torch.frombuffer(memory, dtype=tail.dtype)[skip:].view(shape)
    whole.narrow(dim, shape[dim] - tail.shape[dim], tail.shape[dim]).copy_(tail)
    return whole.requires_grad_()


@torch.no_grad()
def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    """Assert that they are the same but for bf16's rounding."""
    assert all(t.abs().max() > 1e-3 for t in expected), "an end that is zero would show nothing"
    far = [distance(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    assert max(far) < 2e-2, far


def ends(
    run: Callable[..., Tensor], big: list[Tensor], dy: Tensor, cut: Callable[[Tensor], Tensor], programs: int
) -> list[Tensor]:
    """The ends of a large run's output and gradients."""
    with shim.last_programs(programs):
        y = run(*big)
        grads = torch.autograd.grad(y, big, dy)
    return [cut(t) for t in (y, *grads)]


def test_gated_norm() -> None:
    from ssmtrain.kernels.gated_norm.triton import gated_norm

    rows, width, last = 2**14 + 10, 2**17, 2
    x, z, dy = torch.randn(3, last, width).to(BF16)
    weight = torch.rand(width)
    run = lambda x, z, f: f(x, z, weight, eps=1e-5, n_groups=1, norm_before_gate=False)  # noqa: E731
    small = [t.clone().requires_grad_() for t in (x, z)]
    y = run(*small, norm_reference.gated_norm)
    expected = [y, *torch.autograd.grad(y, small, dy)]
    big = [mostly_zero(rows, width, tail=t) for t in (x, z)]
    # Backward takes a row in sixteen slices, and these are the last two rows of a run of 24.
    found = ends(
        lambda x, z: run(x, z, gated_norm), big, mostly_zero(rows, width, tail=dy), lambda t: t[-last:], 16
    )
    assert_near(found, expected)


@pytest.mark.parametrize("documents", [False, True])
def test_causal_conv1d(documents: bool) -> None:
    from ssmtrain.kernels.causal_conv1d.triton import causal_conv1d

    length, channels, last, kept = 2**16 + 56, 2**15, 24, 128
    x, dy = torch.randn(2, 1, last, channels).to(BF16)
    weight = torch.randn(channels, 4)
    # Documents of four tokens, so that their final windows are past 2^31 too.
    ids = (torch.arange(length)[None] // 4).to(torch.int32) if documents else None

    def run(f, x: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        n_docs = 1 if ids is None else int(ids[0, -1]) + 1
        rest = {"activation": "silu", "initial_state": None, "return_final_state": documents}
        return f(x, weight, None, doc_ids=ids, n_docs=n_docs, **rest)

    small = x.clone().requires_grad_()
    y, final = run(conv_reference.causal_conv1d, small, None if ids is None else ids[:, :last])
    expected = [y, *torch.autograd.grad(y, small, dy)]
    # Once from where no 32-bit word begins: neighbours are not read in pairs then, offsets are twice as far.
    big = mostly_zero(1, length, channels, tail=x, dim=1, skip=int(documents))
    with shim.last_programs(2):
        y, large_final = run(causal_conv1d, big, ids)
        (grad,) = torch.autograd.grad(y, big, mostly_zero(1, length, channels, tail=dy, dim=1))
    assert_near([t[0, -last:, -kept:] for t in (y, grad)], [t[0, :, -kept:] for t in expected])
    if final is not None and large_final is not None:
        assert_near([large_final[-2:, -kept:]], [final[-2:, -kept:]])


def test_causal_conv1d_of_many_rows() -> None:
    from ssmtrain.kernels.causal_conv1d.triton import causal_conv1d

    batch, length, channels, kept = 2**12 + 1, 16, 2**15, 128
    x, dy = torch.randn(2, 1, length, channels).to(BF16)
    weight = torch.randn(channels, 4)

    def run(f, x: Tensor) -> Tensor:
        rest = dict.fromkeys(("doc_ids", "initial_state"))
        return f(x, weight, None, activation="silu", n_docs=x.shape[0], return_final_state=False, **rest)[0]

    small = x.clone().requires_grad_()
    y = run(conv_reference.causal_conv1d, small)
    expected = [t[..., -kept:] for t in (y, *torch.autograd.grad(y, small, dy))]
    big, large_dy = (mostly_zero(batch, length, channels, tail=t) for t in (x, dy))
    found = ends(lambda x: run(causal_conv1d, x), [big], large_dy, lambda t: t[-1:, :, -kept:], 2)
    assert_near(found, expected)


@torch.no_grad()
def test_steps() -> None:
    from ssmtrain.kernels.causal_conv1d.triton import causal_conv1d_step
    from ssmtrain.kernels.ssd.triton import ssd_step

    batch, channels, kept = 2**14 + 1, 2**15, 128
    state, x, weight = torch.randn(1, channels, 4), torch.randn(1, channels), torch.randn(channels, 4)
    state, x = state.to(BF16), x.to(BF16)
    large = [mostly_zero(batch, *t.shape[1:], tail=t) for t in (state, x)]
    with shim.last_programs(2):
        y = causal_conv1d_step(*large, weight, None, activation="silu")
    expected = conv_reference.causal_conv1d_step(state, x, weight, None, activation="silu")
    assert_near([y[-1:, -kept:], large[0][-1:, -kept:]], [expected[:, -kept:], state[:, -kept:]])

    batch, heads, P, N = 2**16 + 1, 4, 64, 128
    state, x, dt = torch.randn(1, heads, P, N), torch.randn(1, heads, P), torch.rand(1, heads)
    B, C = torch.randn(2, 1, 1, N)
    rest = {"A": -torch.rand(heads), "dt_softplus": False, "dt_limit": (0.0, None)}
    rest |= dict.fromkeys(("D", "z", "dt_bias"))
    large = [mostly_zero(batch, *t.shape[1:], tail=t) for t in (state, x, dt, B, C)]
    with shim.last_programs(64):
        y = ssd_step(**dict(zip(("state", "x", "dt", "B", "C"), large, strict=True)), **rest)
    expected = ssd_reference.ssd_step(state, x, dt, B=B, C=C, **rest)
    assert_near([y[-1:, -1:], large[0][-1:, -1:]], [expected[:, -1:], state[:, -1:]])


def test_ssd(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmtrain.kernels.ssd import triton
    from ssmtrain.kernels.ssd.triton import ssd

    monkeypatch.setattr(triton, "_heads_of_a_run", lambda shape, chunks: 1)  # else no shares are written
    batch, length, heads, P, N = 2**17 + 1, 128, 2, 64, 64
    x, dy = torch.randn(2, 1, length, heads, P).to(BF16)
    B, C = torch.randn(2, 1, length, 1, N).to(BF16) * 0.3
    dt = torch.rand(1, length, heads).to(BF16)
    A = -torch.rand(heads)

    def run(f, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        rest = {"D": A, **dict.fromkeys(("z", "dt_bias", "chunk_size", "doc_ids", "initial_state"))}
        limits = {"dt_softplus": False, "dt_limit": (0.0, None), "return_final_state": False}
        return f(x, dt, A, B, C, n_docs=x.shape[0], **rest, **limits)[0]

    small = [t.clone().requires_grad_() for t in (x, dt, B, C)]
    y = run(ssd_reference.ssd, *small)
    expected = [y, *torch.autograd.grad(y, small, dy)]
    big = [mostly_zero(batch, *t.shape[1:], tail=t) for t in (x, dt, B, C)]
    large_dy = mostly_zero(batch, *dy.shape[1:], tail=dy)
    found = ends(lambda *inputs: run(ssd, *inputs), big, large_dy, lambda t: t[-1:], 16)
    assert_near(found, expected)


@pytest.mark.parametrize("lanes", [False, True], ids=["plain", "n16"])
def test_selective_scan(lanes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmtrain.kernels.selective_scan.triton import selective_scan

    batch, length, channels, kept = 2**9 + 1, 128, 2**15 + 64, 16
    u, dt, z, dy = torch.randn(4, 1, length, channels).to(BF16)
    B, C = torch.randn(2, 1, length, 1).to(BF16)
    A = -torch.rand(channels, 1)

    def run(f, u: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        rows = [t.expand(u.shape[0], -1, -1) for t in (B, C)]
        rest = {"D": A[:, 0], "z": z, "dt_bias": None, "doc_ids": None, "initial_state": None}
        limits = {"dt_softplus": True, "dt_limit": (0.0, float("inf")), "return_final_state": False}
        return f(u, dt, A, *rows, n_docs=u.shape[0], **rest, **limits)[0]

    small = [t.clone().requires_grad_() for t in (u, dt, z)]
    y = run(scan_reference.selective_scan, *small)
    expected = [t[..., -kept:] for t in (y, *torch.autograd.grad(y, small, dy))]
    big = [mostly_zero(batch, length, channels, tail=t) for t in (u, dt, z)]
    large_dy = mostly_zero(batch, length, channels, tail=dy)
    with ExitStack() as stack:
        if lanes:
            n16 = pytest.importorskip("ssmtrain.kernels.selective_scan.triton_n16")
            n16_back = pytest.importorskip("ssmtrain.kernels.selective_scan.triton_n16_backward")
            monkeypatch.setattr(tuned, "architecture", lambda device: "sm_90")
            monkeypatch.setattr(tuned, "multiprocessors", lambda device: 2**20)  # no turns: the last is last
            stack.enter_context(on_cpu(n16, n16.forward, n16_back.backward, last=1))
        found = ends(
            lambda *inputs: run(selective_scan, *inputs), big, large_dy, lambda t: t[-1:, :, -kept:], 2
        )
    assert_near(found, expected)
