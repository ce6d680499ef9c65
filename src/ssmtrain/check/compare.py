"""Whether two runs did the same to the last bit: each step's figures and rows, and all tensors at the end."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.runs import Run

FIGURES = {
    "loss_hex": "losses",
    "grad_norm_hex": "gradient norms",
    "samples": "batches of rows",
    "tokens": "token counts",
    "params": "hashes of parameters",
}
SHARDS = {"model": "tensors of parameters", "optim": "tensors of the optimiser", "rng": "random states"}

SOMETIMES = {"ema": ("ema", "tensors of averages"), "slots": ("carry", "carried states")}
"""By what both states must have: a shard that not every run has."""


def compare(one: Run, other: Run, steps: int) -> tuple[dict[str, int], list[str]]:
    """({what: how many were equal}, differences in words) of two runs' ledgers and newest checkpoints."""
    equal: dict[str, int] = {}
    differences: list[str] = []
    left, right = read_ledger(one.ledger), read_ledger(other.ledger)
    for run, ledger in ((one, left), (other, right)):
        if [line["step"] for line in ledger] != list(range(1, steps + 1)):
            differences.append(f"{run.name} has {len(ledger)} steps in its ledger, expected 1 to {steps}")
    for key, what in FIGURES.items():
        wrong = [a["step"] for a, b in zip(left, right) if a[key] != b[key]]
        equal[what] = min(len(left), len(right)) - len(wrong)
        if wrong:
            differences.append(f"{what}: {len(wrong)} of {len(left)}, the first at step {wrong[0]}")
    assert one.checkpoint and other.checkpoint
    if one.step != other.step:
        differences.append(f"the newest checkpoints are of steps {one.step} and {other.step}")
    states = [store.load_state(run.checkpoint) for run in (one, other) if run.checkpoint]
    more = [shard for key, shard in SOMETIMES.items() if all(state.get(key) for state in states)]
    for shard, what in [*SHARDS.items(), *more]:
        tensors = store.load_tensors(one.checkpoint, shard)
        names = differing(tensors, store.load_tensors(other.checkpoint, shard))
        equal[what] = len(tensors.keys() - set(names))
        if names:
            differences.append(f"{what}: {len(names)}, such as {names[0]}")
    return equal, differences


def read_ledger(path: Path) -> list[dict]:
    """The lines of a ledger, one per step; empty where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not in both, or differ in type, shape or any bit."""
    missing = sorted(one.keys() ^ other.keys())
    return missing + [name for name in one.keys() & other.keys() if not _same(one[name], other[name])]


def _same(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes: NaN equals NaN, and 0.0 is not -0.0.
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
