"""A model cut over ranks: what each holds, and what is saved, summed and run of it as a whole."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]

SCRIPT = """
import copy, sys, torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from ssmtrain.config.parallel import Fsdp
from ssmtrain.kernels import backend
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights
from ssmtrain.parallel.shard import (
    average_whole, cut_again, gradients_kept, holders, is_sharded, like, mine, on_first, shard, whole
)
from ssmtrain.train.callbacks.health import gradient_norms
from ssmtrain.train.optim import gradient_norm
from train.conftest import page
from pathlib import Path

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
how = Fsdp.model_validate_json(sys.argv[2])
replicas = how.replicas
backend.configure("auto", "cpu")
config = page(Path(sys.argv[1])).model
one = HybridModel(config, 257)
init_weights(one, config.init, 0)
model = copy.deepcopy(one)
shard(model, torch.device("cpu"), how)
assert is_sharded(model) and not is_sharded(one)

# Each rank has half of every matrix, no more than a row above it, and the rest whole.
cut = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
assert all(n.endswith(("proj.weight", "w_in", "w_out", "input.weight")) for n in cut), list(cut)
specs = model.specs()
for name, p in model.named_parameters():
    spec = specs[name]
    assert (name in cut) == (p.ndim > 1 and not spec.fp32 and "conv" not in name), name
    assert holders(p) == (replicas if name in cut else world)
    ways = world // replicas if name in cut else 1
    assert len(mine(p)) <= -(-len(p) // ways)

# Together they are the model, to the bit, and a whole tensor is cut as they are.
for name, tensor in whole(model.state_dict()).items():
    elsewhere = rank > 0 and name in cut
    assert (tensor.numel() == 0) if elsewhere else torch.equal(tensor, one.state_dict()[name]), name
for name, p in model.named_parameters():
    again = like(one.get_parameter(name).detach() + 1, p)
    assert torch.equal(mine(again), mine(p) + 1) and isinstance(again, DTensor) == (name in cut)

# Two passes of each rank, the first without a message: the mean over the ranks of their sums.
torch.manual_seed(0)
rows = torch.randint(257, (2, world, 2, 33))  # pass, rank
def loss(network, i, r):
    with torch.autocast("cpu", torch.bfloat16, enabled=how.gather == "bf16"):
        return network(rows[i, r, :, :-1], rows[i, r, :, 1:].contiguous(), Context()).loss_sum
with gradients_kept(model):
    loss(model, 0, rank).backward()
loss(model, 1, rank).backward()
average_whole(model)
for i in range(2):
    for r in range(world):
        (loss(one, i, r) / world).backward()
for name, p in model.named_parameters():
    want = mine(like(one.get_parameter(name).grad, p))
    digits = (1e-4, 1e-5) if how.reduce == "fp32" else (1e-2, 1e-1)
    assert torch.allclose(mine(p.grad), want, rtol=digits[0], atol=digits[1]), name
    assert p.dtype == mine(p).dtype == p.grad.dtype == torch.float32
wanted = torch.nn.utils.get_total_norm([p.grad for p in one.parameters()])
found = gradient_norm(list(model.parameters()))
assert abs(found / wanted - 1) < digits[0], (found, wanted)
kinds = {n: n for n, _ in one.named_parameters()}
grads = [[(n, p.grad) for n, p in m.named_parameters()] for m in (model, one)]
norms = [gradient_norms(grads[0], kinds, True), gradient_norms(grads[1], kinds, False)]
assert all(abs(norms[0][n] / norms[1][n] - 1) < digits[0] for n in norms[1] if norms[1][n] > 1e-4), norms

# A pass gathers each unit twice, or once where it is kept, and the rest once; gradients once: as counted.
with CommDebugMode() as messages:
    loss(model, 0, rank).backward()
counts = messages.get_comm_counts()
gathers = sum(n for op, n in counts.items() if "allgather" in str(op))
units = -(-len(model.blocks) // how.unit)
assert gathers == (2 * units - 1 if how.reshard else units) + 1, counts
sums = sum(n for op, n in counts.items() if "reduce" in str(op) and "scatter" in str(op))
assert sums == units + 1, counts

# What a pass without gradients has gathered is let go of.
with torch.no_grad():
    expected = loss(one, 0, 0)
    assert torch.allclose(loss(model, 0, 0), expected)
cut_again(model)
assert all(isinstance(model.get_parameter(name), DTensor) for name in cut)

# Rank 0 runs all of it by itself.
with on_first(model) as alone, torch.no_grad():
    assert (alone is None) == (rank > 0)
    if alone is not None:
        assert torch.allclose(loss(alone, 0, 0), expected)
dist.barrier()
dist.destroy_process_group()
print("as one")
"""


HOW = {
    "cut": (2, {"unit": 1}),
    "in groups of ranks, two blocks at a time, kept": (4, {"unit": 2, "replicas": 2, "reshard": False}),
    "in bf16 and on the host": (2, {"unit": 2, "gather": "bf16", "reduce": "bf16", "offload": True}),
}


@pytest.mark.parametrize("world, how", HOW.values(), ids=HOW)
def test_ranks_hold_a_model_as_one(world: int, how: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    path = f"{TESTS.parent / 'src'}{os.pathsep}{TESTS}"
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), json.dumps(how)],
            env={**os.environ, **shared, "RANK": str(rank), "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert all("as one" in text for text in said), "\n".join(said)
