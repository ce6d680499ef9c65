"""What a rank of test_parallel_shard does: hold a model with the others, and compare it with the whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from ssmtrain.config.parallel import Fsdp
from ssmtrain.kernels import backend
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights
from ssmtrain.parallel import shard
from ssmtrain.parallel.shard import like, mine
from ssmtrain.train.callbacks.health import gradient_norms
from ssmtrain.train.optim import gradient_norm
from train.conftest import page


def hold_as_one(folder: Path, how: dict[str, Any]) -> None:
    """Everything that a rank can see of a model cut `how`."""
    dist.init_process_group("gloo")
    backend.configure("auto", "cpu")
    config = page(folder).model
    one = HybridModel(config, 257)
    init_weights(one, config.init, 0)
    model = copy.deepcopy(one)
    strategy = Fsdp(**how)
    shard.shard(model, torch.device("cpu"), strategy)
    assert shard.is_sharded(model) and not shard.is_sharded(one)
    torch.manual_seed(0)
    rows = torch.randint(257, (2, dist.get_world_size(), 2, 33))  # pass, rank

    def loss(network: nn.Module, i: int, r: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=strategy.gather == "bf16"):
            return network(rows[i, r, :, :-1], rows[i, r, :, 1:].contiguous(), Context()).loss_sum

    _what_is_held(model, one, strategy)
    _gradients(model, one, strategy, loss)
    _messages(model, strategy, loss)
    # What a pass without gradients has gathered is let go of.
    cut = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    with torch.no_grad():
        expected = loss(one, 0, 0)
        assert torch.allclose(loss(model, 0, 0), expected)
    shard.cut_again(model)
    assert all(isinstance(model.get_parameter(name), DTensor) for name in cut)
    # Rank 0 runs all of it by itself.
    with shard.on_first(model) as alone, torch.no_grad():
        assert (alone is None) == (dist.get_rank() > 0)
        if alone is not None:
            assert torch.allclose(loss(alone, 0, 0), expected)
    dist.barrier()
    dist.destroy_process_group()
    print("as one")


def _what_is_held(model: HybridModel, one: HybridModel, how: Fsdp) -> None:
    """Half of every matrix, at most a row above it, and the rest whole; together the model, to the bit."""
    world = dist.get_world_size()
    cut = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert all(n.endswith(("proj.weight", "w_in", "w_out", "input.weight")) for n in cut), list(cut)
    specs = model.specs()
    for name, p in model.named_parameters():
        spec = specs[name]
        assert (name in cut) == (p.ndim > 1 and not spec.fp32 and "conv" not in name), name
        assert shard.holders(p) == (how.replicas if name in cut else world)
        ways = world // how.replicas if name in cut else 1
        assert len(mine(p)) <= -(-len(p) // ways)
    for name, tensor in shard.whole(model.state_dict()).items():
        elsewhere = dist.get_rank() > 0 and name in cut
        assert (tensor.numel() == 0) if elsewhere else torch.equal(tensor, one.state_dict()[name]), name
    for name, p in model.named_parameters():
        again = like(one.get_parameter(name).detach() + 1, p)
        assert torch.equal(mine(again), mine(p) + 1) and isinstance(again, DTensor) == (name in cut)


def _gradients(model: HybridModel, one: HybridModel, how: Fsdp, loss: Any) -> None:
    """Two passes of each rank, the first without a message: the mean over the ranks of their sums."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with shard.gradients_kept(model):
        loss(model, 0, rank).backward()
    loss(model, 1, rank).backward()
    shard.average_whole(model)
    for i in range(2):
        for r in range(world):
            (loss(one, i, r) / world).backward()
    rtol, atol = (1e-4, 1e-5) if how.reduce == "fp32" else (1e-2, 1e-1)
    for name, p in model.named_parameters():
        want = mine(like(one.get_parameter(name).grad, p))
        assert torch.allclose(mine(p.grad), want, rtol=rtol, atol=atol), name
        assert p.dtype == mine(p).dtype == p.grad.dtype == torch.float32
    wanted = torch.nn.utils.get_total_norm([p.grad for p in one.parameters()])
    found = gradient_norm(list(model.parameters()))
    assert abs(found / wanted - 1) < rtol, (found, wanted)
    kinds = {n: n for n, _ in one.named_parameters()}
    ours, whole = ([(n, p.grad) for n, p in m.named_parameters()] for m in (model, one))
    norms, expected = gradient_norms(ours, kinds, True), gradient_norms(whole, kinds, False)
    assert all(abs(norms[n] / expected[n] - 1) < rtol for n in expected if expected[n] > 1e-4), norms


def _messages(model: HybridModel, how: Fsdp, loss: Any) -> None:
    """A pass gathers each unit twice, or once where it is kept, and the rest once; gradients once."""
    with CommDebugMode() as messages:
        loss(model, 0, dist.get_rank()).backward()
    counts = messages.get_comm_counts()
    gathers = sum(n for op, n in counts.items() if "allgather" in str(op))
    units = -(-len(model.blocks) // how.unit)
    assert gathers == (2 * units - 1 if how.reshard else units) + 1, counts
    sums = sum(n for op, n in counts.items() if "reduce" in str(op) and "scatter" in str(op))
    assert sums == units + 1, counts
