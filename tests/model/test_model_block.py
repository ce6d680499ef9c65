"""The block: what its branches are handed, and that the stream beside a norm changes no number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmtrain.config.model import ModelConfig
from ssmtrain.kernels import backend
from ssmtrain.kernels.gated_norm import gated_norm
from ssmtrain.kernels.tuned import interpreting
from ssmtrain.layers import forget
from ssmtrain.layers.base import Context
from ssmtrain.layers.norm import RMSNorm, Stream, StreamNorm
from ssmtrain.model.block import Block
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights
from ssmtrain.parallel.apply import apply
from ssmtrain.parallel.recompute import recomputed

BF16 = torch.bfloat16
MLP = {"kind": "mlp", "hidden": 24}
MOE = {"kind": "moe", "n_experts": 4, "top_k": 2, "hidden": 8, "shared_hidden": 8}
BLOCKS = {
    "M": {"mixer": {"kind": "mamba2", "d_state": 8, "head_dim": 8}},
    "A": {"mixer": {"kind": "attention", "n_heads": 2}, "ffn": MLP},
    "E": {"mixer": {"kind": "mamba1", "d_state": 4}, "ffn": MOE},
}


def make(layout: str, norm: str = "pre") -> HybridModel:
    """A small model whose norms' weights are not one."""
    blocks = {name: block | {"norm": norm} for name, block in BLOCKS.items()}
    config = ModelConfig.model_validate({"d_model": 16, "layout": layout, "blocks": blocks})
    model = HybridModel(config, 31)
    init_weights(model, config.init, 0)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (RMSNorm, StreamNorm)):
            nn.init.uniform_(module.weight, 0.5, 2.0, generator=generator)
    return model


def stream(device: str = "cpu") -> Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(2)).to(device)


def results(block: Block, forward: Callable[..., Any], x: Tensor, autocast: bool) -> dict[str, Tensor]:
    """The stream after the block and all gradients, by name."""
    block.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, BF16, enabled=autocast):
        y = forward(Stream(x), Context(), None)[0].total(block.multiplier)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y))
    grads = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(block.parameters()))
    return {"y": y.detach(), "x": x.grad} | grads


def in_steps(block: Block) -> Callable[..., Any]:
    """The block's sum written out, with one op for the norm and one for the sum."""

    def norm(module: StreamNorm, x: Tensor) -> Tensor:
        return gated_norm(x, None, module.weight, eps=module.eps)

    def forward(stream: Stream, ctx: Context, state: None) -> tuple[Stream]:
        x = stream.x
        if block.mixer is not None:
            x = x + block.mixer(norm(block.mixer_norm, x), ctx, None)[0]
        if block.ffn is not None:
            x = x + block.ffn(norm(block.ffn_norm, x), ctx)[0]
        return (Stream(x),)

    return forward


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        gap = (found[name] - value).norm() / value.norm().clamp(min=1e-12)
        assert gap <= tolerance, (name, float(gap))


def handed(model: HybridModel) -> dict[str, torch.dtype]:
    """The dtype that each branch and the head's projection are handed under autocast."""
    found: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if name.endswith((".mixer", ".ffn")):
            module.register_forward_pre_hook(lambda m, args, name=name: found.update({name: args[0].dtype}))
    model.head.norm.register_forward_hook(lambda m, args, out: found.update(head=out.dtype))
    tokens = torch.randint(31, (2, 6))
    with torch.autocast("cpu", BF16):
        model(tokens, tokens)
    return found


def test_autocast_hands_bf16_to_linears_and_fp32_to_routers() -> None:
    found = handed(make("MAE"))
    fp32 = {name for name, dtype in found.items() if dtype == torch.float32}
    assert fp32 == {"blocks.2.ffn"} and len(found) == 6
    assert all(found[name] == BF16 for name in found.keys() - fp32)


def test_the_router_sees_what_it_saw_with_fp32_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the forward pass is as it was, in fact: a Linear rounds its input in the same way."""
    model, tokens = make("MAE"), torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    moe = model.blocks[2].ffn
    route = moe.route
    monkeypatch.setattr(moe, "route", lambda x: seen.append(x) or route(x))
    with torch.autocast("cpu", BF16):
        logits = model(tokens).logits
        for module in model.modules():
            if isinstance(module, (RMSNorm, StreamNorm)):
                module.keep_fp32 = True
        before = model(tokens).logits
    assert torch.equal(logits, before)
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[0].bfloat16().float())


@pytest.mark.parametrize("layout", ["M", "A", "E"])
def test_in_fp32_on_the_cpu_the_bits_are_those_of_norm_and_sum(layout: str) -> None:
    block = make(layout).blocks[0]
    found, expected = (results(block, run, stream(), False) for run in (block.forward, in_steps(block)))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("norm", ["post", "sandwich"])
def test_post_norms_leave_the_stream_alone(norm: str) -> None:
    block, x = make("A", norm).blocks[0], stream()
    passed, h = block._enter("mixer", Stream(x))
    assert passed is x and (h is x) == (norm == "post")
    with torch.autocast("cpu", BF16):
        # In the dtype that they are given: they go to the sum, and no Linear reads them.
        assert block.mixer_post_norm(x).dtype == torch.float32
        assert block(Stream(x), Context())[0].x.dtype == torch.float32


@contextmanager
def triton_norms(device: str) -> Iterator[None]:
    """The norm's Triton body in force, in the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    ops = {op: "triton" if op == "gated_norm" else "reference" for op in backend.op_names()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_current", backend.Backend("auto", device, ops, "a test"))
        if interpreting():
            from kernels.triton.shim import repaired

            with repaired():
                yield
        else:
            yield


@pytest.mark.skipif(not interpreting(), reason="runs a kernel on CPU tensors")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", ["M", "A", "E"])
def test_through_the_triton_norm(layout: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter: as the reference, also recomputed, with one backward pass per pre norm."""
    from ssmtrain.kernels.gated_norm import triton as ours

    block = make(layout).blocks[0]
    expected = results(block, block.forward, stream(), autocast)
    added: list[bool] = []
    back = ours._stream_norm_back.body
    spy = lambda *args: added.append(args[4] is not None) or back(*args)  # noqa: E731
    monkeypatch.setattr(ours._stream_norm_back, "body", spy)
    with triton_norms("cpu"):
        found = results(block, block.forward, stream(), autocast)
        assert sum(added) == (block.mixer is not None) + (block.ffn is not None)
        again = results(block, recomputed(block.forward), stream(), autocast)
    assert_near(found, expected, 2e-2 if autocast else 1e-5)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", ["M", "A"])
def test_compiled_as_eager(layout: str, autocast: bool) -> None:
    block = make(layout).blocks[0]
    expected = results(block, block.forward, stream(), autocast)
    torch._dynamo.reset()
    compiled = torch.compile(block.forward, backend="aot_eager")
    assert_near(results(block, compiled, stream(), autocast), expected, 2e-2 if autocast else 1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_and_recomputed(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep model: the gradients of calling it, a graph for each kind of block, and none that is broken."""
    from torch._dynamo.utils import counters

    compile_it = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_it(f, backend="aot_eager"))
    ids = torch.tensor([[0] * 4 + [1] * 5, [2] * 9], dtype=torch.int32)
    tokens = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for options in ({}, {"compile": True, "recompute": "block"}):
        torch._dynamo.reset()
        counters.clear()
        model = make("M3A" * 4)
        apply(model, SimpleNamespace(**{"compile": False, "recompute": "none"} | options))
        ctx = Context(doc_ids=ids, n_docs=3) if packed else Context()
        loss = model(tokens, tokens, ctx).loss_sum
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_kept_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, cheap ops or whole blocks are computed again, and the gradients have the same bits."""
    tokens = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    runs: list[bool] = []
    served: list[bool] = []
    serve = forget._Recipe.serve
    monkeypatch.setattr(forget, "DEVICES", {"cpu"})
    monkeypatch.setattr(forget._Recipe, "serve", lambda recipe: served.append(True) or serve(recipe))
    gradients, again = {}, {}
    for what in ("none", "ops", "block"):
        model = make("M3A")
        for block in model.blocks:
            block.mixer.register_forward_pre_hook(lambda *_: runs.append(True))
        apply(model, SimpleNamespace(compile=False, recompute=what))
        model(tokens, tokens, Context()).loss_sum.backward()
        gradients[what] = [p.grad for p in model.parameters()]
        again[what] = (len(runs) - 4, bool(served))
        runs.clear()
        served.clear()
    assert again == {"none": (0, False), "ops": (0, True), "block": (4, False)}
    for what in ("ops", "block"):
        assert all(torch.equal(a, b) for a, b in zip(gradients["none"], gradients[what], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", ["M", "A", "E"])
def test_on_a_gpu(layout: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused, written out, recomputed and compiled agree."""
    monkeypatch.setattr(backend, "_current", None)
    block, x = make(layout).blocks[0].cuda(), stream("cuda")
    found = results(block, block.forward, x, autocast)
    tolerance = 2e-2 if autocast else 1e-4
    assert_near(found, results(block, in_steps(block), x, autocast), tolerance)
    again = results(block, recomputed(block.forward), x, autocast)
    assert all(torch.equal(found[name], again[name]) for name in found)
    torch._dynamo.reset()
    assert_near(results(block, torch.compile(block.forward), x, autocast), found, tolerance)
