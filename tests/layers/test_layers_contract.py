"""The contract that every layer kind signs, found by discovery and run on the examples of its test file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layers.cases import (
    D_MODEL,
    DOCUMENTS,
    LENGTH,
    assert_same,
    build,
    examples,
    gradients,
    inputs,
    packed,
    page,
    spans,
    specs,
)
from ssmtrain.layers import ffn_kinds, mixer_kinds
from ssmtrain.layers.base import Context, FfnConfig, LayerConfig, MixerConfig

MIXERS, FFNS = examples(mixer_kinds()), examples(ffn_kinds())
ALL = {**MIXERS, **FFNS}
KINDS = {**mixer_kinds(), **ffn_kinds()}
STATE_GROUP = {"k": "kv", "v": "kv", "conv": "conv", "ssm": "ssm"}

mixers = pytest.mark.parametrize("config", MIXERS.values(), ids=MIXERS)
ffns = pytest.mark.parametrize("config", FFNS.values(), ids=FFNS)
layers = pytest.mark.parametrize("config", ALL.values(), ids=ALL)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_page_of_examples(kind: str) -> None:
    module = page(kind)
    assert module is not None, f"write tests/layers/test_layers_{kind}.py with EXAMPLES, FP32 and NO_DECAY"
    assert module.EXAMPLES, f"{kind}: EXAMPLES is empty"
    assert {config.kind for config in ALL.values()} == set(KINDS)  # type: ignore[attr-defined]  # every kind has one


@layers
def test_examples_fit(config: LayerConfig) -> None:
    assert list(config.check(D_MODEL)) == []


@layers
def test_output_has_the_shape_and_dtype_of_the_input(config: LayerConfig) -> None:
    for dtype in (torch.float32, torch.float64):
        for batch, length in ((1, 1), (2, 3), (3, LENGTH)):
            x = inputs(batch, length, dtype)
            y, _ = build(config, dtype)(x, Context())
            assert y.shape == x.shape and y.dtype == dtype


@mixers
def test_changing_a_token_leaves_earlier_outputs_bit_identical(config: MixerConfig) -> None:
    assert config.causal, "bidirectional kinds need their own clause here"
    length = 150
    layer = build(config, torch.float32)
    x = inputs(2, length, torch.float32)
    with torch.no_grad():
        y, _ = layer(x, Context())
        for t in (0, 1, 63, 64, 100, length - 1):
            changed = x.clone()
            changed[0, t] += 3.0
            z, _ = layer(changed, Context())
            assert torch.equal(z[0, :t], y[0, :t])
            assert torch.equal(z[1], y[1])
            assert not torch.equal(z[0, t], y[0, t])


@ffns
def test_changing_a_token_leaves_other_outputs(config: FfnConfig) -> None:
    layer = build(config, torch.float32)
    x = inputs(2, LENGTH, torch.float32)
    with torch.no_grad():
        y, _ = layer(x, Context())
        for t in (0, 20, LENGTH - 1):
            changed = x.clone()
            changed[0, t] += 3.0
            z, _ = layer(changed, Context())
            others = torch.ones(2, LENGTH, dtype=torch.bool)
            others[0, t] = False
            torch.testing.assert_close(z[others], y[others], rtol=1e-6, atol=1e-6 * y.abs().max().item())
            assert not torch.equal(z[0, t], y[0, t])


@pytest.mark.parametrize(
    "config",
    [c for c in MIXERS.values() if "chunk_size" in type(c).model_fields],
    ids=[n for n, c in MIXERS.items() if "chunk_size" in type(c).model_fields],
)
def test_chunk_size_does_not_matter(config: MixerConfig) -> None:
    found = []
    for chunk in (None, 1, 8, 16, 64):
        layer = build(config.model_copy(update={"chunk_size": chunk}))
        x = inputs(2, LENGTH).requires_grad_()
        y, _ = layer(x, packed())
        found.append({"output": y.detach(), **gradients(layer, y, x)})
    for other in found[1:]:
        assert_same(found[0], other)


@mixers
def test_steps_equal_the_full_pass(config: MixerConfig) -> None:
    layer = build(config)
    x = inputs(2, LENGTH)
    with torch.no_grad():
        whole, _ = layer(x, Context())
        ctx, state = Context(states=[]), layer.init_state(2, LENGTH, torch.float64, x.device)
        tensors = dict(state)
        steps = []
        for t in range(LENGTH):
            steps.append(layer.step(x[:, t : t + 1], ctx, state))
            ctx.offset += 1
    assert_same({"y": whole}, {"y": torch.cat(steps, 1)})
    for name, tensor in tensors.items():
        assert state[name] is tensor, f"{name} was replaced: a step updates the state in place"


@mixers
@pytest.mark.parametrize("allocated", [False, True])
def test_prefill_then_steps_equal_the_full_pass(config: MixerConfig, allocated: bool) -> None:
    layer = build(config)
    x = inputs(2, LENGTH)
    with torch.no_grad():
        whole, _ = layer(x, Context())
        state = layer.init_state(2, LENGTH, torch.float64, x.device) if allocated else None
        ctx = Context(states=[])
        pieces = []
        for start, end in ((0, 9), (9, 23)):
            y, state = layer(x[:, start:end], ctx, state)
            ctx.offset = end
            pieces.append(y)
        for t in range(23, LENGTH):
            pieces.append(layer.step(x[:, t : t + 1], ctx, state))
            ctx.offset += 1
    assert_same({"y": whole}, {"y": torch.cat(pieces, 1)})


@layers
def test_packed_documents_equal_separate_ones(config: LayerConfig) -> None:
    layer = build(config)
    x = inputs(2, LENGTH).requires_grad_()
    y, _ = layer(x, packed())
    together = {"output": y.detach(), **gradients(layer, y, x)}
    rows = [
        torch.cat([layer(x[b : b + 1, s:e], Context())[0] for b, s, e in spans() if b == row], dim=1)
        for row in range(len(DOCUMENTS))
    ]
    y = torch.cat(rows)
    apart = {"output": y.detach(), **gradients(layer, y, x)}
    assert_same(apart, together)


@mixers
def test_split_and_carry_equals_whole(config: MixerConfig) -> None:
    layer = build(config)
    x = inputs(2, LENGTH).requires_grad_()
    y, none = layer(x, Context())
    assert none is None
    whole = {"output": y.detach(), **gradients(layer, y, x)}
    for cuts in ((0, 13, LENGTH), (0, 1, 2, 20, LENGTH)):
        ctx, state, pieces = Context(states=[]), None, []
        for start, end in pairwise(cuts):
            before = (
                None if state is None else {name: value.detach().clone() for name, value in state.items()}
            )
            given = state
            y, state = layer(x[:, start:end], ctx, given)
            if before is not None:
                assert all(torch.equal(given[name], before[name]) for name in before), (
                    "the state was written to"
                )
            ctx.offset = end
            pieces.append(y)
        y = torch.cat(pieces, 1)
        assert_same(whole, {"output": y.detach(), **gradients(layer, y, x)})


@layers
def test_num_params_equals_the_module_on_meta(config: LayerConfig) -> None:
    for d_model in (D_MODEL, 48):
        with torch.device("meta"):
            layer = config.build(d_model)
        assert config.num_params(d_model) == sum(p.numel() for p in layer.parameters())
        assert 0 < config.num_active_params(d_model) <= config.num_params(d_model)


@layers
def test_flops_are_positive_and_grow_with_length(config: LayerConfig) -> None:
    flops = [config.flops(D_MODEL, length) for length in (1, 2, 7, 64, 1000, 100_000)]
    assert all(type(f) is int and f > 0 for f in flops)
    assert flops == sorted(flops)


@mixers
def test_state_bytes_equal_the_allocated_state(config: MixerConfig) -> None:
    for sessions, context in ((1, 5), (3, 50)):
        state = build(config).init_state(sessions, context, torch.bfloat16, torch.device("cpu"))
        allocated = {"kv": 0, "conv": 0, "ssm": 0}
        for name, tensor in state.items():
            assert tensor.dtype == (torch.float32 if name == "ssm" else torch.bfloat16)
            assert tensor.count_nonzero() == 0
            allocated[STATE_GROUP[name]] += tensor.nbytes
        assert config.state_bytes(D_MODEL, sessions, context)._asdict() == allocated


@mixers
def test_bf16_states_keep_their_shape_and_dtype(config: MixerConfig) -> None:
    layer = build(config, torch.float32)
    x = inputs(2, 12, torch.float32)
    ctx, state = Context(states=[]), layer.init_state(2, 12, torch.bfloat16, x.device)
    before = {name: (t.shape, t.dtype) for name, t in state.items()}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(x[:, :7], ctx, state)
        assert {name: (t.shape, t.dtype) for name, t in state.items()} == before
        for ctx.offset in range(7, 12):
            y = torch.cat([y, layer.step(x[:, ctx.offset : ctx.offset + 1], ctx, state)], 1)
        assert {name: (t.shape, t.dtype) for name, t in state.items()} == before
        whole, _ = layer(x, Context())
    torch.testing.assert_close(y.float(), whole.float(), rtol=0.05, atol=0.05 * whole.abs().max().item())


@layers
def test_bf16_outputs_are_near_fp32_and_gradients_finite(config: LayerConfig) -> None:
    layer = build(config, torch.float32)
    x = inputs(2, LENGTH, torch.float32).requires_grad_()
    y, _ = layer(x, packed())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, _ = layer(x, packed())
    assert z.dtype == torch.bfloat16
    for name, grad in gradients(layer, z, x).items():
        assert grad.isfinite().all(), name
    torch.testing.assert_close(z.float(), y, rtol=0.1, atol=0.1 * y.abs().max().item())


@layers
def test_saved_and_loaded_is_the_same_layer(config: LayerConfig, tmp_path: Path) -> None:
    layer = build(config, torch.float32)
    x = inputs(2, LENGTH, torch.float32)
    with torch.no_grad():
        for buffer in layer.buffers():
            buffer.add_(torch.linspace(0, 1, buffer.numel()))
        save_file(layer.state_dict(), tmp_path / "layer.safetensors")
        other = config.build(D_MODEL)
        other.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
        assert torch.equal(layer(x, Context())[0], other(x, Context())[0])


@layers
def test_parameters_are_marked_as_the_kind_says(config: LayerConfig) -> None:
    module = page(config.kind)  # type: ignore[attr-defined]  # every kind has one
    declared = specs(config.build(D_MODEL))
    names = set(dict(config.build(D_MODEL).named_parameters()))
    assert names == set(declared), "every parameter is declared"
    assert {n for n, s in declared.items() if s.fp32} == {n for n in names if n in module.FP32}
    assert {n for n, s in declared.items() if not s.decay} == {n for n in names if n in module.NO_DECAY}
    outputs = {n for n, s in declared.items() if s.residual}
    assert outputs, "the projection into the residual stream is marked"
