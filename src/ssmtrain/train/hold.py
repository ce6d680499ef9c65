"""Copies of a run's tensors in host memory, so that it goes on while they are being written."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ssmtrain.train.snapshot import Shares


class Hold:
    """Host memory for one checkpoint, page-locked beside a GPU, kept from one save to the next."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, str], Tensor] = {}

    def reserve(self, shares: Shares) -> None:
        """Take the memory for such parts before the first copy: page-locking takes seconds, a copy a part of
        one."""
        for kind, parts in shares.items():
            for name, part in parts.items():
                self._buffer(kind, name, part.tensor)

    def copy(self, shares: Shares) -> Shares:
        """The same parts, whose values are those of this moment until the next call."""
        held = {
            kind: {
                name: replace(part, tensor=self._held(kind, name, part.tensor))
                for name, part in parts.items()
            }
            for kind, parts in shares.items()
        }
        if any(part.tensor.is_cuda for parts in shares.values() for part in parts.values()):
            torch.cuda.synchronize()
        return held

    def _held(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return self._buffer(kind, name, tensor).copy_(tensor, non_blocking=True)

    def _buffer(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        buffer = self.buffers.get((kind, name))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.buffers[kind, name] = buffer
        return buffer
