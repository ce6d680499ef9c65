"""Compile the kernels of an op at once, on threads, before its first call launches them one by one.

An op of ten kernels would otherwise compile them in turn, with one core: the first step of a training run is
where users wait for it. Those of the backward pass start with the forward pass's and go on while that runs.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssmtrain.kernels import tuned

try:
    from triton.runtime._async_compile import active_mode
except ImportError:  # an older Triton: kernels compile as they are launched
    active_mode = None

log = logging.getLogger(__name__)

_only_compiling: ContextVar[bool] = ContextVar("only_compiling", default=False)
_seen: set[tuple[object, ...]] = set()
_begun: dict[tuple[object, str], Future[Any]] = {}
"""By device and Triton's key: kernels that compile, or have and were not launched yet."""
_lock = threading.Lock()


class Back(NamedTuple):
    """The op that a backward pass will call, and how to tell its arguments."""

    op: Callable[..., Any]
    arguments: Callable[[tuple[Any, ...], tuple[Any, ...], Any], tuple[Any, ...]]
    """Of the forward op's arguments, the same without memory, and its results without memory."""


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **constants: object) -> None:
    """Launch a Triton kernel, or where `compile_first` asks for no more, compile it."""
    if _only_compiling.get():
        kernel.warmup(*(a.dtype if isinstance(a, Tensor) else a for a in args), grid=grid, **constants)
    else:
        kernel[grid](*args, **constants)


def aligned(tensor: Tensor) -> bool:
    """Return whether the tensor begins at a multiple of 16 bytes, as what is compiled ahead supposes."""
    return _only_compiling.get() or tensor.data_ptr() % 16 == 0


def compiled_first(op: Callable[..., Any], back: Back | None = None) -> Callable[..., Any]:
    """Return an op that first compiles all it will `launch`, at each call with new sizes and options.

    To see what that is, the op runs on fake tensors. The kernels of `back`, where a gradient is wanted, begin
    to compile beside its own and are not waited for. A kernel that does not compile says so when launched.
    """
    names = list(inspect.signature(op).parameters)

    @functools.wraps(op)
    def run(*args: object) -> Any:
        first = next(a for a in args if isinstance(a, Tensor))
        if active_mode is not None and first.is_cuda and not tuned.interpreting():
            # An op sees its inputs as they are: only where a gradient is recorded do they require one.
            further = back if first.requires_grad else None
            key = (op, further is None, *map(_kind, names, args))
            if key not in _seen:
                _seen.add(key)
                try:
                    with torch.cuda.device(first.device):
                        compile_now(op, args, further, first.device)
                except Exception as error:  # launches compile what is missing
                    log.debug("%s: not compiled ahead: %s", op.__name__, error)
        return op(*args)

    return run


def _kind(name: str, value: object) -> object:
    """What of an argument decides what is compiled."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride(), value.device
    if name == "n_docs":  # another number in each batch, of which Triton sees no more than this
        assert isinstance(value, int)
        return value == 1, value % 16 == 0
    return value


def compile_now(op: Callable[..., Any], args: tuple[Any, ...], back: Back | None, device: object) -> None:
    """Compile what op(*args) launches, for the current device, and begin with what `back` will."""
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="ssmtrain-compile")
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            fakes = tuple(fake.from_tensor(a.detach()) if isinstance(a, Tensor) else a for a in args)
            with _asking(pool, device) as asked:
                results = op(*fakes)
            if back is not None:
                with suppress(Exception), _asking(pool, device):
                    back.op(*back.arguments(args, fakes, results))
    finally:
        pool.shutdown(wait=False)
    for key, keep in asked:
        with suppress(Exception):
            # Each device loads a kernel for itself, hence has its own; the first to launch it takes it.
            keep(_begun[key].result())
        _begun.pop(key, None)


Asked = list[tuple[tuple[object, str], Callable[[Any], None]]]


class _Mode:
    """What Triton asks, in the place of its AsyncCompileMode, to compile a kernel.

    Triton's own puts promises among the kernels, which not all versions can launch, and waits for them all.
    """

    def __init__(self, pool: Executor, device: object) -> None:
        self.pool, self.device = pool, device
        self.asked: Asked = []

    def submit(self, key: str, make: Callable[[], Any], keep: Callable[[Any], None]) -> None:
        """Begin to compile, unless somebody has; `keep` puts the kernel where a launch looks for it."""
        place = (self.device, key)
        with _lock:
            if place not in _begun:
                _begun[place] = self.pool.submit(_made, make)
        self.asked.append((place, keep))


@contextmanager
def _asking(pool: Executor, device: object) -> Iterator[Asked]:
    """Where `launch` compiles on a pool; what it was asked for is in the list."""
    mode = _Mode(pool, device)
    only, active = _only_compiling.set(True), active_mode.set(mode)
    try:
        yield mode.asked
    finally:
        active_mode.reset(active)
        _only_compiling.reset(only)


def _made(make: Callable[[], Any]) -> Any:
    """A kernel, and in Triton's cache the C code that launches it: Triton 3.6 compiles that too, with gcc,
    when it is first launched, in 0.4 s."""
    kernel = make()
    with suppress(Exception):
        from triton.runtime import driver

        driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel
