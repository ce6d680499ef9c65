"""Our AdamW in torch's place: the same steps, the same state, copies that products then read."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cases import distance
from ssmtrain.config.optim import AdamWConfig
from ssmtrain.kernels import backend, narrow
from ssmtrain.layers import linear
from ssmtrain.layers.linear import Linear
from ssmtrain.train import optim
from ssmtrain.train.adamw import AdamW

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, device=device)) for shape in ((40, 30), (7,), (2, 3, 5))]


def groups(some: list[nn.Parameter]) -> list[dict]:
    return [{"params": some[:1], "weight_decay": 0.1}, {"params": some[1:], "weight_decay": 0.0}]


def feed(some: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in some:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p)


def check(device: str) -> None:
    """Ten steps, of which some are clipped, and one without one of the gradients."""
    mine, theirs = parameters(device), [nn.Parameter(p.detach().double()) for p in parameters(device)]
    ours = AdamW(groups(mine), copies=True, **OPTIONS)
    other = torch.optim.AdamW(groups(theirs), **OPTIONS)
    for step in range(10):
        for some in (mine, theirs):
            feed(some, step, 0.01 if step % 3 else 1.0)
            if step == 4:
                some[1].grad = None
        norm, exact = (
            optim.norm_of([ours], torch.device(device)),
            torch.nn.utils.get_total_norm([p.grad for p in theirs if p.grad is not None]),
        )
        assert float(norm) == pytest.approx(float(exact), rel=1e-6)
        optim.take_step([ours], 1.0, norm, float(norm))
        torch.nn.utils.clip_grads_with_norm_(theirs, 1.0, exact)
        other.step()
        ours.zero_grad()
    for p, truth in zip(mine, theirs, strict=True):
        assert distance(p.detach(), truth.detach()) < 1e-6
        for key in ("exp_avg", "exp_avg_sq"):
            assert distance(ours.state[p][key], other.state[truth][key]) < 1e-6
        assert float(ours.state[p]["step"]) == float(other.state[truth]["step"])
    assert [float(ours.state[p]["step"]) for p in mine] == [10.0, 9.0, 10.0]


def test_steps_are_those_of_torch() -> None:
    check("cpu")


@pytest.mark.gpu
def test_steps_are_those_of_torch_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_current", None)
    backend.configure("auto", "cuda")
    assert AdamW.takes(parameters("cuda"))
    check("cuda")


def test_state_goes_to_torch_and_back() -> None:
    """What one saves the other continues from."""
    first, second = parameters(), parameters()
    ours, other = AdamW(groups(first), copies=False, **OPTIONS), torch.optim.AdamW(groups(second), **OPTIONS)
    named = [{f"p{i}": p for i, p in enumerate(some)} for some in (first, second)]
    for seed in range(3):
        feed(first, seed)
        ours.step()
    with torch.no_grad():
        for p, q in zip(first, second, strict=True):
            q.copy_(p)
    optim.load_state_tensors(
        [other], named[1], {k: v.clone() for k, v in optim.state_tensors([ours], named[0]).items()}
    )
    for some, optimizer in ((first, ours), (second, other)):
        feed(some, 3)
        optimizer.step()
    assert all(distance(p.detach(), q.detach()) < 1e-7 for p, q in zip(first, second, strict=True))
    optim.load_state_tensors(
        [ours], named[0], {k: v.clone() for k, v in optim.state_tensors([other], named[1]).items()}
    )
    feed(first, 4)
    ours.step()
    assert {float(ours.state[p]["step"]) for p in first} == {5.0}


@pytest.mark.parametrize("limit", [None, 0.5])
def test_beside_another_optimiser_one_norm_clips_all(limit: float | None) -> None:
    """As with Muon: the factor reaches the gradients of both, in the register of one."""
    mine, plain = parameters(), parameters()
    pairs = []
    for some, kind in ((mine, partial(AdamW, copies=False)), (plain, torch.optim.AdamW)):
        rest = [{"params": some[:1], "weight_decay": 0.1}]
        pairs.append([kind(rest, **OPTIONS), torch.optim.SGD(some[1:], lr=0.1)])
        feed(some, 0)
    for some, optimizers in zip((mine, plain), pairs, strict=True):
        norm = optim.norm_of(optimizers, torch.device("cpu"))
        assert float(norm) == pytest.approx(float(torch.nn.utils.get_total_norm([p.grad for p in some])))
        optim.take_step(optimizers, limit, norm, float(norm))
    for p, q in zip(mine, plain, strict=True):
        assert distance(p.detach(), q.detach()) < 1e-6
    assert (float(plain[1].grad.norm()) < 0.5) == (limit is not None)


def test_what_was_prepared_is_not_stepped_twice() -> None:
    """A step that is left out lets go of its gradient, and the next has its own."""
    (p, *_) = parameters()
    ours = AdamW([{"params": [p], "weight_decay": 0.0}], copies=False, **OPTIONS)
    feed([p], 0)
    ours.prepare()
    ours.zero_grad()
    before = p.detach().clone()
    ours.step()
    assert torch.equal(p, before)
    feed([p], 1)
    ours.step()
    assert not torch.equal(p, before)
    with pytest.raises(ValueError, match="takes no closure"):
        ours.step(lambda: 0.0)


def test_products_read_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on; to the bit what rounding gives, also when the weight is loaded anew."""
    monkeypatch.setattr(linear, "DEVICES", {"cpu"})
    torch.manual_seed(0)
    layer = Linear(24, 40)
    nn.init.normal_(layer.weight)
    ours = AdamW([{"params": [layer.weight], "weight_decay": 0.1}], copies=True, **OPTIONS)
    x = torch.randn(3, 24)

    def product() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    def plain() -> Tensor:
        return F.linear(x.bfloat16(), layer.weight.detach().bfloat16())

    for _ in range(3):
        y = product()
        assert torch.equal(y, plain())
        y.float().square().sum().backward()
        ours.step()
        ours.zero_grad()
        assert narrow.narrow(layer.weight, torch.bfloat16) is narrow.asked(layer.weight)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(40, 24))
    assert torch.equal(product(), plain())


def test_ours_is_taken_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Linear(4, 4)
    named = {"weight": layer.weight}
    specs = layer.param_specs
    (found,) = optim.build_optimizers(named, specs, AdamWConfig())
    assert type(found) is torch.optim.AdamW
    monkeypatch.setattr("ssmtrain.train.adamw.fits", lambda p: True)
    (found,) = optim.build_optimizers(named, specs, AdamWConfig(), copies=True)
    assert type(found) is AdamW and found.copies
    (found,) = optim.build_optimizers(named, specs, AdamWConfig(), own=False)
    assert type(found) is torch.optim.AdamW
