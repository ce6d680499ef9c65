"""The model as a whole: initialisation, sums, states, norms and multipliers."""

import math

import pytest
import torch
from torch import nn

from ssmtrain.config.model import ModelConfig
from ssmtrain.layers.base import Context
from ssmtrain.layers.norm import Stream
from ssmtrain.model.count import build_meta, count_params, count_training
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights, n_branches

BLOCKS = {
    "M": {"mixer": {"kind": "mamba2", "d_state": 8, "head_dim": 8}},
    "A": {"mixer": {"kind": "attention", "n_heads": 2}, "ffn": {"kind": "mlp", "hidden": 24}},
    "E": {
        "mixer": {"kind": "mamba1", "d_state": 4},
        "ffn": {"kind": "moe", "n_experts": 4, "top_k": 2, "hidden": 8, "aux_coef": 0.1},
    },
    "F": {"ffn": {"kind": "mlp", "hidden": 24}},
}


def make(layout: str = "MAEF", seed: int = 0, **model: object) -> HybridModel:
    config = ModelConfig.model_validate({"d_model": 16, "layout": layout, "blocks": BLOCKS, **model})
    built = HybridModel(config, 31)
    init_weights(built, config.init, seed)
    return built


def test_formula_counts_the_module() -> None:
    for layout in ("M", "A", "E", "F", "MAEF"):
        for extra in ({}, {"tie_embeddings": False}):
            config = ModelConfig.model_validate({"d_model": 16, "layout": layout, "blocks": BLOCKS, **extra})
            total = sum(p.numel() for p in build_meta(config, 31).parameters())
            assert count_params(config, 31).total == total


def test_weights_depend_on_seed_and_name_only() -> None:
    a, b, other = make("MAEF"), make("MAEF"), make("MAEF", seed=1)
    longer = make("MAEFM", init={"rescale_residual": False})
    plain = make("MAEF", init={"rescale_residual": False})
    for name, p in a.named_parameters():
        assert torch.equal(p, b.get_parameter(name))
        assert torch.equal(plain.get_parameter(name), longer.get_parameter(name))
    assert not torch.equal(a.input.weight, other.input.weight)


def test_weights_are_drawn_on_the_cpu_whatever_the_default_device() -> None:
    a = make("MAEF")
    config = ModelConfig.model_validate({"d_model": 16, "layout": "MAEF", "blocks": BLOCKS})
    b = HybridModel(config, 31)
    with torch.device("meta"):
        init_weights(b, config.init, 0)
    assert all(torch.equal(p, b.get_parameter(name)) for name, p in a.named_parameters())


def test_residual_projections_are_divided_by_root_branches() -> None:
    scaled, plain = make("MAEF"), make("MAEF", init={"rescale_residual": False})
    assert n_branches(scaled) == 6
    specs = scaled.specs()
    seen = 0
    for name, p in scaled.named_parameters():
        factor = 1 / math.sqrt(6) if specs[name].residual else 1.0
        torch.testing.assert_close(p, plain.get_parameter(name) * factor)
        seen += specs[name].residual
    assert seen >= 6


def test_std_replaces_plain_projections_only() -> None:
    model = make("MAE", init={"std": 1e-4, "embedding_std": 0.02})
    specs = model.specs()
    for name, p in model.named_parameters():
        if specs[name].plain:
            assert p.std() < 2e-4, name
    assert float(model.input.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert model.get_parameter("blocks.0.mixer.A_log").abs().max() > 0.1


def test_sums_add_up_over_any_split_of_the_batch() -> None:
    model = make("MA").double()
    tokens, labels = torch.randint(31, (4, 12)), torch.randint(31, (4, 12))
    labels[1, 5:] = -100
    whole = model(tokens, labels)
    parts = [model(tokens[i : i + 1], labels[i : i + 1]) for i in range(4)]
    assert int(whole.n_labels) == 4 * 12 - 7
    torch.testing.assert_close(whole.loss_sum, torch.stack([p.loss_sum for p in parts]).sum())
    logits = model(tokens).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(whole.loss_sum, expected)


@pytest.mark.parametrize("norm", ["pre", "post", "sandwich"])
def test_where_norms_sit(norm: str) -> None:
    blocks = {"F": {"ffn": {"kind": "mlp", "hidden": 24}, "norm": norm}}
    config = ModelConfig.model_validate({"d_model": 16, "layout": "F", "blocks": blocks})
    model = HybridModel(config, 31)
    init_weights(model, config.init, 0)
    model = model.double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    block = model.blocks[0]

    def rms(t: torch.Tensor) -> torch.Tensor:
        return t / (t.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    y = block.ffn(rms(x) if norm != "post" else x, Context())[0]
    expected = x + (rms(y) if norm != "pre" else y)
    torch.testing.assert_close(block(Stream(x), Context())[0].total(1.0), expected)


def test_multipliers() -> None:
    plain = make("A", tie_embeddings=False).double()
    scaled = make("A", tie_embeddings=False, multipliers={"embedding": 3.0, "residual": 0.5, "logits": 0.25})
    scaled = scaled.double()
    tokens = torch.randint(31, (2, 6))
    x = plain.input(tokens) * 3.0
    block = plain.blocks[0]
    x = x + 0.5 * block.mixer(block.mixer_norm(Stream(x))[1], Context())[0]
    x = x + 0.5 * block.ffn(block.ffn_norm(Stream(x))[1], Context())[0]
    expected = nn.functional.linear(plain.head.norm(x), plain.head.weight) * 0.25
    torch.testing.assert_close(scaled(tokens).logits, expected)


def test_packed_documents_equal_documents_alone() -> None:
    model = make("MAEF").double()
    lengths = [5, 1, 9, 3]
    tokens = torch.randint(31, (1, sum(lengths)))
    ids = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])[None]
    packed = model(tokens, ctx=Context(doc_ids=ids, n_docs=4)).logits
    alone = torch.cat([model(part).logits for part in tokens.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone)


def test_prefill_and_steps_equal_the_full_pass() -> None:
    model = make("MAEF").double().eval()
    tokens = torch.randint(31, (2, 11))
    full = model(tokens).logits
    ctx = Context(states=model.init_states(2, 16, torch.float64))
    got = [model.prefill(tokens[:, :4], ctx)] + [model.step(tokens[:, i : i + 1], ctx) for i in range(4, 11)]
    torch.testing.assert_close(torch.stack(got, 1), full[:, 3:])
    assert ctx.offset == 11


def test_router_statistics_reach_the_output() -> None:
    model = make("ME")
    out = model(torch.randint(31, (2, 8)), torch.randint(31, (2, 8)))
    assert set(out.stats) == {1}
    assert int(out.stats[1]["load"].sum()) == 2 * 8 * 2
    assert out.aux is not None and out.aux.requires_grad and out.aux.item() > 0.0


def test_training_memory_estimate_is_near_what_autograd_keeps() -> None:
    from ssmtrain.config.schema import RunConfig

    blocks = {
        "M": {"mixer": {"kind": "mamba2", "d_state": 64, "head_dim": 64}},
        "A": {"mixer": {"kind": "attention", "n_heads": 4}, "ffn": {"kind": "mlp", "hidden": 512}},
    }
    page = {
        "model": {"d_model": 256, "layout": "MAMA", "blocks": blocks},
        "data": {"kind": "embedded", "seq_len": 256},
        "trainer": {"global_batch": 1024, "max_steps": 1},
    }
    config = RunConfig.model_validate(page)
    model = HybridModel(config.model, 257)
    init_weights(model, config.model.init, 0)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in owned:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    tokens = torch.randint(257, (4, 256))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(tokens, tokens)
    assert out.loss_sum is not None
    estimate = count_training(config, build_meta(config.model, 257), 257).activations
    assert 0.4 < estimate / sum(kept.values()) < 2.5
