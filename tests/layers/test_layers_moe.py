"""The mixture of experts: against a loop over tokens, its routers, its losses, its load."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layers.cases import assert_same, build, gradients, inputs
from ssmtrain.layers.base import Context
from ssmtrain.layers.mlp import activate
from ssmtrain.layers.moe import Moe, MoeConfig

EXAMPLES = [
    {"n_experts": 5, "top_k": 2, "hidden": 6},
    {"n_experts": 4, "top_k": 1, "hidden": 6, "activation": "relu2", "normalize": False, "z_coef": 0.01},
    {"n_experts": 6, "top_k": 3, "hidden": 4, "router": "sigmoid_bias", "shared_hidden": 8, "scaling": 2.5},
]
FP32 = {"router"}
NO_DECAY: set[str] = set()


def by_equations(layer: Moe, x: Tensor) -> Tensor:
    """One token at a time, one expert at a time."""
    config = layer.config
    rows = []
    for token in x.flatten(0, 1):
        logits = layer.router @ token
        scores = logits.softmax(-1) if config.router == "softmax" else logits.sigmoid()
        order = scores if config.router == "softmax" else scores + layer.selection_bias
        chosen = order.sort(descending=True).indices[: config.top_k]
        weights = scores[chosen]
        if config.normalize:
            weights = weights / weights.sum()
        y = torch.zeros_like(token)
        for e, w in zip(chosen, weights):
            h = activate(layer.w_in[e] @ token, config.activation)
            y = y + config.scaling * w * (layer.w_out[e] @ h)
        if layer.shared is not None:
            h = activate(layer.shared.in_proj.weight @ token, config.activation)
            y = y + layer.shared.out_proj.weight @ h
        rows.append(y)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("fields", EXAMPLES)
def test_layer_follows_the_equations(fields: dict) -> None:
    layer = build(MoeConfig(**fields))
    if layer.config.router == "sigmoid_bias":
        layer.selection_bias.copy_(torch.linspace(-0.2, 0.2, layer.config.n_experts))
    x = inputs(2, 9).requires_grad_()
    y, expected = layer(x, Context())[0], by_equations(layer, x)
    assert_same(
        {"y": expected.detach(), **gradients(layer, expected, x)}, {"y": y.detach(), **gradients(layer, y, x)}
    )


def test_no_token_is_dropped_when_all_choose_the_same_experts() -> None:
    layer = build(MoeConfig(n_experts=4, top_k=2, hidden=6))
    x = inputs(2, 9).abs()
    with torch.no_grad():
        layer.router.copy_(torch.tensor([3.0, -3.0, 2.0, -3.0])[:, None].expand(4, 16))
    y, stats = layer(x, Context())
    assert stats["load"].tolist() == [18, 0, 18, 0]
    assert_same({"y": by_equations(layer, x)}, {"y": y})
    grads = torch.autograd.grad(y.sum(), [layer.w_in])[0]
    assert grads[1].count_nonzero() == 0 and grads[0].count_nonzero() > 0


def test_normalised_softmax_is_softmax_over_the_chosen() -> None:
    layer = build(MoeConfig(n_experts=5, top_k=2, hidden=6))
    tokens = inputs(1, 7)[0]
    weights, experts, _ = layer.route(tokens)
    logits = (tokens @ layer.router.T).gather(-1, experts)
    torch.testing.assert_close(weights, logits.softmax(-1))


def test_bias_selects_but_does_not_weigh() -> None:
    layer = build(
        MoeConfig(n_experts=4, top_k=2, hidden=6, router="sigmoid_bias", normalize=False, scaling=3.0)
    )
    tokens = inputs(1, 7)[0]
    layer.selection_bias.copy_(torch.tensor([0.0, 10.0, 0.0, 20.0]))
    weights, experts, stats = layer.route(tokens)
    assert experts.tolist() == [[3, 1]] * 7
    torch.testing.assert_close(weights, 3.0 * torch.sigmoid(tokens @ layer.router.T)[:, [3, 1]])
    assert stats["load"].tolist() == [0, 7, 0, 7]


def test_bias_moves_towards_even_load() -> None:
    layer = build(
        MoeConfig(n_experts=4, top_k=2, hidden=6, router="sigmoid_bias", bias_rate=0.25), torch.float32
    )
    layer.update_bias(torch.tensor([0, 7, 3, 4]))  # mean 3.5
    assert layer.selection_bias.tolist() == [0.25, -0.25, 0.25, -0.25]
    layer.update_bias(torch.tensor([3, 3, 3, 3]))
    assert layer.selection_bias.tolist() == [0.25, -0.25, 0.25, -0.25]
    assert layer.state_dict()["selection_bias"].dtype == torch.float32
    layer.reset_buffers()
    assert layer.selection_bias.count_nonzero() == 0


def test_bias_updates_even_out_a_skewed_router() -> None:
    config = MoeConfig(n_experts=4, top_k=2, hidden=6, router="sigmoid_bias", bias_rate=0.02)
    layer = build(config, torch.float32)
    with torch.no_grad():
        layer.router[0] += 1.0
    x = inputs(4, 64, torch.float32) + 0.5
    first = layer(x, Context())[1]["load"]
    for _ in range(60):
        layer.update_bias(layer(x, Context())[1]["load"])
    last = layer(x, Context())[1]["load"]
    assert last.max() - last.min() < 0.3 * (first.max() - first.min())


def test_softmax_router_has_no_bias_to_update() -> None:
    layer = build(MoeConfig(n_experts=4, top_k=2, hidden=6))
    layer.update_bias(torch.tensor([1, 2, 3, 4]))
    layer.reset_buffers()
    assert list(layer.buffers()) == []


def test_auxiliary_and_z_losses_by_hand() -> None:
    config = MoeConfig(n_experts=4, top_k=2, hidden=6, aux_coef=0.1, z_coef=0.01)
    layer = build(config)
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 3.0, 1.0, 0.0]], dtype=torch.float64)
    p = logits.softmax(-1)
    stats = layer.stats(logits, p, torch.tensor([[0, 1], [1, 2]]))
    assert stats["load"].tolist() == [1, 2, 1, 0]
    aux = 0.1 * 4 * (0.5 * p[:, 0].mean() + 1.0 * p[:, 1].mean() + 0.5 * p[:, 2].mean())
    torch.testing.assert_close(stats["aux"], aux)
    torch.testing.assert_close(stats["z"], 0.01 * logits.logsumexp(-1).square().mean())
    # An even load costs top_k times the coefficient; collapse onto top_k experts costs n_experts times it.
    flat = torch.zeros(4, 4, dtype=torch.float64)
    even = layer.stats(flat, flat.softmax(-1), torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]]))
    torch.testing.assert_close(even["aux"].item(), 0.2)
    peak = torch.tensor([[50.0, 50.0, 0.0, 0.0]] * 4, dtype=torch.float64)
    worst = layer.stats(peak, peak.softmax(-1), torch.tensor([[0, 1]] * 4))
    torch.testing.assert_close(worst["aux"].item(), 0.4)


@pytest.mark.parametrize("fields", EXAMPLES)
def test_load_counts_every_choice_and_losses_reach_the_router(fields: dict) -> None:
    layer = build(MoeConfig(**{**fields, "z_coef": 0.01}))
    _, stats = layer(inputs(3, 11), Context())
    assert stats["load"].sum() == 33 * layer.config.top_k and not stats["load"].is_floating_point()
    for name in ("aux", "z"):
        assert stats[name].shape == ()
        (grad,) = torch.autograd.grad(stats[name], [layer.router], retain_graph=True)
        assert grad.count_nonzero() > 0


def test_router_is_fp32_under_autocast() -> None:
    layer = build(MoeConfig(n_experts=4, top_k=2, hidden=6), torch.float32)
    x = inputs(2, 9, torch.float32)
    exact = layer.route(x.flatten(0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, experts, _ = layer.route(x.flatten(0, 1))
        y, stats = layer(x, Context())
    assert (
        weights.dtype == torch.float32 and torch.equal(weights, exact[0]) and torch.equal(experts, exact[1])
    )
    assert y.dtype == torch.bfloat16 and stats["aux"].dtype == torch.float32


def test_published_sizes() -> None:
    # Granite-4.0-H-Tiny: 64 experts of 512, 6 active, a shared one of 1024, width 1536.
    config = MoeConfig(n_experts=64, top_k=6, hidden=512, shared_hidden=1024)
    expert, shared, router = 3 * 1536 * 512, 3 * 1536 * 1024, 64 * 1536
    assert config.num_params(1536) == 64 * expert + shared + router
    assert config.num_active_params(1536) == 6 * expert + shared + router
    assert config.flops(1536, 4096) == 2 * 1536 * 64 + 6 * 6 * 1536 * 512 + 6 * 1536 * 1024
    # Jamba: 16 experts of 14336, 2 active, width 4096.
    jamba = MoeConfig(n_experts=16, top_k=2, hidden=14336, normalize=False)
    assert jamba.num_params(4096) == 16 * 3 * 4096 * 14336 + 16 * 4096
    assert jamba.flops(4096, 1) == 2 * 6 * 4096 * 14336 + 2 * 4096 * 16
    # Two matrices, not three, without a gate.
    plain = MoeConfig(n_experts=16, top_k=2, hidden=100, activation="gelu")
    assert plain.flops(64, 1) == 2 * 4 * 64 * 100 + 2 * 64 * 16


@pytest.mark.parametrize(
    ("fields", "field"), [({"top_k": 5}, "top_k"), ({"top_k": 2, "bias_rate": 0.1}, "bias_rate")]
)
def test_check_names_the_field(fields: dict, field: str) -> None:
    assert [name for name, _ in MoeConfig(n_experts=4, hidden=6, **fields).check(16)] == [field]
