"""Attention: against a plain softmax, its positions, its window's ring, its sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layers.cases import D_MODEL, LENGTH, assert_same, build, gradients, inputs, packed
from ssmtrain.layers import attention
from ssmtrain.layers.attention import Attention, AttentionConfig
from ssmtrain.layers.base import Context
from ssmtrain.layers.rope import positions

EXAMPLES = [
    {"n_heads": 4},
    {"n_heads": 4, "n_kv_heads": 1, "head_dim": 6, "position": "rope", "qk_norm": True, "bias": True},
    {"n_heads": 4, "n_kv_heads": 2, "position": "rope", "rope_fraction": 0.5, "window": 5, "scale": 0.3},
    {"n_heads": 2, "window": 1},
]
FP32 = {"q_norm.weight", "k_norm.weight"}
NO_DECAY = FP32 | {"q_proj.bias", "k_proj.bias", "v_proj.bias", "out_proj.bias"}


def rotated(x: Tensor, dim: int, theta: float) -> Tensor:
    """Each pair (i, i + dim/2) of each head turned as a complex number, position by position."""
    half = dim // 2
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * theta ** (-2 * torch.arange(half) / dim)
    turned = (
        torch.complex(x[..., :half], x[..., half:dim]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    return torch.cat([turned.real, turned.imag, x[..., dim:]], dim=-1)


def by_equations(layer: Attention, x: Tensor) -> Tensor:
    """Softmax attention written out, one query head at a time."""
    config, hd, L = layer.config, layer.head_dim, x.shape[1]
    q, k, v = (p(x).unflatten(-1, (-1, hd)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if config.qk_norm:
        q, k = (
            t / (t.square().mean(-1, keepdim=True) + n.eps).sqrt() * n.weight
            for t, n in ((q, layer.q_norm), (k, layer.k_norm))
        )
    if config.position == "rope":
        q, k = (rotated(t, layer.rotary_dim, config.rope_theta) for t in (q, k))
    behind = torch.arange(L)[:, None] - torch.arange(L)
    hidden = (behind < 0) | (behind >= (config.window or L))
    outputs = []
    for head in range(config.n_heads):
        kv = head * config.kv_heads() // config.n_heads
        scores = q[:, :, head] @ k[:, :, kv].mT * (config.scale or 1 / math.sqrt(hd))
        outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, :, kv])
    return layer.out_proj(torch.cat(outputs, -1))


@pytest.mark.parametrize("fields", EXAMPLES)
def test_layer_follows_the_equations(fields: dict) -> None:
    layer = build(AttentionConfig(**fields))
    x = inputs(2, LENGTH).requires_grad_()
    y, expected = layer(x, Context())[0], by_equations(layer, x)
    # The rotary tables are fp32.
    assert_same(
        {"y": expected.detach(), **gradients(layer, expected, x)},
        {"y": y.detach(), **gradients(layer, y, x)},
        tolerance=3e-7 if layer.rotary_dim else 1e-10,
    )


def test_without_positions_the_past_is_a_set() -> None:
    x = inputs(1, 10)
    shuffled = x[:, [3, 0, 8, 1, 7, 2, 6, 4, 5, 9]]
    for position in ("none", "rope"):
        layer = build(AttentionConfig(n_heads=2, position=position))
        same = torch.allclose(layer(x, Context())[0][:, -1], layer(shuffled, Context())[0][:, -1])
        assert same == (position == "none")


def test_rotary_scores_depend_on_distance_only() -> None:
    layer = build(AttentionConfig(n_heads=2, position="rope"))
    x = inputs(1, 8)
    near, far = Context(), Context(offset=1000)
    (q, k, _), (q2, k2, _) = layer.project(x, near), layer.project(x, far)
    assert not torch.allclose(q, q2)
    scores, moved = (torch.einsum("blhd,bshd->bhls", a, b) for a, b in ((q, k), (q2, k2)))
    torch.testing.assert_close(moved, scores, rtol=0, atol=1e-6)


def test_positions_restart_in_each_document() -> None:
    expected = [p for n in (1, 20, 16, 5, 32) for p in range(n)]
    found = positions(packed(), LENGTH, torch.device("cpu"))
    assert found.flatten().tolist() == expected
    assert positions(Context(offset=7), 3, torch.device("cpu")).tolist() == [[7, 8, 9]]


def test_far_positions_keep_their_digits() -> None:
    # The fastest pair turns one radian per token; at 131071 an fp32 product would be off by up to 4e-3.
    layer = build(AttentionConfig(n_heads=1, head_dim=4, position="rope"))
    _, k, _ = layer.project(inputs(1, 1), Context(offset=131_071))
    _, plain, _ = layer.project(inputs(1, 1), Context())
    turn = torch.polar(torch.ones((), dtype=torch.float64), torch.tensor(131_071.0, dtype=torch.float64))
    expected = torch.complex(plain[..., 0], plain[..., 2]) * turn
    torch.testing.assert_close(torch.complex(k[..., 0], k[..., 2]), expected, rtol=0, atol=1e-6)


def test_mask_and_tables_are_made_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = attention.attention_mask
    monkeypatch.setattr(attention, "attention_mask", lambda *a, **k: made.append(a) or real(*a, **k))
    config = AttentionConfig(n_heads=2, position="rope", window=3)
    ctx = packed()
    for _ in range(3):
        build(config)(inputs(2, LENGTH), ctx)
    assert len(made) == 1
    assert len(ctx.cache) == 2


def test_window_state_is_a_ring_of_the_newest_tokens() -> None:
    layer = build(AttentionConfig(n_heads=2, window=4))
    x = inputs(1, 30)
    k = layer.project(x, Context())[1]
    for length in (3, 4, 5, 11, 30):
        _, state = layer(x[:, :length], Context(states=[]))
        slots = min(length, 4)
        assert state["k"].shape[1] == slots
        for position in range(length - slots, length):
            torch.testing.assert_close(state["k"][:, position % slots], k[:, position])


def test_documents_with_a_carried_state_are_refused() -> None:
    ctx = packed()
    ctx.states = []
    with pytest.raises(ValueError, match="one document per row"):
        build(AttentionConfig(n_heads=2))(inputs(2, LENGTH), ctx)


def test_published_sizes() -> None:
    # Granite-4.0-H-Micro: 8192 bytes of keys and values per token in 4 layers, 8 GiB for 8 sessions of 128k.
    config = AttentionConfig(n_heads=32, n_kv_heads=8)
    assert 4 * sum(config.state_bytes(2048, 1, 1)) == 8192
    assert 4 * sum(config.state_bytes(2048, 8, 131072)) == 8 * 2**30
    assert config.num_params(2048) == 2048 * 2048 * 2 + 2 * 2048 * 512
    assert config.model_copy(update={"window": 2048}).state_bytes(2048, 8, 131072).kv == 8 * 2048 * 2048


def test_flops_by_hand() -> None:
    config = AttentionConfig(n_heads=32, n_kv_heads=8, head_dim=64)
    projections = 2 * 2048 * (2048 + 2 * 512) + 2 * 2048 * 2048
    assert config.flops(2048, 4096) == projections + 2 * 2048 * 4096
    assert config.flops(2048, 131072) == projections + 2 * 2048 * 131072
    # 45 Mamba-2 and 5 such layers: 2.86, 3.45 and 5.46 GF per token at 4k, 32k and 128k.
    for length, expected in ((4096, 2.86), (32768, 3.45), (131072, 5.46)):
        total = 45 * 54_855_680 + 5 * config.flops(2048, length) + 2 * 2048 * 50288
        assert round(total / 1e9, 2) == expected
    # A window of 1024 in 4096 tokens: 1024 - 1024**2 / 8192 = 896 keys on average.
    window = config.model_copy(update={"window": 1024})
    assert window.flops(2048, 4096) == projections + 4 * 2048 * 896
    assert window.flops(2048, 512) == config.flops(2048, 512)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n_heads": 3}, "n_heads"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads"),
        ({"n_heads": 4, "position": "rope", "rope_fraction": 0.25}, "rope_fraction"),
        ({"n_heads": 4, "rope_fraction": 0.5}, "rope_fraction"),
        ({"n_heads": 4, "rope_theta": 5e5}, "rope_theta"),
        ({"n_heads": 4, "norm_eps": 1e-6}, "norm_eps"),
    ],
)
def test_check_names_the_field(fields: dict, field: str) -> None:
    assert [name for name, _ in AttentionConfig(**fields).check(D_MODEL)] == [field]
