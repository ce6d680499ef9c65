"""Activations that are cheaper to compute again than to keep for the backward pass.

A norm, a short convolution, a gate, a product with a thin matrix: each makes a tensor as large as its input
in a time that is little beside the projections and scans around it, and Mamba (Gu & Dao 2023, sec. 3.3.2)
recomputes as much by hand. Here a layer says so with `forget`, beside the computation; where `forgetting` is
in force autograd then keeps the recipe, whose inputs it keeps anyway, and follows it when the first gradient
asks for the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

DEVICES = {"cuda"}
"""Where memory is dearer than time."""


@dataclass
class _Recipe:
    """How to make a tensor again."""

    function: Callable[..., Tensor]
    inputs: tuple[Any, ...]
    layout: tuple[torch.Size, tuple[int, ...], int]
    dtype: torch.dtype
    storage: StorageWeakRef
    autocast: tuple[str, bool, torch.dtype]
    readers: int = 0
    """Of the tensor, or of views of it: what autograd would have kept."""
    served: int = 0
    value: Tensor | None = None
    """The tensor, from the first reader's turn to the last's."""

    def serve(self) -> Tensor:
        """The tensor, for one of its readers."""
        value = self.value
        if value is None:
            device, enabled, dtype = self.autocast
            with torch.no_grad(), torch.autocast(device, dtype, enabled):
                value = self.value = self.function(*self.inputs)
            if (value.shape, value.stride(), value.dtype) != (*self.layout[:2], self.dtype):
                raise RuntimeError(f"{self.function} made {tuple(value.shape)} {value.dtype} the second time")
        self.served += 1
        if self.served == self.readers:
            self.value, self.served = None, 0
        return value


@dataclass
class _Handle:
    """A recipe, and which part of its tensor a reader wants."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class _Ledger:
    """The recipes of one forward pass by the storage of what they make."""

    recipes: dict[int, _Recipe] = field(default_factory=dict)

    def pack(self, tensor: Tensor) -> Tensor | _Handle:
        """What autograd keeps in a tensor's place."""
        recipe = self.recipes.get(tensor.untyped_storage()._cdata)
        if recipe is None or recipe.dtype != tensor.dtype:
            # What an op keeps of its own results comes with the op's node, which would hold itself.
            return tensor if tensor.grad_fn is None else tensor.detach()
        recipe.readers += 1
        offset = int(tensor.storage_offset()) - recipe.layout[2]
        return _Handle(recipe, tensor.shape, tensor.stride(), offset)


_ledger: ContextVar[_Ledger | None] = ContextVar("ledger", default=None)


@contextmanager
def forgetting() -> Iterator[None]:
    """Where this is in force, autograd keeps nothing that is to be forgotten."""
    ledger = _Ledger()
    token = _ledger.set(ledger)
    try:
        with torch.autograd.graph.saved_tensors_hooks(ledger.pack, _unpack):
            yield
    finally:
        _ledger.reset(token)


def forgets(tensor: Tensor) -> bool:
    """Whether `forgetting` is in force for a tensor."""
    if torch.compiler.is_compiling():
        return False  # a compiler decides itself what to compute again
    return _ledger.get() is not None and tensor.requires_grad and tensor.device.type in DEVICES


def forget(result: Tensor, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Return result, which function(*inputs) gives again, to the bit: the backward pass may compute it anew.

    The function is called without gradients, under autocast as it is now, and must not change anything. All
    tensors among the inputs should be such as autograd keeps anyway, and be given as inputs: what the
    function closes over is kept with its gradients' history.
    """
    if not forgets(result):
        return result
    ledger = _ledger.get()
    assert ledger is not None
    storage = result.untyped_storage()
    if storage.nbytes() != result.nbytes:
        return result  # a part of something
    device = result.device.type
    autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    detached = tuple(one.detach() if isinstance(one, Tensor) else one for one in inputs)
    layout = (result.shape, result.stride(), int(result.storage_offset()))
    # The reference keeps the storage's address, not its memory, from being used again.
    reference = StorageWeakRef(storage)
    recipe = _Recipe(function, detached, layout, result.dtype, reference, autocast)
    ledger.recipes[storage._cdata] = recipe
    return result


def _unpack(kept: Tensor | _Handle) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    value = kept.recipe.serve()
    return value.as_strided(kept.size, kept.stride, value.storage_offset() + kept.offset)
