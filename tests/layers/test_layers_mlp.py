"""The dense feed-forward layer: its three activations and its sizes."""

from __future__ import annotations

import pytest
import torch

from layers.cases import build, inputs
from ssmtrain.layers.base import Context
from ssmtrain.layers.mlp import MlpConfig

EXAMPLES = [
    {"hidden": 24},
    {"hidden": 10, "activation": "gelu", "bias": True},
    {"hidden": 12, "activation": "relu2"},
]
FP32: set[str] = set()
NO_DECAY = {"in_proj.bias", "out_proj.bias"}


def test_activations() -> None:
    x = inputs(2, 5)
    layer = build(MlpConfig(hidden=8, bias=True))
    h = x @ layer.in_proj.weight.T + layer.in_proj.bias
    hidden = h[..., :8] * torch.sigmoid(h[..., :8]) * h[..., 8:]
    expected = hidden @ layer.out_proj.weight.T + layer.out_proj.bias
    y, stats = layer(x, Context())
    torch.testing.assert_close(y, expected)
    assert stats == {}

    layer = build(MlpConfig(hidden=8, activation="gelu"))
    h = x @ layer.in_proj.weight.T
    hidden = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    torch.testing.assert_close(layer(x, Context())[0], hidden @ layer.out_proj.weight.T)

    layer = build(MlpConfig(hidden=8, activation="relu2"))
    h = x @ layer.in_proj.weight.T
    torch.testing.assert_close(layer(x, Context())[0], h.clamp(min=0).square() @ layer.out_proj.weight.T)


@pytest.mark.parametrize(
    ("activation", "params", "flops"),
    [
        ("swiglu", 3 * 2048 * 8192, 6 * 2048 * 8192),
        ("gelu", 2 * 2048 * 8192, 4 * 2048 * 8192),
        ("relu2", 2 * 2048 * 8192, 4 * 2048 * 8192),
    ],
)
def test_sizes_by_hand(activation: str, params: int, flops: int) -> None:
    config = MlpConfig(hidden=8192, activation=activation)  # type: ignore[arg-type]  # a literal at run time
    assert config.num_params(2048) == config.num_active_params(2048) == params
    assert config.flops(2048, 4096) == flops
