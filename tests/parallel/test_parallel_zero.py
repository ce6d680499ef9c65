"""DeepSpeed's engine on two gloo ranks: what it holds, sends, sums, drops, and gives back to the bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

SCRIPT = """
import copy, sys, torch
from contextlib import nullcontext
from functools import partial
from pathlib import Path
import torch.distributed as dist

sent = {}
def counting(name):
    real = getattr(dist, name)
    def call(*args, **kwargs):
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        sent[name] = sent.get(name, 0) + max(t.nbytes for t in tensors)
        return real(*args, **kwargs)
    setattr(dist, name, call)
for name in ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
    counting(name)

from ssmtrain.config import schema
from ssmtrain.kernels import backend
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights
from ssmtrain.model.spread import count_sent
from ssmtrain.parallel import ranks, zero
from ssmtrain.parallel.apply import apply
from ssmtrain.parallel.shard import as_held, in_pieces, like, mine, on_first, tensors_of, to_write
from ssmtrain.train import optim
from ssmtrain.train.callbacks.health import gradient_norms
from train.conftest import page

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
backend.configure("auto", "cpu")
config = page(Path(sys.argv[1]))
changes = {"d_model": 20, "layout": "MAMAMA", "tie_embeddings": True}
shape = type(config.model).model_validate({**config.model.model_dump(), **changes})
first = HybridModel(shape, 257)
init_weights(first, shape.init, 0)
total = sum(p.numel() for p in first.parameters())
rows = torch.randint(257, (3, world, 2, 33), generator=torch.Generator().manual_seed(0))  # pass, rank


def loss(forward, i, r):
    inputs, labels = rows[i, r, :, :-1], rows[i, r, :, 1:].contiguous()
    return forward(inputs, labels, Context(n_docs=2)).loss_sum / 64


def by_torch(model, opt, autocast):
    for i in range(2):
        for r in range(world):
            with autocast():
                value = loss(model, i, r)
            (value / world).backward()
    grads = [(n, p.grad.clone()) for n, p in model.named_parameters()]
    norm = optim.gradient_norm(list(model.parameters()))
    optim.clip_gradients(list(model.parameters()), 1.0, norm, float(norm))
    optim.set_lr([opt], 0.02)
    opt.step()
    opt.zero_grad()
    return norm, grads


def written(tensors):
    # What the ranks write together, as rank 0 has it.
    own = to_write(tensors)
    found = {}
    for name in sorted(tensors):
        there = ranks.gather(torch.tensor([name in own]))
        assert sum(map(int, there)) == 1, name
        shape = tensors[name].shape
        value = own[name].detach().clone() if name in own else torch.zeros(shape)
        dist.broadcast(value, [bool(t) for t in there].index(True))
        found[name] = value
    return found, sum(t.nbytes for t in own.values())


def check(how):
    one, model = copy.deepcopy(first), copy.deepcopy(first)
    autocast = nullcontext if how.reduce == "fp32" else partial(torch.autocast, "cpu", torch.bfloat16)
    recompute = "block" if getattr(how, "offload_params", False) else "ops"
    apply(model, config.trainer.model_copy(update={"recompute": recompute}))
    if how.stage == 3:
        zero.cut(model, torch.device("cpu"), how)
    specs = one.specs()
    (ours,) = optim.build_optimizers(dict(one.named_parameters()), specs, config.optim)
    named = dict(model.named_parameters())
    (opt,) = optim.build_optimizers(named, specs, config.optim)
    engine = zero.start(
        model, opt, how, torch.device("cpu"), clip=1.0, passes=2, autocast=autocast,
        check=partial(optim.check_state, optim.owners([opt])),
    )
    cut = [name for name, p in named.items() if in_pieces(p)]
    assert bool(cut) == (how.stage == 3)
    if cut:
        held = sum(mine(p).numel() for p in named.values())
        assert held < 0.51 * total, (held, total)
        assert sum(p.numel() for p in named.values()) < 0.01 * total  # between passes

    # State, then put in: given back to the bit, each tensor by one rank, about as many bytes by each.
    generator = torch.Generator().manual_seed(1)
    saved = {f"{n}/step": torch.tensor(5.0) for n in named}
    for n, p in one.named_parameters():
        saved[f"{n}/exp_avg"] = torch.randn(p.shape, generator=generator) * 1e-3
        saved[f"{n}/exp_avg_sq"] = torch.rand(p.shape, generator=generator) * 1e-3
    try:
        engine.load(named, {k: v for k, v in saved.items() if k != "input.weight/exp_avg"})
        raise SystemExit("state that lacks a tensor was taken")
    except ValueError as error:
        assert "input.weight/exp_avg" in str(error)
    engine.load(named, saved)
    optim.load_state_tensors([ours], dict(one.named_parameters()), saved)
    for tensors, wanted in ((engine.states(), saved), (tensors_of(model), one.state_dict())):
        found, bytes_here = written(tensors)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[k], wanted[k]) for k in wanted)
        whole = sum(t.nbytes for t in wanted.values())
        assert bytes_here < 0.7 * whole, (bytes_here, whole)

    # An average of the weights lies as they do.
    for n, p in one.named_parameters():
        held = as_held(like(p.detach() + 1, named[n]), named[n])
        assert torch.equal(held.whole() if cut else held, p + 1), n

    # A step of two passes: gradients, their norm, weights, against torch.
    tight = how.reduce == "fp32"
    rtol = 1e-4 if tight else 3e-2
    for i in range(2):
        with engine.micro_batch(last=i == 1):
            engine.backward(loss(engine.forward, i, rank))
    norm_one, grads_one = by_torch(one, ours, autocast)
    kinds = {n: n for n in named}
    got, want = gradient_norms(engine.gradients(), kinds, False), gradient_norms(grads_one, kinds, False)
    assert all(abs(got[n] / want[n] - 1) < 10 * rtol for n in want if want[n] > 1e-3), (got, want)
    norm = engine.norm(0.02)
    assert abs(norm / norm_one - 1) < rtol, (norm, norm_one)
    engine.apply(0.02, norm, float(norm))
    engine.clear()
    found, _ = written(tensors_of(model))
    for n, p in one.named_parameters():
        gap = (found[n] - p).abs().max()
        assert gap < (2e-5 if tight else 4e-3), (n, gap)
        assert p.dtype == found[n].dtype == torch.float32
    steps, _ = written(engine.states())
    assert all(float(steps[f"{n}/step"]) == 6 for n in named)

    # The next step sends what model/spread.py counts, but for padding and what is too small to cut.
    sent.clear()
    for i in range(2):
        with engine.micro_batch(last=i == 1):
            engine.backward(loss(engine.forward, i, rank))
    assert engine.norm(0.02).isfinite()
    trainer = {**config.trainer.model_dump(), "devices": 2, "micro_batch": 1}
    this = config.model_validate({**config.model_dump(), "model": shape, "trainer": trainer, "parallel": how})
    counted = count_sent(this, total)
    near = lambda found, wanted: abs(found / 2 - wanted) < 0.03 * wanted  # half of it is each rank's own
    assert near(sent["all_gather_into_tensor"], counted.gathered), (sent, counted)
    sums = "reduce_scatter_tensor" if how.stage == 3 else "reduce"
    assert near(sent[sums], counted.summed), (sent, counted)
    assert sent.get("all_reduce", 0) < 100 and len(sent) == 3, sent

    # A loss that is not a number on one rank, or is infinite with a good gradient: no rank steps.
    for bad in (torch.nan, torch.inf):
        before, _ = written(tensors_of(model)), written(engine.states())
        for i in range(2):
            with engine.micro_batch(last=i == 1):
                value = loss(engine.forward, i, rank)
                engine.backward(value + bad if rank == 1 and i == 0 else value)
        assert not engine.norm(0.02).isfinite()
        engine.clear()
        again, _ = written(tensors_of(model)), written(engine.states())
        assert all(torch.equal(again[0][k], v) for k, v in before[0].items())
    steps, _ = written(engine.states())
    assert all(float(steps[f"{n}/step"]) == 7 for n in named)

    # Without gradients, and rank 0 by itself.
    found, _ = written(tensors_of(model))
    for n, p in one.named_parameters():
        p.data.copy_(found[n])
    with torch.no_grad():
        expected = loss(one, 2, 0)
        assert torch.allclose(loss(model, 2, 0), expected)
        assert torch.allclose(loss(model, 2, 0), expected)
    with on_first(model) as alone, torch.no_grad():
        assert (alone is None) == (rank > 0)
        if alone is not None:
            assert torch.allclose(loss(alone, 2, 0), expected)
    # And on: a pass after all that.
    with engine.micro_batch(last=True):
        engine.backward(loss(engine.forward, 2, rank))
    assert engine.norm(0.02).isfinite()


for name, how in eval(sys.argv[2], vars(schema)).items():
    check(how)
    print("as one:", name, flush=True)
dist.barrier()
dist.destroy_process_group()
"""

HOW = {
    "1": "Zero1()",
    "2": "Zero2()",
    "2 in bf16, on the host": "Zero2(reduce='bf16', offload_optimizer=True)",
    "3": "Zero3()",
    "3 in bf16, on the host": "Zero3(reduce='bf16', offload_optimizer=True, offload_params=True)",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What two ranks say that took each way in turn, so that they are started once."""
    folder = tmp_path_factory.mktemp("zero")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent / 'src'}{os.pathsep}{TESTS}"}
    ways = "{" + ", ".join(f"{name!r}: {how}" for name, how in HOW.items()) + "}"
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), ways],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return "\n".join(process.communicate(timeout=200)[0] for process in started)
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("name", HOW)
def test_ranks_hold_and_step_a_model_as_one(name: str, said: str) -> None:
    assert said.count(f"as one: {name}\n") == 2, said
