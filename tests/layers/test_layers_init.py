"""How parameters start and which are never decayed: one test per line of the checklist of the papers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layers.cases import D_MODEL, examples, specs
from ssmtrain.config.model import ModelConfig
from ssmtrain.layers import ffn_kinds, mixer_kinds
from ssmtrain.layers.base import LayerConfig
from ssmtrain.layers.init import dt_bias
from ssmtrain.layers.mamba1 import Mamba1Config
from ssmtrain.layers.mamba2 import Mamba2Config
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights

ALL = {**examples(mixer_kinds()), **examples(ffn_kinds())}
layers = pytest.mark.parametrize("config", ALL.values(), ids=ALL)
MODEL = {
    "d_model": 64,
    "layout": "MNAF",
    "blocks": {
        "M": {"mixer": {"kind": "mamba1", "bias": True}},
        "N": {"mixer": {"kind": "mamba2", "head_dim": 2, "d_state": 16}},
        "A": {
            "mixer": {"kind": "attention", "n_heads": 4, "bias": True},
            "ffn": {"kind": "mlp", "hidden": 128},
        },
        "F": {"ffn": {"kind": "moe", "n_experts": 4, "top_k": 2, "hidden": 32}},
    },
}
BRANCHES = 5


def drawn(config: LayerConfig, d_model: int = D_MODEL) -> dict[str, Tensor]:
    """Every parameter of a layer as its kind draws it."""
    generator = torch.Generator().manual_seed(0)
    layer = config.build(d_model)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    return {name: spec.init(shapes[name], generator) for name, spec in specs(layer).items()}


def model(**init: object) -> HybridModel:
    config = ModelConfig.model_validate({**MODEL, "init": init})
    built = HybridModel(config, 97)
    init_weights(built, config.init, seed=0)
    return built


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """All inside [low, high], and the quantiles where a uniform draw has them."""
    values = values.flatten().double()
    assert low <= values.min() and values.max() <= high
    spread = high - low
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        tolerance = 4 * spread * math.sqrt(q * (1 - q) / values.numel())
        assert abs(values.quantile(q).item() - (low + q * spread)) < tolerance


@layers
def test_ssm_parameters_norms_and_biases_are_never_decayed_and_matrices_are(config: LayerConfig) -> None:
    layer = config.build(D_MODEL)
    for name, parameter in layer.named_parameters():
        vector = parameter.ndim == 1 or name.rsplit(".")[-1] in ("A_log", "D", "dt_bias", "bias")
        assert specs(layer)[name].decay == (not vector), name


@layers
def test_ssm_parameters_norms_and_routers_stay_fp32(config: LayerConfig) -> None:
    layer = config.build(D_MODEL)
    for name, spec in specs(layer).items():
        keep = name.rsplit(".")[-1] in ("A_log", "D", "dt_bias", "router") or "norm" in name
        assert spec.fp32 == keep, name


@pytest.mark.parametrize("config", [Mamba1Config(), Mamba2Config(head_dim=1, d_state=4)])
def test_step_sizes_start_log_uniform(config: LayerConfig) -> None:
    steps = F.softplus(drawn(config, 2048)["dt_bias"].double())
    assert_uniform(steps.log(), math.log(1e-3) - 1e-3, math.log(0.1) + 1e-3)


def test_step_sizes_start_at_the_floor_or_above() -> None:
    steps = F.softplus(dt_bias(1e-6, 1e-2, 1e-4)((4000,), torch.Generator().manual_seed(0)).double())
    assert abs(steps.min().item() - 1e-4) < 1e-7
    # Half of the log-uniform range lies below the floor.
    assert 0.45 < (steps < 1.001e-4).double().mean() < 0.55


def test_mamba1_decay_starts_at_one_to_n_in_every_channel() -> None:
    A = -drawn(Mamba1Config(d_state=16))["A_log"].exp()
    torch.testing.assert_close(A, -torch.arange(1.0, 17.0).expand(2 * D_MODEL, 16))


def test_mamba2_decay_starts_uniform_per_head() -> None:
    A = drawn(Mamba2Config(head_dim=1, d_state=4), 2048)["A_log"].exp()
    assert A.shape == (4096,)
    assert_uniform(A, 1.0 - 1e-5, 16.0 + 1e-5)
    assert_uniform(
        drawn(Mamba2Config(head_dim=1, d_state=4, A_range=(2.0, 3.0)), 2048)["A_log"].exp(), 1.99, 3.01
    )


def test_skips_and_norm_weights_start_at_one_and_biases_at_zero() -> None:
    seen = set()
    for config in ALL.values():
        for name, value in drawn(config).items():
            last = name.rsplit(".")[-1]
            if last == "D" or "norm" in name:
                assert (value == 1).all(), name
                seen.add("one")
            elif last == "bias":
                assert (value == 0).all(), name
                seen.add(name)
    assert {"one", "conv.bias", "in_proj.bias", "out_proj.bias", "q_proj.bias"} <= seen


def test_dt_projection_starts_uniform_by_its_rank() -> None:
    assert_uniform(drawn(Mamba1Config(), 256)["dt_proj.weight"], -1 / 4, 1 / 4)  # rank 16
    assert_uniform(drawn(Mamba1Config(dt_rank=64), 256)["dt_proj.weight"], -1 / 8, 1 / 8)


def test_projections_start_as_torch_has_them() -> None:
    values = drawn(Mamba1Config(), 64)
    assert_uniform(values["in_proj.weight"], -1 / 8, 1 / 8)
    assert_uniform(values["x_proj.weight"], -(128**-0.5), 128**-0.5)
    assert_uniform(values["conv.weight"], -1 / 2, 1 / 2)  # fan-in: 4 taps of one channel


def test_residual_projections_are_divided_by_root_branches() -> None:
    built = model()
    weights = {
        "blocks.0.mixer.out_proj.weight": 128,
        "blocks.1.mixer.out_proj.weight": 128,
        "blocks.2.mixer.out_proj.weight": 64,
        "blocks.2.ffn.out_proj.weight": 128,
        "blocks.3.ffn.w_out": 32,
    }
    assert {name for name, spec in built.specs().items() if spec.residual and name.find("bias") < 0} == set(
        weights
    )
    for name, fan_in in weights.items():
        bound = 1 / math.sqrt(fan_in) / math.sqrt(BRANCHES)
        assert_uniform(built.get_parameter(name).detach(), -bound, bound)


def test_a_normal_start_for_projections_leaves_the_special_parameters_alone() -> None:
    # The classic silent bug: a generic initialiser that runs last wipes dt.
    plain, normal = dict(model().named_parameters()), dict(model(std=0.1).named_parameters())
    special = (
        "dt_bias",
        "A_log",
        "D",
        "dt_proj.weight",
        "conv.weight",
        "bias",
        "norm.weight",
        "input.weight",
    )
    for name, value in normal.items():
        if name.endswith(special):
            assert torch.equal(value, plain[name]), name
        else:
            scale = 0.1 / (math.sqrt(BRANCHES) if name.endswith(("out_proj.weight", "w_out")) else 1.0)
            assert abs(value.std().item() / scale - 1) < 0.1, name


def test_embedding_starts_normal() -> None:
    assert abs(model().get_parameter("input.weight").std().item() / 0.02 - 1) < 0.05
