"""The shipped recipes: every one loads, and the published ones have their published numbers of parameters."""

import pytest

from ssmtrain.config.catalog import headline, recipes
from ssmtrain.config.layout import expand
from ssmtrain.config.load import load
from ssmtrain.data.tokenizer import vocab_rows
from ssmtrain.model.count import build_meta, count_params, count_state
from ssmtrain.model.show import report

TOTALS = {
    "mamba_130m": (129_135_360, None),
    "mamba_370m": (371_516_416, None),
    "mamba_790m": (793_204_224, None),
    "mamba_1b4": (1_372_178_432, None),
    "mamba_2b8": (2_768_345_600, None),
    "mamba2_130m": (128_989_632, None),
    "mamba2_370m": (368_346_624, None),
    "mamba2_780m": (780_161_280, None),
    "mamba2_1b3": (1_343_757_312, None),
    "mamba2_2b7": (2_702_599_680, None),
    "granite4_h_350m": (340_332_224, None),
    "granite4_h_1b": (1_461_538_368, None),
    "granite4_h_micro": (3_191_396_096, None),
    "granite4_h_tiny": (6_939_037_248, 1_465_470_528),
    "granite4_h_small": (32_207_337_984, 8_803_121_664),
    "jamba_mini": (51_570_323_328, 12_110_311_296),
    "samba_421m": (421_793_280, None),
}

ATTENTION_AT = {
    "granite4_h_350m": [10, 13, 17, 27],
    "granite4_h_1b": [5, 15, 25, 35],
    "granite4_h_micro": [5, 15, 25, 35],
    "granite4_h_tiny": [5, 15, 25, 35],
    "granite4_h_small": [5, 15, 25, 35],
    "granite_9to1": [5, 15, 25, 35],
    "granite_9to1_1b3": [5, 15, 25, 35],
    "jamba_mini": [4, 12, 20, 28],
    "jamba_tiny": [4, 12],
    "samba_421m": [1, 3, 5, 7, 9, 11],
}


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals(name: str) -> None:
    config = load([f"config={name}"])
    total, active = TOTALS[name]
    built = build_meta(config.model, vocab_rows(config))
    assert sum(p.numel() for p in built.parameters()) == total
    params = count_params(config.model, vocab_rows(config))
    assert params.total == total
    assert params.active == (active or total)


@pytest.mark.parametrize("name", ATTENTION_AT)
def test_where_attention_stands(name: str) -> None:
    model = load([f"config={name}"]).model
    names = expand(model.layout, model.n_layers)
    at = [i for i, n in enumerate(names) if getattr(model.blocks[n].mixer, "kind", None) == "attention"]
    assert at == ATTENTION_AT[name]


def test_every_recipe_is_listed_and_shown() -> None:
    names = recipes()
    assert set(TOTALS) | set(ATTENTION_AT) | {"quickstart"} <= set(names)
    for name, page in names.items():
        assert headline(page), f"{name} has no description"
        config = load([f"config={name}"])
        counts, lines = report(config, vocab_rows(config))
        assert counts.flops.total > 0
        assert any("parameters" in line for line in lines)


# Weights and KV (GiB, 8 sessions of 131,072 tokens), SSM and conv state (MiB a session), as published.
SERVING = {
    "granite4_h_micro": (5.94, 8.00, 73.2),
    "granite4_h_tiny": (12.92, 8.00, 54.9),
    "granite4_h_small": (59.99, 16.00, 146.3),
    "granite4_h_1b": (2.72, 8.00, 54.9),
    "granite4_h_350m": (0.63, 4.00, 21.4),
    "jamba_mini": (96.06, 16.00, 15.8),
    "mamba2_2b7": (5.03, 0.0, 162.6),
    "mamba_2b8": (5.16, 0.0, 22.5),
}


@pytest.mark.parametrize("name", SERVING)
def test_serving_memory(name: str) -> None:
    config = load([f"config={name}"])
    weights, kv, state = SERVING[name]
    params = count_params(config.model, vocab_rows(config))
    held = count_state(config.model, 8, 131072)
    assert params.total * 2 / 2**30 == pytest.approx(weights, abs=0.006)
    assert held.kv / 2**30 == pytest.approx(kv, abs=0.006)
    assert (held.conv + held.ssm) / 8 / 2**20 == pytest.approx(state, abs=0.06)
