"""Copies of a run's tensors in host memory, so that it goes on while they are being written.

The memory is taken in slabs, filled once so that it is there, and only then locked for the device: locking
pages that are there takes milliseconds, while an allocation of locked memory makes them meanwhile, and no
kernel can be launched for seconds. The allocator for locked memory also rounds up to powers of two.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ssmtrain.train.snapshot import Shares

SLAB = 2**27
"""Bytes of a slab; a larger tensor has one of its own."""
ALIGNED = 64
"""Bytes: where a tensor may begin in a slab."""
PORTABLE = 1
"""Locked for every device (cudaHostRegisterPortable)."""

Key = tuple[str, str]
"""Kind and name of a tensor."""


class Hold:
    """Host memory for one checkpoint, page-locked beside a GPU, kept from one save to the next."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, str], Tensor] = {}

    def reserve(self, shares: Shares) -> None:
        """Take the memory for such parts, where it is not there yet; a copy does so too, and waits for it."""
        wanted = {
            (kind, name): part.tensor
            for kind, parts in shares.items()
            for name, part in parts.items()
            if not _fits(self.buffers.get((kind, name)), part.tensor)
        }
        for key in self.buffers.keys() - {(kind, name) for kind, parts in shares.items() for name in parts}:
            del self.buffers[key]
        for device in {tensor.device for tensor in wanted.values()}:
            some = {key: tensor for key, tensor in wanted.items() if tensor.device == device}
            self.buffers.update(_laid_out(some, device))

    def copy(self, shares: Shares) -> Shares:
        """The same parts, whose values are those of this moment until the next call."""
        self.reserve(shares)
        held = {
            kind: {
                name: replace(
                    part, tensor=self.buffers[kind, name].copy_(part.tensor.detach(), non_blocking=True)
                )
                for name, part in parts.items()
            }
            for kind, parts in shares.items()
        }
        if any(part.tensor.is_cuda for parts in shares.values() for part in parts.values()):
            torch.cuda.synchronize()
        return held


def _fits(buffer: Tensor | None, tensor: Tensor) -> bool:
    return buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype


def _laid_out(tensors: Mapping[Key, Tensor], device: torch.device) -> Iterator[tuple[Key, Tensor]]:
    """Yield room for each of a device's tensors, one after another in slabs."""
    group: list[tuple[Key, Tensor]] = []
    held = 0
    for key, tensor in tensors.items():
        size = _room(tensor)
        if group and held + size > SLAB:
            yield from _placed(group, _slab(held, device))
            group, held = [], 0
        group.append((key, tensor))
        held += size
    if group:
        yield from _placed(group, _slab(held, device))


def _placed(group: list[tuple[Key, Tensor]], slab: Tensor) -> Iterator[tuple[Key, Tensor]]:
    at = 0
    for key, tensor in group:
        yield key, slab[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        at += _room(tensor)


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNED) * ALIGNED


def _slab(size: int, device: torch.device) -> Tensor:
    """Bytes of memory that is there, page-locked beside a GPU, until nothing refers to it."""
    pages = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)  # a fault for two megabytes in place of four kilobytes
    slab = torch.frombuffer(pages, dtype=torch.uint8).zero_()
    if device.type == "cuda":
        _lock(pages, slab, device)
    return slab


def _lock(pages: mmap.mmap, slab: Tensor, device: torch.device) -> None:
    """Page-lock a slab; where the system does not allow it, copies are slower and nothing else."""
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        done = runtime.cudaHostRegister(slab.data_ptr(), slab.nbytes, PORTABLE)
        if done != runtime.cudaError.success:
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=device)  # the next launch reports the error, and forgets it
            return
    unlock = weakref.finalize(pages, runtime.cudaHostUnregister, slab.data_ptr())
    unlock.atexit = False  # the end of the process does it
