"""Optimiser groups, Muon's share, and state that is kept by parameter name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from ssmtrain.config.optim import AdamWConfig, AnyOptim, MuonConfig
from ssmtrain.config.schedule import ConstantSchedule
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights
from ssmtrain.train import optim
from ssmtrain.train.schedule import Horizon, lr_at
from train.conftest import page

EVERYTHING = {
    "M": {"mixer": {"kind": "mamba2", "d_state": 8, "head_dim": 8, "bias": True}},
    "S": {"mixer": {"kind": "mamba1", "d_state": 4, "inner_norm": True, "bias": True}, "norm": "sandwich"},
    "A": {
        "mixer": {"kind": "attention", "n_heads": 2, "qk_norm": True, "bias": True},
        "ffn": {"kind": "mlp", "hidden": 16, "bias": True},
    },
    "E": {"ffn": {"kind": "moe", "n_experts": 4, "top_k": 2, "hidden": 8, "shared_hidden": 8}},
}


def model(tmp_path: Path, tied: bool = True) -> HybridModel:
    config = page(tmp_path, model__blocks=EVERYTHING, model__layout="MSAE", model__tie_embeddings=tied)
    built = HybridModel(config.model, 257)
    init_weights(built, config.model.init, 0)
    return built


def groups(built: HybridModel, config: AnyOptim) -> dict[str, tuple[str, float]]:
    """Optimiser and decay of each parameter by name; an assertion that each is in exactly one group."""
    named = dict(built.named_parameters())
    names = {id(p): n for n, p in named.items()}
    found: dict[str, tuple[str, float]] = {}
    for optimizer in optim.build_optimizers(named, built.specs(), config):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in found
                found[names[id(p)]] = (type(optimizer).__name__, group["weight_decay"])
    assert found.keys() == named.keys()
    return found


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_never_decayed(tmp_path: Path, kind: str) -> None:
    config = AdamWConfig() if kind == "adamw" else MuonConfig()
    for name, (_, decay) in groups(model(tmp_path, tied=False), config).items():
        last = name.rsplit(".", 1)[-1]
        exempt = (
            last in ("A_log", "D", "dt_bias") or "bias" in last or "norm" in name or name == "input.weight"
        )
        assert decay == (0.0 if exempt else 0.1), name


def test_the_embedding_is_decayed_where_asked(tmp_path: Path) -> None:
    assert groups(model(tmp_path), AdamWConfig(decay_embeddings=True))["input.weight"][1] == 0.1
    assert groups(model(tmp_path, tied=False), AdamWConfig())["head.weight"][1] == 0.1


def test_muon_takes_hidden_matrices_only(tmp_path: Path) -> None:
    built = model(tmp_path, tied=False)
    found = groups(built, MuonConfig())
    muon = {name for name, (kind, _) in found.items() if kind == "Muon"}
    assert all(name.endswith("proj.weight") or ".ffn." in name for name in muon), muon
    assert {"blocks.0.mixer.in_proj.weight", "blocks.1.mixer.dt_proj.weight"} <= muon
    for name in ("blocks.0.mixer.conv.weight", "blocks.1.mixer.A_log", "blocks.3.ffn.router", "head.weight"):
        assert found[name][0] == "AdamW", name
    assert found["blocks.3.ffn.w_in"][0] == "AdamW"  # a stack of experts is not a matrix


def step(built: HybridModel, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
    tokens = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(seed))
    out = built(tokens[:, :-1], tokens[:, 1:], Context())
    assert out.loss_sum is not None
    (out.loss_sum / 16).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_by_name_continues_to_the_bit(tmp_path: Path, kind: str) -> None:
    config = AdamWConfig() if kind == "adamw" else MuonConfig()
    first = model(tmp_path)
    named = dict(first.named_parameters())
    optimizers = optim.build_optimizers(named, first.specs(), config)
    step(first, optimizers, 1)
    step(first, optimizers, 2)
    saved = {k: v.clone() for k, v in optim.state_tensors(optimizers, named).items()}
    second = copy.deepcopy(first)
    renamed = dict(second.named_parameters())
    fresh = optim.build_optimizers(renamed, second.specs(), config)
    optim.load_state_tensors(fresh, renamed, saved)
    step(first, optimizers, 3)
    step(second, fresh, 3)
    for name, parameter in named.items():
        assert torch.equal(parameter, renamed[name]), name


def test_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    built = model(tmp_path)
    named = dict(built.named_parameters())
    optimizers = optim.build_optimizers(named, built.specs(), AdamWConfig())
    step(built, optimizers, 1)
    saved = optim.state_tensors(optimizers, named)
    wrong = {**saved, "input.weight/exp_avg": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"input.weight/exp_avg: \(3, 3\) torch.float32 in the file"):
        optim.load_state_tensors(optimizers, named, wrong)
    with pytest.raises(ValueError, match="nobody/exp_avg: no such parameter"):
        optim.load_state_tensors(optimizers, named, {**saved, "nobody/exp_avg": torch.zeros(1)})
    missing = {k: v for k, v in saved.items() if not k.startswith("head.norm.weight/")}
    with pytest.raises(ValueError, match=r"head.norm.weight/exp_avg: not in the file"):
        optim.load_state_tensors(optimizers, named, missing)


def test_clipping_scales_the_whole_gradient() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((2,), 2.0)
    norm = optim.gradient_norm(parameters)
    assert float(norm) == pytest.approx(20**0.5)
    optim.clip_gradients(parameters, None, norm, float(norm))
    assert float(optim.gradient_norm(parameters)) == pytest.approx(20**0.5)
    whole = [p.grad.clone() for p in parameters]
    for limit in (5.0, 4.473):  # far above, and where rounding decides
        optim.clip_gradients(parameters, limit, norm, float(norm))
        assert all(torch.equal(p.grad, grad) for p, grad in zip(parameters, whole, strict=True))
    optim.clip_gradients(parameters, 1.0, norm, float(norm))
    assert float(optim.gradient_norm(parameters)) == pytest.approx(1.0, rel=1e-5)


def test_the_rate_reaches_every_group(tmp_path: Path) -> None:
    built = model(tmp_path)
    optimizers = optim.build_optimizers(dict(built.named_parameters()), built.specs(), MuonConfig())
    lr = lr_at(ConstantSchedule(warmup=4), 0.1, 0, Horizon(10, 1))
    optim.set_lr(optimizers, lr)
    assert {group["lr"] for o in optimizers for group in o.param_groups} == {0.025}
