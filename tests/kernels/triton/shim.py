"""Repairs of Triton's interpreter (3.6 and 3.7), so that what it computes is what a GPU computes.

| trap | what the interpreter does | here |
|---|---|---|
| associative_scan | one Python call per element | one per step of the scanned axis |
| tl.dot of bf16 | multiplies the raw bits | widens them to fp32 |
| fp32 to bf16 | truncates | rounds to nearest, ties to even |
| a product's precision of bf16x3 or bf16x6 | an error | allowed, and exact as all others |
| arithmetic on bf16 | adds the raw bits | an error: cast to fp32 first |
| masked-off lanes of a load without `other` | zero | NaN, or a large number: a GPU promises nothing |
| a run-time bound of range (3.6 with numpy 2.4) | TypeError | an int |
| tl.range over 64-bit bounds | a step that adds to int32 as int32 | a 64-bit step |
| a load or store outside of the launch's tensors | what is there, or a crash | an error |
| a call between kernels | patches triton.language again, half of a test's time | once a launch and module |
| integers are added | and again in 64 bits, to see an overflow | once: such an offset is out of bounds |
| an array's type | is looked up in a table made each time | is looked up |
| a launch's end | copies each CPU tensor onto itself | nothing: a tensor may be mostly untouched memory |

test_shim.py has a canary for each trap, which fails once upstream mends it and the repair can go.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

POISON = 0x3FFFFFF7
"""What uninitialised integers hold: as an index it is out of bounds, as a sum it does not overflow soon."""

upstream_options = interpreter.interpreter_builder.options
PRECISIONS = (*upstream_options.allowed_dot_input_precisions, "bf16x3", "bf16x6")
OPTIONS = replace(upstream_options, allowed_dot_input_precisions=PRECISIONS, sanitize_overflow=False)

_upstream_type = interpreter._get_np_dtype
_upstream_convert = interpreter._convert_float
_upstream_dot = interpreter.InterpreterBuilder.create_dot
_upstream_binary = interpreter.InterpreterBuilder.binary_op
_upstream_load = interpreter.InterpreterBuilder.create_masked_load
_upstream_store = interpreter.InterpreterBuilder.create_masked_store
_upstream_atomic = interpreter.InterpreterBuilder.create_atomic_rmw
_upstream_core = interpreter._patch_lang_core
_upstream_inputs = interpreter.GridExecutor._init_args_hst
_upstream_restore = interpreter.GridExecutor._restore_args_dev
_upstream_patch = interpreter._patch_lang_tensor
_upstream_scan = interpreter.ScanOps.generic_scan


@contextmanager
def repaired() -> Iterator[None]:
    """Repair the interpreter within the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.ScanOps, "generic_scan", _scan)
        patch.setattr(interpreter, "_convert_float", _convert)
        patch.setattr(interpreter, "_get_np_dtype", _type)
        patch.setattr(interpreter, "_patch_lang_tensor", _patch_tensor)
        patch.setattr(interpreter, "_patch_lang_core", _patch_core)
        patch.setattr(interpreter.InterpretedFunction, "__call__", _call)
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", _inputs)
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", _restore)
        for name, repair in (
            ("create_dot", _dot),
            ("binary_op", _binary),
            ("create_masked_load", _load),
            ("create_masked_store", _store),
            ("create_atomic_rmw", _atomic),
        ):
            patch.setattr(interpreter.InterpreterBuilder, name, repair)
        patch.setattr(interpreter.interpreter_builder, "options", OPTIONS)
        yield


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 as bf16 bits (uint16), rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _scan(self: Any, inputs: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """ScanOps.generic_scan, with a whole slice of the other axes as each operand."""
    data = [np.moveaxis(arg.handle.data, self.axis, 0) for arg in inputs]
    outputs = [np.empty_like(array) for array in data]
    for output, array in zip(outputs, data, strict=True):
        output[0] = array[0]
    for step in range(1, data[0].shape[0]):
        before = [self.to_tensor(o[step - 1], arg.dtype) for o, arg in zip(outputs, inputs, strict=True)]
        here = [self.to_tensor(d[step], arg.dtype) for d, arg in zip(data, inputs, strict=True)]
        combined = self.combine_fn.fn(*before, *here)
        for output, value in zip(outputs, combined if isinstance(combined, tuple) else (combined,)):
            output[step] = np.reshape(value.handle.data, output[step].shape)
    return [
        self.to_tensor(np.moveaxis(output, 0, self.axis), arg.dtype)
        for output, arg in zip(outputs, inputs, strict=True)
    ]


def _convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: Any) -> np.ndarray:
    """_convert_float with bf16 done right; rounding towards zero stays upstream's."""
    if source == tl.bfloat16 and target == tl.float32:
        return widen(data).view(np.uint32)
    toward_zero = rounding_mode is not None and rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
    if source == tl.float32 and target == tl.bfloat16 and not toward_zero:
        return narrow(data)
    return _upstream_convert(data, source, target, rounding_mode)


def _dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    """create_dot whose bf16 operands are numbers."""
    operands = [
        interpreter.TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
        for x in (a, b)
    ]
    return _upstream_dot(self, *operands, d, *rest)


def _binary(self: Any, lhs: Any, rhs: Any, op: Callable[..., np.ndarray]) -> Any:
    """binary_op that refuses bf16, whose raw bits upstream would add."""
    if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
        raise TypeError(f"{op.__name__} on bf16 in registers: cast to fp32 first")
    return _upstream_binary(self, lhs, rhs, op)


def _load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
    """create_masked_load that stays in bounds and poisons masked-off lanes given no value."""
    _check_bounds(ptrs, mask, "load")
    # A scalar's `other` of 0 is lost on the way, being false: its absence says nothing.
    if other is None and ptrs.data.size > 1:
        scalar = ptrs.get_element_ty()
        kind = interpreter._get_np_dtype(scalar)
        if scalar == tl.bfloat16:
            poison = 0x7FC0
        elif np.issubdtype(kind, np.floating):
            poison = np.nan
        else:
            poison = min(POISON, np.iinfo(kind).max) if np.issubdtype(kind, np.integer) else True
        other = interpreter.TensorHandle(np.full_like(ptrs.data, poison, dtype=kind), scalar)
    return _upstream_load(self, ptrs, mask, other, *rest)


def _store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
    """create_masked_store that stays in bounds."""
    _check_bounds(ptrs, mask, "store")
    return _upstream_store(self, ptrs, value, mask, *rest)


def _atomic(self: Any, op: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
    """create_atomic_rmw that stays in bounds."""
    _check_bounds(ptrs, mask, "atomic")
    return _upstream_atomic(self, op, ptrs, value, mask, *rest)


_types: dict[str, np.dtype] = {}
"""numpy's types by the names of Triton's."""


def _type(kind: tl.dtype) -> np.dtype:
    """_get_np_dtype."""
    element = kind.element_ty if isinstance(kind, tl.block_type) else kind
    found = None if isinstance(element, tl.pointer_type) else _types.get(element.name)
    if found is None:
        found = _upstream_type(element)
        if not isinstance(element, tl.pointer_type):
            _types[element.name] = found
    return found


_extents: list[tuple[int, int]] = []
"""First address and end of each tensor of the launch that runs."""
_further: list[tuple[int, int]] = []
"""The same of tensors that it knows by their addresses; see `reachable`."""


_patched: set[int] = set()
"""Globals of the modules for which this launch has patched triton.language."""


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """InterpretedFunction.__call__: a kernel calls another."""
    module = id(self.fn.__globals__)
    if module not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(module)
    return self.rewrite()(*args, **kwargs)


def _inputs(self: Any, args: Any, kwargs: Any) -> Any:
    """GridExecutor._init_args_hst, which also notes where the tensors lie."""
    found = _upstream_inputs(self, args, kwargs)
    _patched.clear()
    _patched.add(id(self.fn.__globals__))
    _extents[:] = [*_spans((*found[0], *found[1].values())), *_further]
    return found


@contextmanager
def reachable(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Let kernels read and write these too: their addresses are in a tensor of the launch."""
    before = list(_further)
    _further.extend(_spans(tensors))
    try:
        yield
    finally:
        _further[:] = before


def _spans(values: Iterable[Any]) -> Iterator[tuple[int, int]]:
    for value in values:
        tensor = getattr(value, "base", value)  # a descriptor's or a wrapper's
        if isinstance(tensor, tuple):
            yield from _spans(tensor)
        elif isinstance(tensor, torch.Tensor) and tensor.numel():
            last = sum(
                (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            yield tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _check_bounds(ptrs: Any, mask: Any, what: str) -> None:
    """Raise IndexError unless all live pointers are in one tensor of the launch, a view taken as it is."""
    live = ptrs.data if mask is None else ptrs.data[mask.data.astype(bool)]  # masks may come as integers
    if not live.size:
        return
    size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
    low, high = int(live.min()), int(live.max()) + size
    if any(start <= low and high <= end for start, end in _extents):
        return
    begin, nearest = min(_extents, key=lambda extent: abs(extent[0] - low), default=(0, 0))
    raise IndexError(
        f"{what} outside of the launch's tensors: bytes {low - begin} to {high - begin} of one that has "
        f"{nearest - begin}, or of none"
    )


def _restore(self: Any, args: Any, hosts: Any, kwargs: Any, kwarg_hosts: Any) -> None:
    """GridExecutor._restore_args_dev for tensors that were elsewhere; those on the CPU were used in place."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        _upstream_restore(self, args, hosts, kwargs, kwarg_hosts)


@contextmanager
def last_programs(count: int) -> Iterator[None]:
    """Run only the last `count` programs of each launch, along the grid's first axis.

    Where offsets overflow 32 bits there are too many programs to interpret; the last ones have the largest.
    """
    builder = interpreter.InterpreterBuilder
    upstream = interpreter.GridExecutor.__init__
    full = [1, 1, 1]

    def init(self: Any, fn: Any, names: Any, grid: Any, *rest: Any) -> None:
        def reduced(args: Any) -> tuple[int, ...]:
            full[:] = [*(grid(args) if callable(grid) else grid), 1, 1][:3]
            return (min(full[0], count), *full[1:])

        upstream(self, fn, names, reduced, *rest)

    def place(self: Any, x: int, y: int, z: int) -> None:
        self.grid_idx = (x + max(0, full[0] - count), y, z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__init__", init)
        patch.setattr(builder, "set_grid_dim", lambda self, *dims: setattr(self, "grid_dim", tuple(full)))
        patch.setattr(builder, "set_grid_idx", place)
        yield


def _patch_tensor(tensor: type, scope: Any) -> None:
    """_patch_lang_tensor whose __index__ takes the one-element arrays that hold scalars."""
    _upstream_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patch_core(lang: ModuleType, scope: Any) -> None:
    """_patch_lang_core whose tl.range keeps the width of its bounds."""
    _upstream_core(lang, scope)
    upstream = lang.range

    def wide(*bounds: Any, **options: Any) -> Iterable[Any]:
        steps = upstream(*bounds, **options)
        if not any(isinstance(bound, tl.tensor) and bound.dtype == tl.int64 for bound in bounds):
            return steps
        handles = (interpreter.TensorHandle(np.array([step], np.int64), tl.int64) for step in steps)
        return (tl.tensor(handle, tl.int64) for handle in handles)

    scope.set_attr(lang, "range", wide)


class _PoisonedTorch(ModuleType):
    """torch, but what it leaves uninitialised is NaN, or POISON for integers."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        return _filling(found) if name in ("empty", "empty_like", "empty_strided") else found


def _filling(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(
            True if tensor.dtype == torch.bool else min(POISON, torch.iinfo(tensor.dtype).max)
        )

    return made


def poisoned(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType | str) -> None:
    """Make torch.empty, empty_like, empty_strided and new_empty give NaN or garbage in these modules.

    A kernel that forgets to write an element then shows it. `x.new_empty` is found by no module name and is
    poisoned for every caller; a module that imports `empty` itself is not reached.
    """
    for module in modules:
        found = importlib.import_module(module) if isinstance(module, str) else module
        assert found.__dict__.get("torch") is torch, f"{found.__name__} does not import torch as torch"
        monkeypatch.setattr(found, "torch", _PoisonedTorch("torch"))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _filling(getattr(torch.Tensor, name)))
