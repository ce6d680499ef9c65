"""Sums, gathers and barriers over the ranks; with one process each is free and changes nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ssmtrain.config import launched


def active() -> bool:
    """Whether there is a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if active() else 1


def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if active() else 0


def launched_rank() -> int:
    """This process's rank as its launcher tells it, before there is a process group; 0 when nobody does."""
    return launched.rank()


def launched_world() -> int:
    """The number of ranks as their launcher tells it; 0 when nobody does."""
    return launched.world()


def sum_(tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place, and return it; it must be on the group's device."""
    if active():
        dist.all_reduce(tensor)
    return tensor


def sum_int(value: int, device: torch.device) -> int:
    """The sum of a number over the ranks."""
    return int(sum_(torch.tensor([value], device=device)).item()) if active() else value


def gather(tensor: Tensor) -> list[Tensor]:
    """Every rank's tensor (all of one shape), in the order of ranks."""
    if not active():
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(found, tensor)
    return found


def agree(text: str | None) -> str | None:
    """The first text that a rank has, on every rank; None if no rank has one."""
    if not active():
        return text
    found: list[str | None] = [None] * world()
    dist.all_gather_object(found, text)
    return next((entry for entry in found if entry is not None), None)


def from_first(value: str | None) -> str | None:
    """Rank 0's value on every rank."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
