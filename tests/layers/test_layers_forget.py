"""What autograd keeps of a layer, what it computes again, and that no gradient tells the difference."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ssmtrain.config.model import BlockConfig
from ssmtrain.kernels import backend, tuned
from ssmtrain.layers import conv, forget, linear, mamba1, mamba2, mlp, norm
from ssmtrain.layers.base import Context
from ssmtrain.model.block import Block
from ssmtrain.parallel.recompute import forgetful, recomputed

BLOCKS: dict[str, dict[str, Any]] = {
    "mamba1": {"mixer": {"kind": "mamba1", "d_state": 4}},
    "jamba": {"mixer": {"kind": "mamba1", "d_state": 4, "inner_norm": True}},
    "mamba2": {"mixer": {"kind": "mamba2", "d_state": 8, "head_dim": 8, "n_groups": 2}},
    "mlp": {"ffn": {"kind": "mlp", "hidden": 24}},
    "experts": {"ffn": {"kind": "moe", "hidden": 24, "n_experts": 4, "top_k": 2}},
    "attention": {"mixer": {"kind": "attention", "n_heads": 2}, "norm": "sandwich"},
}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU as on a GPU."""
    monkeypatch.setattr(forget, "DEVICES", {"cpu"})


def build(name: str) -> Block:
    """A block with weights that are all drawn."""
    torch.manual_seed(0)
    block = Block(BlockConfig(**BLOCKS[name]), 16, 1e-5, 1.0, True)
    for p in block.parameters():
        torch.nn.init.uniform_(p, -0.5, 0.5)
    return block


def gradients(block: Block, forward: Callable[..., Any], autocast: bool, packed: bool) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    torch.manual_seed(1)
    x = torch.randn(2, 9, 16, requires_grad=True)
    ctx = Context()
    if packed:
        ids = torch.tensor([[0] * 4 + [1] * 5, [2] * 9], dtype=torch.int32)
        ctx = Context(doc_ids=ids, n_docs=3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = forward(norm.Stream(x), ctx)[0].total(1.0)
    block.zero_grad()
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    found = {f"grad {name}": p.grad for name, p in block.named_parameters()}
    return {"y": y.detach(), "grad x": x.grad} | {k: v for k, v in found.items() if v is not None}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("name", BLOCKS)
def test_no_bit_of_a_gradient_changes(name: str, packed: bool, autocast: bool) -> None:
    block = build(name)
    kept = gradients(block, block.forward, autocast, packed)
    for wrap in (forgetful, lambda f: forgetful(recomputed(f)), lambda f: recomputed(forgetful(f))):
        found = gradients(block, wrap(block.forward), autocast, packed)
        assert found.keys() == kept.keys()
        for key, one in kept.items():
            assert torch.equal(one, found[key]), key


@pytest.mark.parametrize(
    "name,forgotten", [("mamba1", 3), ("jamba", 3), ("mamba2", 3), ("mlp", 2), ("attention", 1)]
)
def test_what_is_forgotten_is_gone(name: str, forgotten: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a forward pass nobody holds it; its gradients are right, so it was there again."""
    block, seen = build(name), []

    def spy(result: Tensor, *recipe: Any) -> Tensor:
        seen.append(StorageWeakRef(result.untyped_storage()))
        return forget.forget(result, *recipe)

    for module in (conv, mamba1, mamba2, mlp, norm):
        monkeypatch.setattr(module, "forget", spy)
    x = torch.randn(1, 7, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = forgetful(block.forward)(norm.Stream(x), Context())[0].total(1.0)
        assert len(seen) == forgotten
        # What is returned, or added to what is, is there as long as that.
        alive = [ref for ref in seen if not ref.expired()]
        assert len(alive) == 0
        seen.clear()
        kept = block.forward(norm.Stream(x), Context())[0].total(1.0)
    assert any(not ref.expired() for ref in seen)
    assert torch.equal(y, kept)


@pytest.mark.parametrize("name", ["mamba1", "jamba", "mamba2", "mlp"])
def test_each_is_made_again_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many read it: an op that asks twice for what it kept would have it made twice."""
    block, calls, seen = build(name), [], []
    monkeypatch.setattr(linear, "DEVICES", {"cpu"})

    def spy(result: Tensor, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        seen.append(function)
        which = len(seen)

        def made(*args: Any) -> Tensor:
            calls.append(which)
            return function(*args)

        return forget.forget(result, made, *inputs)

    for module in (conv, mamba1, mamba2, mlp, norm):
        monkeypatch.setattr(module, "forget", spy)
    x = torch.randn(1, 7, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = forgetful(block.forward)(norm.Stream(x), Context())[0].total(1.0)
    assert not calls
    y.square().sum().backward()
    assert calls and len(calls) == len(set(calls))


def counted() -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """A function, and how often it ran."""
    calls: list[int] = []
    return lambda x: calls.append(1) or x.exp(), calls  # type: ignore[func-returns-value]


def test_one_computation_serves_all_readers_of_a_pass() -> None:
    """Whole, in part, turned: and again in a second pass over the same graph."""
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    function, calls = counted()

    def run(y: Tensor) -> Tensor:
        return (y @ weight).square().sum() + y[1:, ::2].square().sum() + (y.t() @ y).sum()

    with forget.forgetting():
        loss = run(forget.forget(x.exp(), function, x))
    expected = torch.autograd.grad(run(x.exp()), (x, weight))
    assert not calls
    for times in (1, 2):
        found = torch.autograd.grad(loss, (x, weight), retain_graph=True)
        # exp keeps its own result, which is the same tensor: it is a reader too.
        assert len(calls) == times
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_computation_is_repeated_under_its_own_autocast() -> None:
    """The backward pass runs outside of it."""
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        kept = torch.autograd.grad(F.linear(x, weight).square().sum(), (x, weight))
        with forget.forgetting():
            loss = forget.forget(F.linear(x, weight), F.linear, x, weight).square().sum()
    found = torch.autograd.grad(loss, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


def test_readers_that_never_come_leave_nothing() -> None:
    """A gradient of the weight alone reads once; what was made is gone with the graph."""
    x, weight = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    made: list[StorageWeakRef] = []

    def function(x: Tensor) -> Tensor:
        y = x.exp()
        made.append(StorageWeakRef(y.untyped_storage()))
        return y

    with forget.forgetting():
        loss = (forget.forget(x.exp(), function, x) @ weight).sum()
    (found,) = torch.autograd.grad(loss, weight)
    assert torch.equal(found, x.detach().exp().t() @ torch.ones(4, 4))
    del loss
    assert len(made) == 1 and made[0].expired()


def test_where_nothing_is_forgotten() -> None:
    """Outside of the context, without gradients, elsewhere than on the devices, and of a part of a tensor."""
    x = torch.randn(4, 4, requires_grad=True)
    function, calls = counted()
    forget.forget(x.exp(), function, x).square().sum().backward()
    with forget.forgetting():
        with torch.no_grad():
            forget.forget(x.exp(), function, x)
        part = torch.cat([x, x]).exp()[:4]
        assert forget.forget(part, function, x) is part
        part.square().sum().backward()
        forget.DEVICES.clear()
        forget.forget(x.exp(), function, x).square().sum().backward()
    assert not calls


def test_an_address_that_is_used_again_is_another_tensor() -> None:
    """What is forgotten is freed, and its memory may be the next tensor's."""
    with forget.forgetting():
        total = torch.zeros(())
        for i in range(50):
            x = torch.full((64,), float(i), requires_grad=True)
            y = forget.forget(x + 1, lambda x: x + 1, x)
            z = (x + 2).detach().requires_grad_()
            total = total + (y * y).sum() + (z * z).sum()
            if i == 49:
                last = y.detach().clone(), z
    total.backward()
    assert torch.equal(last[1].grad, 2 * last[1].detach()) and torch.equal(x.grad, 2 * last[0])


def test_a_function_that_makes_something_else_is_told() -> None:
    x = torch.randn(4, requires_grad=True)
    with forget.forgetting():
        loss = forget.forget(x.exp(), lambda x: x.exp().double(), x).square().sum()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Norms in Triton, weights' gradients in fp32; returns the names of what is made again on request."""
    if not tuned.interpreting():
        pytest.skip("for the interpreter")
    monkeypatch.setattr(linear, "DEVICES", {"cpu"})
    ops = {op: "triton" if op == "gated_norm" else "reference" for op in backend.op_names()}
    monkeypatch.setattr(backend, "_current", backend.Backend("auto", "cpu", ops, "a test"))
    made: list[str] = []
    real = forget._Recipe.serve

    def serve(recipe: Any) -> Tensor:
        made.append(recipe.function.__qualname__)
        return real(recipe)

    monkeypatch.setattr(forget._Recipe, "serve", serve)
    return made


@pytest.mark.parametrize("name", ["mamba1", "mamba2", "mlp", "biased"])
def test_norms_and_the_products_that_read_them(
    name: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where kernels run, a norm's own backward pass makes it again: nothing else does."""
    monkeypatch.setitem(BLOCKS, "biased", {"ffn": {"kind": "mlp", "hidden": 24, "bias": True}})
    block = build(name)
    kept = gradients(block, block.forward, True, True)
    found = gradients(block, forgetful(block.forward), True, True)
    assert not [made for made in kernels if "GatedNorm" in made or made == "rms_norm"]
    assert found.keys() == kept.keys()
    for key, one in kept.items():
        assert torch.equal(one, found[key]), key
    monkeypatch.setattr(type(block.mixer or block.ffn), "entrance", None)
    gradients(block, forgetful(block.forward), True, True)
    assert "rms_norm" in kernels  # so it is where nobody says who reads it


@pytest.mark.parametrize("first", ["reader", "other"])
def test_another_reader_of_a_norm_has_it_made(first: str, kernels: list[str]) -> None:
    """Whoever reads it besides, also the same product a second time, keeps a recipe as always."""
    torch.manual_seed(0)
    entry, reader, other = norm.StreamNorm(16), linear.Linear(16, 8), linear.Linear(16, 8)
    for p in (entry.weight, reader.weight, other.weight):
        torch.nn.init.uniform_(p, -0.5, 0.5)
    x = torch.randn(2, 3, 16)

    def run(x: Tensor, *_: Any) -> Tensor:
        stream, y = entry(norm.Stream(x), reader)
        order = (reader, other, reader) if first == "reader" else (other, reader, reader)
        results = [layer(y).float().square() * (i + 1) for i, layer in enumerate(order)]
        return stream.sum(-1, keepdim=True) + sum(results[1:], results[0])

    found = []
    for wrap in (lambda f: f, forgetful):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = wrap(run)(leaf, None)
        leaves = [leaf, entry.weight, reader.weight, other.weight]
        found.append(torch.autograd.grad(y.sum(), leaves))
    assert kernels == ["rms_norm"] * 2
    for one, again in zip(*found, strict=True):
        torch.testing.assert_close(one, again, rtol=1e-6, atol=1e-6)


def test_a_norm_that_nothing_reads(kernels: list[str]) -> None:
    """The stream goes on, and the product's weight has no gradient."""
    entry, reader = norm.StreamNorm(16), linear.Linear(16, 8)
    for p in (entry.weight, reader.weight):
        torch.nn.init.uniform_(p, -0.5, 0.5)
    x = torch.randn(2, 3, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        stream, _ = forgetful(lambda x, *_: entry(norm.Stream(x), reader))(x, None)
    stream.square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach()) and reader.weight.grad is None and entry.weight.grad is None


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("read", [False, True])
def test_a_graph_does_not_hold_itself(read: bool, asked: bool, kernels: list[str]) -> None:
    """It is gone with its results, and no collector has to come first: a CUDA graph would record its ends."""
    entry, reader = norm.StreamNorm(16), linear.Linear(16, 8)
    for p in (entry.weight, reader.weight):
        torch.nn.init.uniform_(p, -0.5, 0.5)

    def run(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        stream, y = entry(norm.Stream(x, x.bfloat16()), reader if asked else None)
        return stream, reader(y) if read else y

    gc.collect()
    gc.disable()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            results = forgetful(run)(torch.randn(2, 3, 16, requires_grad=True), None)
        node = weakref.ref(results[0].grad_fn)
        assert node() is not None
        del results
        assert node() is None
    finally:
        gc.enable()
