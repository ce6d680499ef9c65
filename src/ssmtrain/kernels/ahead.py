"""Compile the kernels of an op at once, on threads, before its first call launches them one by one.

An op of ten kernels would otherwise compile them in turn, with one core: the first step of a training run is
where users wait for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssmtrain.kernels import tuned

try:
    from triton.runtime._async_compile import AsyncCompileMode
except ImportError:  # an older Triton: kernels compile as they are launched
    AsyncCompileMode = None

_only_compiling: ContextVar[bool] = ContextVar("only_compiling", default=False)
_seen: set[tuple[object, ...]] = set()


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **constants: object) -> None:
    """Launch a Triton kernel, or where `compile_first` asks for no more, compile it."""
    if _only_compiling.get():
        kernel.warmup(*(a.dtype if isinstance(a, Tensor) else a for a in args), grid=grid, **constants)
    else:
        kernel[grid](*args, **constants)


def aligned(tensor: Tensor) -> bool:
    """Return whether the tensor begins at a multiple of 16 bytes, as what is compiled ahead supposes."""
    return _only_compiling.get() or tensor.data_ptr() % 16 == 0


def compiled_first(op: Callable[..., Any]) -> Callable[..., Any]:
    """Return an op that first compiles all it will `launch`, at each call with new sizes and options.

    To see what that is, the op runs on fake tensors. A kernel that does not compile says so when launched.
    """

    @functools.wraps(op)
    def run(*args: object) -> Any:
        key = (op, *((a.dtype, a.shape, a.stride(), a.device) if isinstance(a, Tensor) else a for a in args))
        if key not in _seen:
            _seen.add(key)
            first = next(a for a in args if isinstance(a, Tensor))
            if AsyncCompileMode is not None and not tuned.interpreting() and first.is_cuda:
                _compile(op, args, first.device)
        return op(*args)

    return run


def _compile(op: Callable[..., object], args: tuple[object, ...], device: torch.device) -> None:
    token = _only_compiling.set(True)
    try:
        with (
            torch.cuda.device(device),
            ThreadPoolExecutor() as pool,
            AsyncCompileMode(pool, ignore_errors=True),
            FakeTensorMode(allow_non_fake_inputs=True) as fake,
        ):
            op(*(fake.from_tensor(a.detach()) if isinstance(a, Tensor) else a for a in args))
    finally:
        _only_compiling.reset(token)
