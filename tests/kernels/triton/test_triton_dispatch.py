"""Ops with a Triton body take it when told to, for whole rows and for steps, and agree with the reference."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ssmtrain.kernels import backend
from ssmtrain.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from ssmtrain.kernels.gated_norm import gated_norm
from ssmtrain.kernels.linear_cross_entropy import linear_cross_entropy
from ssmtrain.kernels.selective_scan import selective_scan, selective_scan_step
from ssmtrain.kernels.ssd import ssd, ssd_step

OPS = ["causal_conv1d", "gated_norm", "linear_cross_entropy", "selective_scan", "ssd"]
H, P, N, K = 2, 16, 16, 4


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    """kernels=triton, in a version whose ops are those that have a body."""
    monkeypatch.setattr(backend, "_current", None)
    monkeypatch.setattr(backend, "op_names", lambda: OPS)
    decision = backend.configure("triton", device.type)
    assert decision.ops == dict.fromkeys(OPS, "triton")
    yield


def scan(device: torch.device) -> Tensor:
    x, dt, B = torch.randn(1, 20, H, P), torch.randn(1, 20, H), torch.randn(1, 20, 1, N)
    x, dt, B, A = (t.to(device) for t in (x, dt, B, -torch.ones(H)))
    return ssd(x, dt, A, B, B, D=-A)[0]


def scan_step(device: torch.device) -> Tensor:
    state, x, dt, B = torch.randn(1, H, P, N), torch.randn(1, H, P), torch.randn(1, H), torch.randn(1, 1, N)
    state, x, dt, B, A = (t.to(device) for t in (state, x, dt, B, -torch.ones(H)))
    return ssd_step(state, x, dt, A, B, B)


def selective(device: torch.device) -> Tensor:
    u, dt, B, A = torch.randn(1, 9, P), torch.randn(1, 9, P), torch.randn(1, 9, 4), -torch.ones(P, 4)
    u, dt, B, A = (t.to(device) for t in (u, dt, B, A))
    return selective_scan(u, dt, A, B, B, D=-A[:, 0].contiguous(), z=u)[0]


def selective_step(device: torch.device) -> Tensor:
    state, u, dt, B = torch.randn(1, P, 4), torch.randn(1, P), torch.randn(1, P), torch.randn(1, 4)
    state, u, dt, B, A = (t.to(device) for t in (state, u, dt, B, -torch.ones(P, 4)))
    return selective_scan_step(state, u, dt, A, B, B)


def conv(device: torch.device) -> Tensor:
    return causal_conv1d(torch.randn(1, 20, 32).to(device), torch.randn(32, K).to(device))[0]


def conv_step(device: torch.device) -> Tensor:
    state, x, weight = torch.randn(1, 32, K), torch.randn(1, 32), torch.randn(32, K)
    return causal_conv1d_step(*(t.to(device) for t in (state, x, weight)))


def norm(device: torch.device) -> Tensor:
    x, z = torch.randn(2, 3, 32).to(device)
    return gated_norm(x, z, torch.ones(32, device=device))


def head(device: torch.device) -> Tensor:
    hidden, weight = torch.randn(2, 9, 16).to(device)
    return linear_cross_entropy(hidden, weight, torch.arange(9, device=device))[0]


CALLS = {
    "ssd.ssd": scan,
    "ssd.ssd_step": scan_step,
    "causal_conv1d.causal_conv1d": conv,
    "causal_conv1d.causal_conv1d_step": conv_step,
    "gated_norm.gated_norm": norm,
    "linear_cross_entropy.linear_cross_entropy": head,
    "selective_scan.selective_scan": selective,
    "selective_scan.selective_scan_step": selective_step,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_triton_body_runs(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    op, function = name.split(".")
    module = importlib.import_module(f"ssmtrain.kernels.{op}.triton")
    body: Callable[..., object] = getattr(module, function)
    reached = []
    monkeypatch.setattr(
        module, function, lambda *args, **kwargs: reached.append(name) or body(*args, **kwargs)
    )
    torch.manual_seed(0)
    found = CALLS[name](device)
    assert reached == [name]
    backend.configure("reference", device.type)
    torch.manual_seed(0)
    expected = CALLS[name](device)
    assert reached == [name]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
