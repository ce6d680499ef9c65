"""The forward and backward pass of a micro-batch as one CUDA graph.

A small model's kernels take less time than a core needs to call them. Recorded once, with the memory that
they use, they are launched again by one call. What a graph computes is what was recorded: the same kernels on
the same addresses, so the bits are those of calling them one by one, and a run that is continued, whose first
steps are called, does not differ from one that was never stopped.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ssmtrain.config.errors import UserError
from ssmtrain.data.batch import Batch
from ssmtrain.kernels import narrow

Pass = tuple[Tensor, dict[int, Tensor]]
"""Sums (2,) of loss and router losses, and tokens per expert by block."""
Key = tuple[object, ...]
FEWEST = 8
"""Documents that there is room for at least."""


def room_for(n_docs: int) -> int:
    """Documents that a batch is treated as having: the next power of two, so that few graphs serve all."""
    return max(FEWEST, 1 << (n_docs - 1).bit_length())


@dataclass
class _Recorded:
    """A graph, where it reads a batch, and what it leaves."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    scale: Tensor
    result: Pass
    grads: list[Tensor | None]


class Graphs:
    """Passes by the shape of their batch: called at first, recorded the second time, then launched."""

    def __init__(
        self,
        run: Callable[[Batch, Tensor, float], Pass],
        parameters: list[nn.Parameter],
        device: torch.device,
    ) -> None:
        """Of run(batch, scale, share), which adds gradients to the parameters'; scale () fp32."""
        self.run, self.parameters, self.device = run, parameters, device
        self.called: set[Key] = set()
        self.recorded: dict[Key, _Recorded] = {}
        self.pool: Any = None

    def __call__(self, batch: Batch, scale: float, share: float) -> Pass:
        """The sums and loads of a batch, whose gradients are added: share is its part of the step's rows."""
        n_docs = batch.n_docs if batch.doc_ids is None else room_for(batch.n_docs)
        batch = replace(batch, n_docs=n_docs)
        before = self._owner()
        key = (batch.inputs.shape, batch.doc_ids is None, n_docs, share, before)
        if key not in self.called or before == "elsewhere":
            self.called.add(key)
            return self.run(batch.to(self.device), torch.full((), scale, device=self.device), share)
        found = self.recorded.get(key)
        if found is None:
            found = self.recorded[key] = self._record(batch, share)
        for to, new in _tensors(found.batch, batch):
            to.copy_(new, non_blocking=True)
        found.scale.fill_(scale)
        narrow.renew(self.parameters)
        found.graph.replay()
        for parameter, grad in zip(self.parameters, found.grads, strict=True):
            parameter.grad = grad
        sums, loads = found.result
        return sums.clone(), {index: load.clone() for index, load in loads.items()}

    def _owner(self) -> object:
        """Whose memory the gradients of this step's earlier micro-batches lie in: a graph's, if any."""
        ours = next((p.grad for p in self.parameters if p.grad is not None), None)
        if ours is None:
            return "nobody"
        for key, recorded in self.recorded.items():
            if any(grad is ours for grad in recorded.grads):
                return key
        return "elsewhere"

    def _record(self, batch: Batch, share: float) -> _Recorded:
        # What calls have left in the allocator's hands is of no use to a graph, which has memory of its own.
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        static, scale = _copied(batch, self.device), torch.ones((), device=self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread may wait for a copy meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                result = self.run(static, scale, share)
        except RuntimeError as error:
            raise UserError(
                f"trainer.cuda_graphs: the passes of this model cannot be recorded ({_first_line(error)})",
                "set trainer.cuda_graphs=false",
            ) from error
        self.pool = graph.pool()
        return _Recorded(graph, static, scale, result, [p.grad for p in self.parameters])


def _copied(batch: Batch, device: torch.device) -> Batch:
    """The batch in memory of its own, wherever it lies: later ones are written over it."""
    doc_ids = None if batch.doc_ids is None else batch.doc_ids.to(device, copy=True)
    inputs, labels = batch.inputs.to(device, copy=True), batch.labels.to(device, copy=True)
    return replace(batch, inputs=inputs, labels=labels, doc_ids=doc_ids)


def _tensors(to: Batch, new: Batch) -> list[tuple[Tensor, Tensor]]:
    """The tensors of two batches, in pairs."""
    pairs = [(to.inputs, new.inputs), (to.labels, new.labels)]
    if to.doc_ids is not None and new.doc_ids is not None:
        pairs.append((to.doc_ids, new.doc_ids))
    return pairs


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
