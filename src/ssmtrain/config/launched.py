"""Which rank this process is, as torchrun, srun or rank 0 tell it, before there is a process group."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

OWN = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS")
NAMES = (*OWN, *SRUN)
"""The environment variables by which a process knows that it is a rank."""


def rank() -> int:
    """This process's rank; 0 when nobody tells it."""
    told = (_number("RANK"), _number("LOCAL_RANK"), _int(from_srun(os.environ).get("RANK")))
    return next((number for number in told if number is not None), 0)


def local_rank() -> int:
    """This process's rank on its node, which is the number of its GPU; 0 when nobody tells it."""
    told = (_number("LOCAL_RANK"), _int(from_srun(os.environ).get("LOCAL_RANK")))
    return next((number for number in told if number is not None), 0)


def world() -> int:
    """The number of ranks; 0 when nobody tells it."""
    return _number("WORLD_SIZE") or _int(from_srun(os.environ).get("WORLD_SIZE")) or 0


def local_world() -> int:
    """How many ranks torchrun or srun started on this node; 0 when this process starts its ranks itself."""
    if _number("RANK") is None and _number("LOCAL_RANK") is None:
        return _int(from_srun(os.environ).get("LOCAL_WORLD_SIZE")) or 0
    return (_number("LOCAL_WORLD_SIZE") or 0) if _number("RANK") is not None else 0


def adopt() -> None:
    """Give a task of srun torchrun's variables, which Lightning and torch read."""
    for name, value in from_srun(os.environ).items():
        os.environ.setdefault(name, value)


def from_srun(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for one of several tasks of an srun step; {} for any other process.

    A batch script is no task. A step's only task is no rank either: it starts the ranks of its node itself.
    """
    numbers = [_int(environ.get(name)) for name in SRUN]
    if "RANK" in environ or "LOCAL_RANK" in environ or None in numbers or (numbers[3] or 0) < 2:
        return {}
    rank, local, node, world = (str(number) for number in numbers)
    counts = _per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", world))
    step = _int(environ.get("SLURM_STEP_ID")) or 0
    return {
        "RANK": rank,
        "LOCAL_RANK": local,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": str(counts[min(int(node), len(counts) - 1)]),
        "GROUP_RANK": node,
        "GROUP_WORLD_SIZE": str(len(counts)),
        "MASTER_ADDR": _first_host(environ.get("SLURM_STEP_NODELIST", ""))
        if len(counts) > 1
        else "127.0.0.1",
        # Below the ports that systems hand out, and another for each step of each job on a node.
        "MASTER_PORT": str(10000 + (31 * (_int(environ.get("SLURM_JOB_ID")) or 0) + step) % 20000),
    }


def _number(name: str) -> int | None:
    return _int(os.environ.get(name))


def _int(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _per_node(text: str) -> list[int]:
    """Tasks on each node, from Slurm's "8(x3),4"."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _first_host(names: str) -> str:
    """The first of "gpu[01-04,07],cpu1": gpu01."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?", names)
    assert found is not None
    before, first = found.groups()
    return before if first is None else before + first + _first_host(names[found.end() :])
