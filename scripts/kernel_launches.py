"""What the ops launch, recorded where the launches happen, so that no signature is written twice.

`JITFunction.run` is replaced, and the ops are called as a user calls them. Without a GPU they are called on
fake tensors, which have shapes, strides and no memory, and a launch is compiled for an architecture as the
launcher would compile it there: same types, same specialisation on alignment and on arguments that are 1.
"""

from __future__ import annotations

import os

# Decides how kernels are decorated when they are imported, below.
os.environ.pop("TRITON_INTERPRET", None)

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from kernel_cases import Case
from ssmtrain.kernels import backend, tuned

Table = Mapping[str, Mapping[str, Mapping[str, tuned.Config]]]
"""Architecture -> kernel -> shape key -> config: tuned.json."""


@dataclass(frozen=True)
class Launch:
    """One launch: kernel[grid](*args, **kwargs)."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name, with its op's."""
        return f"{self.kernel.fn.__module__.removeprefix('ssmtrain.kernels.')}.{self.kernel.fn.__name__}"

    def bound(self) -> dict[str, Any]:
        """Arguments by name, defaults included, options such as num_warps left out."""
        names = set(self.kernel.signature.parameters)
        found = self.kernel.signature.bind(*self.args, **{k: v for k, v in self.kwargs.items() if k in names})
        found.apply_defaults()
        return dict(found.arguments)

    def constants(self) -> dict[str, Any]:
        """The constexpr arguments and the options: what a config decides."""
        bound = self.bound()
        constants = {p.name: bound[p.name] for p in self.kernel.params if p.is_constexpr}
        return constants | {k: v for k, v in self.kwargs.items() if k not in bound}

    def replay(self) -> None:
        """Launch it again, on the same tensors."""
        self.kernel.run(*self.args, grid=self.grid, warmup=False, **self.kwargs)


@contextmanager
def recorded(execute: bool) -> Iterator[list[Launch]]:
    """Collect the launches made in the block; they run too, or not."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if warmup:  # what kernels/ahead.py compiles before the launch
            return run(self, *args, grid=grid, warmup=True, **kwargs)
        launch = Launch(self, (), args, dict(kwargs))
        size = tuple(grid(launch.bound())) if callable(grid) else tuple(grid)
        launches.append(Launch(self, size, args, dict(kwargs)))
        return run(self, *args, grid=grid, warmup=False, **kwargs) if execute else None

    with mock.patch.object(JITFunction, "run", record):
        yield launches


@contextmanager
def table(content: Table) -> Iterator[dict[tuple[str, str], tuned.Config]]:
    """Put a table in the place of tuned.json; collect what is looked up: (kernel, shape key) -> fallback."""
    asked: dict[tuple[str, str], tuned.Config] = {}

    def lookup(kernel: str, device: torch.device, key: str, fallback: tuned.Config) -> tuned.Config:
        asked[kernel, key] = dict(fallback)
        return {**fallback, **content.get(tuned.architecture(device), {}).get(kernel, {}).get(key, {})}

    with mock.patch.object(tuned, "lookup", lookup):
        yield asked


@contextmanager
def pretended(arch: str) -> Iterator[None]:
    """Pretend that CPU tensors are on a GPU of this architecture, for which Triton bodies are chosen."""
    ops = {op: "triton" if backend.has_triton(op) else "reference" for op in backend.op_names()}
    for op in ops:
        if ops[op] == "triton":
            importlib.import_module(f"ssmtrain.kernels.{op}.triton")  # ops import theirs when first called
    chosen = backend.Backend("triton", "cpu", ops, "recording")
    major, minor = divmod(int(arch.removeprefix("sm_")), 10)
    properties = SimpleNamespace(multi_processor_count=132, major=major, minor=minor, L2_cache_size=50 << 20)
    with ExitStack() as stack:
        for owner, name, value in (
            (backend, "_current", chosen),
            (tuned, "architecture", lambda device: arch),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.cuda, "get_device_capability", lambda device=None: (major, minor)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        # A custom op's body is run where torch would only ask for the shapes of its results.
        for custom in OPDEFS.values():
            if custom._namespace == "ssmtrain":
                stack.enter_context(mock.patch.object(custom, "_abstract_fn", custom._init_fn))
        yield


def record_fake(case: Case, arch: str) -> list[Launch]:
    """The launches of a case's forward and backward pass on an architecture, without memory or a GPU."""
    with warnings.catch_warnings(), FakeTensorMode(), pretended(arch), recorded(execute=False) as launches:
        warnings.simplefilter("ignore")
        case.both(case.make("cpu"))
    return launches


def specialised(launch: Launch, arch: str) -> tuple[ASTSource, dict[str, Any], GPUTarget]:
    """Source, options and target that the launcher would compile on this architecture."""
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    made = make_backend(target)
    kernel = launch.kernel
    bind: Callable[..., Any] = create_function_from_signature(kernel.signature, kernel.params, made)
    args = [_pointer(arg) for arg in launch.args]
    kwargs = {name: _pointer(value) for name, value in launch.kwargs.items()}
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        made, kwargs, bound, specialization, options
    )
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    return language(kernel, signature, constants, attributes), options.__dict__, target


class _Pointer(MockTensor):
    """A tensor as the launcher sees it: its dtype and how its address is aligned."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.dtype, tuple(tensor.shape))
        # Allocations are aligned; a view's offset may not be.
        self.address = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:  # type: ignore[override]
        """A number aligned as the address is."""
        return self.address


def _pointer(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Pointer(value)
    if isinstance(value, TensorDescriptor):
        return TensorDescriptor(
            _pointer(value.base), value.shape, value.strides, value.block_shape, value.padding
        )
    return value


def compiled(launch: Launch, arch: str) -> Any:
    """The launch's kernel, compiled for the architecture (from Triton's cache where it is there)."""
    source, options, target = specialised(launch, arch)
    return triton.compile(source, target=target, options=options)
