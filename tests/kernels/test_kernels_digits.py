"""What must keep fp32's digits does so where it is used, whatever a strategy makes of parameters."""

from __future__ import annotations

import pytest
import torch

from ssmtrain.kernels.selective_scan import selective_scan
from ssmtrain.kernels.ssd import ssd
from ssmtrain.layers.base import Context
from ssmtrain.layers.mamba1 import Mamba1Config
from ssmtrain.layers.mamba2 import Mamba2Config
from ssmtrain.layers.moe import MoeConfig
from ssmtrain.layers.norm import RMSNorm, Stream, StreamNorm

BF16 = torch.bfloat16


def of_ssd() -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(1, 5, 2, 4).to(BF16),
        "dt": torch.randn(1, 5, 2).to(BF16),
        "A": -torch.rand(2),
        "B": torch.randn(1, 5, 1, 3).to(BF16),
        "C": torch.randn(1, 5, 1, 3).to(BF16),
        "D": torch.randn(2),
        "dt_bias": torch.randn(2),
    }


def of_scan() -> dict[str, torch.Tensor]:
    return {
        "u": torch.randn(1, 5, 4).to(BF16),
        "dt": torch.randn(1, 5, 4).to(BF16),
        "A": -torch.rand(4, 3),
        "B": torch.randn(1, 5, 3).to(BF16),
        "C": torch.randn(1, 5, 3).to(BF16),
        "D": torch.randn(4),
        "dt_bias": torch.randn(4),
    }


@pytest.mark.parametrize("name", ["A", "D", "dt_bias"])
@pytest.mark.parametrize("op, inputs", [(ssd, of_ssd), (selective_scan, of_scan)])
def test_scans(op, inputs, name: str) -> None:
    given = inputs()
    op(**given)
    given[name] = given[name].to(BF16)
    with pytest.raises(ValueError, match=rf"{op.__name__}: {name} is torch.bfloat16; it must stay"):
        op(**given)


def test_norms() -> None:
    x = torch.randn(2, 8)
    for norm, given in ((RMSNorm(8), x), (StreamNorm(8), Stream(x))):
        with torch.no_grad():
            norm.weight.fill_(1.0)
        norm(given)
        norm.weight = torch.nn.Parameter(norm.weight.detach().to(BF16))
        with pytest.raises(ValueError, match=r"norm: weight is torch\.bfloat16"):
            norm(given)


@pytest.mark.parametrize(
    "config, name",
    [
        (Mamba1Config(d_state=4), "A_log"),
        (Mamba1Config(d_state=4), "D"),
        (Mamba2Config(d_state=8, head_dim=8), "A_log"),
        (Mamba2Config(d_state=8, head_dim=8), "dt_bias"),
        (Mamba2Config(d_state=8, head_dim=8), "norm.weight"),
        (MoeConfig(n_experts=4, top_k=2, hidden=8), "router"),
    ],
)
def test_layers_whose_parameters_were_cast(config, name: str) -> None:
    """As by FSDP2's mixed precision or DeepSpeed's bf16, which cast what the layer said to keep."""
    layer = config.build(16)
    layer.reset_parameters() if hasattr(layer, "reset_parameters") else None
    x = torch.randn(1, 6, 16)
    owner, _, last = name.rpartition(".")
    module = layer.get_submodule(owner)
    setattr(module, last, torch.nn.Parameter(getattr(module, last).to(BF16)))
    with torch.autocast("cpu", BF16), pytest.raises(ValueError, match=r"must stay torch\.float32"):
        layer(x, Context())
