"""Mamba-2: the layer against its equations, its published sizes, and what its kernels receive."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layers.cases import LENGTH, assert_same, build, gradients, inputs, packed
from ssmtrain.layers import mamba2
from ssmtrain.layers.base import Context
from ssmtrain.layers.mamba2 import Mamba2Config

EXAMPLES = [
    {"d_state": 8, "head_dim": 8},
    {"d_state": 4, "head_dim": 4, "n_heads": 6, "n_groups": 3, "d_conv": 2, "conv_bias": False, "bias": True},
    {
        "d_state": 5,
        "head_dim": 16,
        "n_groups": 2,
        "norm_before_gate": True,
        "dt_limit": (0.01, 0.5),
        "d_conv": 3,
    },
]
FP32 = {"A_log", "D", "dt_bias", "norm.weight"}
NO_DECAY = FP32 | {"conv.bias", "in_proj.bias", "out_proj.bias"}


def grouped_rms(x: Tensor, groups: int, eps: float) -> Tensor:
    x = x.unflatten(-1, (groups, -1))
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)


def by_equations(layer: mamba2.Mamba2, x: Tensor) -> Tensor:
    """The layer token by token, in the order of the paper's section 7."""
    config, heads = layer.config, layer.A_log.shape[0]
    G, N, P = config.n_groups, config.d_state, config.head_dim
    E = heads * P
    mixed = x @ layer.in_proj.weight.T
    z, u, dt = mixed[..., :E], mixed[..., E : 2 * E + 2 * G * N], mixed[..., 2 * E + 2 * G * N :]
    taps = layer.conv.weight.shape[1]
    past = F.pad(u, (0, 0, taps - 1, 0))
    u = F.silu(
        sum(past[:, i : i + x.shape[1]] * layer.conv.weight[:, i] for i in range(taps)) + layer.conv.bias
    )
    v = u[..., :E].unflatten(-1, (heads, P))
    B = u[..., E : E + G * N].unflatten(-1, (G, N)).repeat_interleave(heads // G, dim=2)
    C = u[..., E + G * N :].unflatten(-1, (G, N)).repeat_interleave(heads // G, dim=2)
    dt = F.softplus(dt + layer.dt_bias).clamp(layer.dt_limit[0], layer.dt_limit[1])
    h = torch.zeros(x.shape[0], heads, P, N, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(-dt[:, t] * layer.A_log.exp())[..., None, None]
        h = decay * h + (dt[:, t, :, None] * v[:, t])[..., None] * B[:, t, :, None]
        y = ((h * C[:, t, :, None]).sum(-1) + layer.D[:, None] * v[:, t]).flatten(1)
        gate = F.silu(z[:, t])
        if config.norm_before_gate:
            y = grouped_rms(y, G, config.norm_eps) * layer.norm.weight * gate
        else:
            y = grouped_rms(y * gate, G, config.norm_eps) * layer.norm.weight
        outputs.append(y @ layer.out_proj.weight.T)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"d_state": 6, "head_dim": 4},
        {"d_state": 6, "head_dim": 4, "n_groups": 4, "norm_eps": 1e-3},
        {"d_state": 3, "head_dim": 8, "n_groups": 2, "norm_before_gate": True, "dt_limit": [0.02, 0.3]},
    ],
)
def test_layer_follows_the_equations(fields: dict) -> None:
    layer = build(Mamba2Config(**fields))
    x = inputs(2, LENGTH).requires_grad_()
    y, expected = layer(x, Context())[0], by_equations(layer, x)
    assert_same(
        {"y": expected.detach(), **gradients(layer, expected, x)}, {"y": y.detach(), **gradients(layer, y, x)}
    )


def test_documents_carry_their_own_states() -> None:
    layer = build(Mamba2Config(d_state=4, head_dim=8))
    x = inputs(2, LENGTH)
    first, second = packed(((1, 20, 16), (5, 32))), packed(((30, 1, 6), (10, 27)))
    _, state = layer(x, Context(doc_ids=first.doc_ids, n_docs=5, states=[]))
    assert state["ssm"].shape == (5, 4, 8, 4) and state["conv"].shape == (5, 40, 4)
    y, _ = layer(x, Context(doc_ids=second.doc_ids, n_docs=5, states=[]), state)
    # Document 2 is the last 16 tokens of row 0, then the last 6 of row 0 again.
    joined, _ = layer(torch.cat([x[:1, 21:37], x[:1, 31:37]], 1), Context())
    assert_same({"y": joined[0, 16:]}, {"y": y[0, 31:37]})


def test_published_sizes() -> None:
    # Mamba-2 130M and 2.7B: 24 x 768 and 64 x 2560, vocabulary 50288 tied, one norm per layer and a last one.
    config = Mamba2Config()
    assert 24 * (config.num_params(768) + 768) + 768 + 50288 * 768 == 128_989_632
    assert 64 * (config.num_params(2560) + 2560) + 2560 + 50288 * 2560 == 2_702_599_680
    # 73.2 MiB per session in Granite-4.0-H-Micro's 36 layers (64 heads of 64), 162.6 MiB in the 2.7B above.
    assert round(36 * sum(config.state_bytes(2048, 1, 131072)) / 2**20, 1) == 73.2
    assert round(64 * sum(config.state_bytes(2560, 1, 131072)) / 2**20, 1) == 162.6
    # Granite-4.0-H-350M has 48 heads of 32 at width 768.
    assert Mamba2Config(n_heads=48, head_dim=32).heads(768) == 48


def test_flops_by_hand() -> None:
    # d 2048: E 4096, H 64, N 128. in 2*2048*(8192 + 256 + 64), out 2*4096*2048, conv 2*4*(4096 + 256),
    # SSD 256*(128 + 4096) + 4*4096*128.
    layer = 34_865_152 + 16_777_216 + 34_816 + 1_081_344 + 2_097_152
    assert Mamba2Config().flops(2048, 4096) == layer
    # Mamba-2 1.3B: 48 layers and a head of 50288: 2.84 GF forward per token, 5.4 % of it the SSD.
    total = 48 * layer + 2 * 2048 * 50288
    assert round(total / 1e9, 2) == 2.84
    assert round(48 * (1_081_344 + 2_097_152) / total, 3) == 0.054
    # Mamba-2 2.7B: 5.66 GF.
    assert round((64 * Mamba2Config().flops(2560, 4096) + 2 * 2560 * 50288) / 1e9, 2) == 5.66


def test_chunk_size_reaches_the_kernel_but_not_the_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = mamba2.ssd
    monkeypatch.setattr(mamba2, "ssd", lambda *a, **k: seen.append(k["chunk_size"]) or real(*a, **k))
    config = Mamba2Config(d_state=4, head_dim=8, chunk_size=7)
    build(config)(inputs(1, 20), Context())
    assert seen == [7]
    assert config.flops(16, 64) == Mamba2Config(d_state=4, head_dim=8).flops(16, 64)


def test_kernels_receive_fp32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def spy(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: object) -> tuple[Tensor, None]:
        seen.update(x=x.dtype, A=A.dtype, D=rest["D"].dtype, dt_bias=rest["dt_bias"].dtype)
        return x, None

    def norm_spy(x: Tensor, z: Tensor, weight: Tensor, **rest: object) -> Tensor:
        seen["norm"] = weight.dtype
        return x

    monkeypatch.setattr(mamba2, "ssd", spy)
    monkeypatch.setattr(mamba2, "gated_norm", norm_spy)
    layer = build(Mamba2Config(d_state=4, head_dim=8), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(inputs(1, 3, torch.float32), Context())
    assert seen.pop("x") == torch.bfloat16
    assert seen == dict.fromkeys(("A", "D", "dt_bias", "norm"), torch.float32)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"head_dim": 24}, "head_dim"),
        ({"head_dim": 8, "n_groups": 3}, "n_groups"),
        ({"head_dim": 8, "n_heads": 5, "expand": 3}, "expand"),
        ({"head_dim": 8, "dt_min": 0.5}, "dt_min"),
        ({"head_dim": 8, "dt_limit": (0.5, 0.1)}, "dt_limit"),
        ({"head_dim": 8, "A_range": (4.0, 2.0)}, "A_range"),
    ],
)
def test_check_names_the_field(fields: dict, field: str) -> None:
    assert [name for name, _ in Mamba2Config(**fields).check(16)] == [field]
