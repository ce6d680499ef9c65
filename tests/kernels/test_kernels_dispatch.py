"""Ops go where kernels/backend.py says, for the device of their tensors."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from ssmtrain.kernels.attention import attention
from ssmtrain.kernels.grouped_gemm import grouped_gemm
from ssmtrain.kernels.linear_cross_entropy import linear_cross_entropy
from ssmtrain.kernels.selective_scan import selective_scan, selective_scan_step

x = torch.randn(2, 3, 4, 4)
CALLS = {
    "attention": lambda: attention(x, x, x),
    "grouped_gemm": lambda: grouped_gemm(x[0, 0], x[0], torch.tensor([1, 1, 2])),
    "linear_cross_entropy": lambda: linear_cross_entropy(x[0, 0], x[0, 1], torch.arange(4)),
    "selective_scan": lambda: selective_scan(x[0], x[0], -x[0, 0].abs(), x[0], x[0]),
    "selective_scan_step": lambda: selective_scan_step(
        x[0].clone(), x[0, :, 0], x[0, :, 0], x[0, 0], *x[0:2, :, 0]
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_chosen_implementation_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = name.removesuffix("_step")
    body = ModuleType("triton")
    setattr(body, name, lambda *args, **kwargs: "the Triton body")
    monkeypatch.setitem(sys.modules, f"ssmtrain.kernels.{op}.triton", body)
    asked = []

    def choose(which: str):
        def chosen(op: str, device_type: str | None = None) -> str:
            asked.append((op, device_type))
            return which

        return chosen

    module = sys.modules[f"ssmtrain.kernels.{op}"]
    monkeypatch.setattr(module, "chosen", choose("triton"))
    assert CALLS[name]() == "the Triton body"
    monkeypatch.setattr(module, "chosen", choose("reference"))
    assert CALLS[name]() != "the Triton body"
    assert asked == [(op, "cpu")] * 2
