"""Sums, gathers and barriers over the ranks; with one process each is free and changes nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    """Whether there is a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if active() else 1


def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if active() else 0


def sum_(tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place, and return it; it must be on the group's device."""
    if active():
        dist.all_reduce(tensor)
    return tensor


def gather(tensor: Tensor) -> list[Tensor]:
    """Every rank's tensor (all of one shape), in the order of ranks."""
    if not active():
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(found, tensor)
    return found


def texts(text: str) -> list[str]:
    """Every rank's text, in the order of ranks; they travel as bytes, so that no rank unpickles anything."""
    if not active():
        return [text]
    on_gpu = "nccl" in str(dist.get_backend())
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    data = torch.frombuffer(bytearray(text.encode() + b"\n"), dtype=torch.uint8).to(device)
    sizes = [int(size) for size in gather(torch.tensor([len(data)], device=device))]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    found = [theirs.cpu().numpy().tobytes() for theirs in gather(padded)]
    return [theirs[: size - 1].decode() for theirs, size in zip(found, sizes, strict=True)]


def agree(text: str | None) -> str | None:
    """The first text that a rank has, on every rank; None if no rank has one."""
    found = texts("" if text is None else f"={text}")
    return next((entry[1:] for entry in found if entry), None)


def from_first(value: str | None) -> str | None:
    """Rank 0's value on every rank."""
    first = texts("" if value is None else f"={value}")[0]
    return first[1:] if first else None
