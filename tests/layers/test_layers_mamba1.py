"""Mamba-1: the layer against its equations, its published sizes, and what its kernel receives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layers.cases import D_MODEL, LENGTH, assert_same, build, gradients, inputs, packed
from ssmtrain.layers import mamba1
from ssmtrain.layers.base import Context
from ssmtrain.layers.mamba1 import Mamba1Config

EXAMPLES = [
    {},
    {"d_state": 3, "d_conv": 2, "expand": 1, "dt_rank": 5, "conv_bias": False, "bias": True},
    {"d_state": 4, "d_conv": 3, "inner_norm": True, "norm_eps": 1e-6},
]
FP32 = {"A_log", "D", "dt_bias", "dt_norm.weight", "B_norm.weight", "C_norm.weight"}
NO_DECAY = FP32 | {"conv.bias", "in_proj.bias", "out_proj.bias"}


def by_equations(layer: mamba1.Mamba1, x: Tensor) -> Tensor:
    """The layer token by token, as the paper's section 3 writes it."""
    u, z = (x @ layer.in_proj.weight.T).chunk(2, dim=-1)
    taps = layer.conv.weight.shape[1]
    past = F.pad(u, (0, 0, taps - 1, 0))
    u = F.silu(
        sum(past[:, i : i + x.shape[1]] * layer.conv.weight[:, i] for i in range(taps)) + layer.conv.bias
    )
    R, N = layer.rank, layer.d_state
    mixed = u @ layer.x_proj.weight.T
    dt, B, C = mixed[..., :R], mixed[..., R : R + N], mixed[..., R + N :]
    if layer.inner_norm:
        dt, B, C = (
            t / (t.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
            for t, norm in ((dt, layer.dt_norm), (B, layer.B_norm), (C, layer.C_norm))
        )
    dt = F.softplus(dt @ layer.dt_proj.weight.T + layer.dt_bias)
    h = torch.zeros(x.shape[0], u.shape[-1], N, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(-dt[:, t, :, None] * layer.A_log.exp())
        h = decay * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        y = (h * C[:, t, None]).sum(-1) + layer.D * u[:, t]
        outputs.append((y * F.silu(z[:, t])) @ layer.out_proj.weight.T)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("fields", [{}, {"d_state": 3, "d_conv": 2, "inner_norm": True, "norm_eps": 1e-3}])
def test_layer_follows_the_equations(fields: dict) -> None:
    layer = build(Mamba1Config(**fields))
    x = inputs(2, LENGTH).requires_grad_()
    y, expected = layer(x, Context())[0], by_equations(layer, x)
    assert_same(
        {"y": expected.detach(), **gradients(layer, expected, x)}, {"y": y.detach(), **gradients(layer, y, x)}
    )


def test_documents_carry_their_own_states() -> None:
    layer = build(Mamba1Config(d_state=4))
    x = inputs(2, LENGTH)
    first, second = packed(((1, 20, 16), (5, 32))), packed(((30, 1, 6), (10, 27)))
    ctx = Context(doc_ids=first.doc_ids, n_docs=5, states=[])
    _, state = layer(x, ctx)
    assert state["ssm"].shape == (5, 2 * D_MODEL, 4) and state["conv"].shape == (5, 2 * D_MODEL, 4)
    y, _ = layer(x, Context(doc_ids=second.doc_ids, n_docs=5, states=[]), state)
    # Document 2 is the last 16 tokens of row 0, then the last 6 of row 0 again.
    joined, _ = layer(torch.cat([x[:1, 21:37], x[:1, 31:37]], 1), Context())
    assert_same({"y": joined[0, 16:]}, {"y": y[0, 31:37]})


def test_published_sizes() -> None:
    # Mamba-130M and 2.8B: 24 x 768 and 64 x 2560, vocabulary 50280 tied, one norm per layer and a last one.
    config = Mamba1Config()
    assert 24 * (config.num_params(768) + 768) + 768 + 50280 * 768 == 129_135_360
    assert 64 * (config.num_params(2560) + 2560) + 2560 + 50280 * 2560 == 2_768_345_600
    # 22.5 MiB per session for the latter: 64 layers of 5120 channels with 16 fp32 states and 4 bf16 inputs.
    state = config.state_bytes(2560, 8, 131072)
    assert state == (0, 8 * 5120 * 4 * 2, 8 * 5120 * 16 * 4)
    assert 64 * sum(state) / 8 == 22.5 * 2**20


def test_flops_by_hand() -> None:
    # d 2560: E 5120, R 160, N 16. in 2*2560*10240, x_proj 2*5120*192, dt_proj 2*160*5120, out 2*5120*2560,
    # conv 2*4*5120, scan 5120 * (7*16 + 8).
    by_hand = 52_428_800 + 1_966_080 + 1_638_400 + 26_214_400 + 40_960 + 614_400
    assert Mamba1Config().flops(2560, 4096) == by_hand
    assert Mamba1Config().flops(2560, 131072) == by_hand


def test_kernel_receives_fp32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def spy(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: object) -> tuple[Tensor, None]:
        seen.update(u=u.dtype, A=A.dtype, D=rest["D"].dtype, dt_bias=rest["dt_bias"].dtype)
        return u, None

    monkeypatch.setattr(mamba1, "selective_scan", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        build(Mamba1Config(inner_norm=True), torch.float32)(inputs(1, 3, torch.float32), Context())
    assert seen == {"u": torch.bfloat16, "A": torch.float32, "D": torch.float32, "dt_bias": torch.float32}


def test_check_names_the_field() -> None:
    assert [f for f, _ in Mamba1Config(dt_min=0.5).check(16)] == ["dt_min"]
    assert [f for f, _ in Mamba1Config(norm_eps=1e-6).check(16)] == ["norm_eps"]
