"""Gluon kernels on the CPU: torch stands in for `gl`, and one program runs after the other.

Triton's interpreter does not know Gluon. A kernel's source is Python, so here it runs as such, with the few
functions of `gl` that ours use made of torch: scalars are tensors without dimensions, pointers a tensor and
offsets, shared memory a tensor of NaN until it is written. Copies and products take place where they are
begun, which shows what a kernel computes, where it reads and what it writes, but no missing wait or barrier.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.language import constexpr
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


class Value(Tensor):
    """A tensor with `to` as Triton has it, and never changed in place."""

    type = SimpleNamespace(layout=None)

    def __iadd__(self, other: Any) -> Any:
        return self + other

    def __isub__(self, other: Any) -> Any:
        return self - other

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Any:
        """Convert, or see the same bits as another type."""
        return self.view(dtype) if bitcast else super().to(dtype)


def value(data: Any) -> Any:
    """A tensor, or a number as one."""
    return torch.as_tensor(data).as_subclass(Value)


class Type:
    """A type of elements as kernels ask about it; `to` and `zeros` take torch's."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.element_ty, self.primitive_bitwidth = dtype, 8 * dtype.itemsize


class Pointer:
    """Where elements of a tensor's memory lie."""

    def __init__(self, memory: Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, at

    @property
    def dtype(self) -> Type:
        """Of the elements."""
        return Type(self.memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        # In 64 bits, whatever torch makes of a number and a tile; what an offset lost before stays lost.
        return Pointer(self.memory, torch.as_tensor(offset).long() + self.at)

    def __sub__(self, offset: Any) -> Pointer:
        return self + -offset

    def elements(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Offsets and mask in full; what is not masked must exist."""
        at = torch.as_tensor(self.at).long()
        at, mask = torch.broadcast_tensors(at, torch.as_tensor(True if mask is None else mask))
        seen = at[mask]
        assert seen.numel() == 0 or 0 <= seen.min() <= seen.max() < self.memory.numel(), "out of bounds"
        return at, mask


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, at: Any) -> Shared:
        """One of several buffers."""
        return Shared(self.data[int(at)])

    @property
    def shape(self) -> torch.Size:
        """Of the elements."""
        return self.data.shape

    @property
    def dtype(self) -> Type:
        """Of the elements."""
        return Type(self.data.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        """Some of the elements."""
        return Shared(self.data.narrow(dim, start, length))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: object) -> Shared:
        return Shared(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        """The same with other strides."""
        return Shared(self.data.permute(order))

    def load(self, layout: object) -> Tensor:
        """What is there now."""
        return value(self.data.clone())

    def store(self, data: Tensor) -> None:
        """Replace what is there."""
        assert data.shape == self.data.shape
        self.data.copy_(data)


def _memory(pointer: Pointer) -> Tensor:
    """The elements of a tensor's memory from its first on, as a line."""
    tensor = pointer.memory
    length = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((length if tensor.numel() else 0,), (1,))


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
    at, live = pointer.elements(mask)
    return value(torch.where(live, pointer.memory[torch.where(live, at, 0)], other))


def _store(pointer: Pointer, data: Any, mask: Any = None) -> None:
    at, live = pointer.elements(mask)
    data = torch.as_tensor(data).expand(at.shape)
    pointer.memory[at[live]] = data[live].as_subclass(Tensor).to(pointer.memory.dtype)


def _add(pointer: Pointer, number: Any, sem: str) -> Any:
    before = _load(pointer)
    _store(pointer, before + number)
    return before


def _compare(pointer: Pointer, expected: Any, data: Any, sem: str) -> Any:
    before = _load(pointer)
    # Programs run to their end one after the other: nobody could still bring what is waited for.
    assert before == expected, "waits for a program that comes later"
    _store(pointer, data)
    return before


def _copy(to: Shared, pointer: Pointer, mask: Any = None) -> None:
    to.store(_load(pointer, mask) if pointer.memory.numel() else torch.zeros_like(to.data))


def _product(a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
    left = a.data if isinstance(a, Shared) else a
    assert left.dtype == b.data.dtype == torch.bfloat16
    product = left.float() @ b.data.float()
    return value(acc + product if use_acc else product)


def _across(x: Tensor, BIT: int, AXIS: int) -> Tensor:
    return x.index_select(AXIS, torch.arange(x.shape[AXIS]) ^ BIT)


def _everywhere(span: Tensor, j: int) -> Tensor:
    return span[j].expand_as(span)


def _wait(outstanding: int, deps: list[Any]) -> Any:
    return deps[0] if len(deps) == 1 else tuple(deps)


def _arange(start: int, end: int, layout: object) -> Any:
    return value(torch.arange(start, end, dtype=torch.int32))


def _two(function: Any) -> Any:
    return lambda a, b: value(function(torch.as_tensor(a), torch.as_tensor(b)))


def _language(program: tuple[int, ...], grid: tuple[int, ...]) -> SimpleNamespace:
    layouts = ("NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout", "NVMMASharedLayout")
    same = ("float32", "bfloat16", "int32", "int64", "exp2", "rsqrt", "abs")
    return SimpleNamespace(
        **{name: lambda *args: None for name in (*layouts, "SwizzledSharedLayout", "SliceLayout")},
        **{name: getattr(torch, name) for name in same},
        constexpr=None,
        static_range=range,
        maximum=_two(torch.maximum),
        join=lambda a, b: value(torch.stack((a, b), -1)),
        split=lambda data: data.unbind(-1),
        reshape=lambda data, shape: data.reshape(shape),
        permute=lambda data, order: data.permute(tuple(order)),
        sum=lambda data, axis: data.sum(axis),
        program_id=lambda axis: value(torch.tensor(program[axis], dtype=torch.int32)),
        num_programs=lambda axis: value(torch.tensor(grid[axis], dtype=torch.int32)),
        atomic_add=_add,
        atomic_cas=_compare,
        atomic_xchg=lambda pointer, data, sem: _store(pointer, data),
        arange=_arange,
        zeros=lambda shape, dtype, layout: value(torch.zeros(shape, dtype=dtype)),
        full=lambda shape, number, dtype, layout: value(torch.full(shape, number, dtype=dtype)),
        to_tensor=value,
        where=lambda condition, a, b: value(torch.where(torch.as_tensor(condition), a, b)),
        minimum=lambda a, b: value(torch.minimum(torch.as_tensor(a), torch.as_tensor(b))),
        convert_layout=lambda data, layout, assert_trivial=False: data,
        fma=lambda a, b, c: a * b + c,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(torch.full(shape, torch.nan, dtype=dtype)),
        load=_load,
        store=_store,
    )


def _stand_ins(module: ModuleType) -> dict[str, Any]:
    """What replaces the names of a module with kernels: Gluon by torch, functions by their source."""
    names: dict[str, Any] = {}
    for name, item in vars(module).items():
        if isinstance(item, JITFunction | InterpretedFunction):
            names[name] = item.fn
        elif isinstance(item, constexpr):
            names[name] = item.value
        elif name == "async_copy":
            copy = {"async_copy_global_to_shared": _copy, "commit_group": lambda: None}
            names[name] = SimpleNamespace(**copy, wait_group=lambda n: None)
        elif name in ("fence_async_shared", "barrier"):
            names[name] = lambda: None
    names |= {"warpgroup_mma": _product, "warpgroup_mma_wait": _wait}
    names |= {"across": _across, "everywhere": _everywhere}  # PTX
    return {name: item for name, item in names.items() if hasattr(module, name)}


@contextmanager
def on_cpu(host: ModuleType, *kernels: Any, last: int | None = None) -> Iterator[None]:
    """Make `launch` of this module run these Gluon kernels here, all programs or only the last.

    Helpers may be in other modules, and in Triton modules if they use no more of `tl` than Gluon has.
    """
    modules = [sys.modules[kernel.fn.__module__] for kernel in kernels]
    for module in modules:
        for item in vars(module).values():
            if isinstance(item, JITFunction):  # Gluon: Triton's own are interpreted
                source = sys.modules[item.fn.__module__]
                if source not in modules:
                    modules.append(source)
    real = host.launch

    def launch(kernel: Any, grid: tuple[int, ...], *args: object, **constants: Any) -> None:
        if not any(kernel is one for one in kernels):
            return real(kernel, grid, *args, **constants)
        constants = {k: v for k, v in constants.items() if k not in ("num_warps", "maxnreg")}
        pointers = [Pointer(_memory(Pointer(a))) if isinstance(a, Tensor) else a for a in args]
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(mock.patch.multiple(module, **_stand_ins(module)))
            for at in range(grid[0] - min(last or grid[0], grid[0]), grid[0]):
                for module in modules:
                    for language in ("gl", "tl"):
                        if hasattr(module, language):
                            stack.enter_context(mock.patch.object(module, language, _language((at,), grid)))
                kernel.fn(*pointers, **constants)
        return None

    with mock.patch.object(host, "launch", launch):
        yield
