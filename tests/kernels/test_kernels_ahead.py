"""Kernels that compile before they are launched: for a GPU that is not there, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssmtrain.kernels import ahead, tuned

pytest.importorskip("triton.runtime._async_compile")

SRC = Path(__file__).parents[2] / "src"

SCRIPT = """
import threading
from types import SimpleNamespace
import torch, triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from ssmtrain.kernels import ahead

stubs, made, waits = [], [], threading.Event()
triton.runtime.driver.set_active(SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    launcher_cls=lambda src, metadata: stubs.append(src.name),
))

def listener(src, cache_hit, **rest):
    made.append((src.name, cache_hit, threading.current_thread() is threading.main_thread()))

knobs.compilation.listener = listener

@triton.jit
def shared(x):
    tl.store(x, 0.0)

@triton.jit
def twice(x, K: tl.constexpr):
    tl.store(x, 2.0 * tl.load(x) + K)

@triton.jit
def wrong(x):
    tl.store(x, tl.arange(0, 3))

def forward(x, n_docs):
    ahead.launch(shared, (1,), x)
    ahead.launch(twice, (1,), x, K=1)
    return x * 2

def backward(d_y, n_docs):
    ahead.launch(shared, (1,), d_y)
    ahead.launch(twice, (1,), d_y, K=2)
    ahead.launch(twice, (1,), d_y, K=3)

def bad(x):
    ahead.launch(wrong, (1,), x)
    ahead.launch(shared, (1,), x)

def kernels(kernel):
    return [k for k in kernel.device_caches[0][0].values() if k is not None]

def failing(args, fakes, results):
    raise ValueError("of the backward pass")

x = torch.empty(4)
"""

TWO_PASSES = """
back = ahead.Back(backward, lambda args, fakes, results: (results, args[1]))
ahead.compile_now(forward, (x, 5), back, 0)
assert len(kernels(shared)) == len(kernels(twice)) == 1, "what the forward pass launches"
assert all(hasattr(k, "metadata") for k in kernels(shared) + kernels(twice)), "not promises"
assert len(ahead._begun) == 2, ahead._begun
ahead.compile_now(backward, (x, 5), None, 0)
assert len(kernels(shared)) == 1 and len(kernels(twice)) == 3 and not ahead._begun
assert sorted(name for name, *_ in made) == ["shared", "twice", "twice", "twice"], made
assert not any(hit or main for _, hit, main in made), "once each, on threads"
assert sorted(stubs) == ["shared", "twice", "twice", "twice"], stubs
"""

WRONG = """
ahead.compile_now(bad, (x,), None, 0)
assert len(kernels(shared)) == 1 and not kernels(wrong) and not ahead._begun
try:
    wrong.warmup(torch.float32, grid=(1,))
except triton.CompilationError:
    pass
else:
    raise AssertionError("a launch has to say so")
ahead.compile_now(forward, (x, 5), ahead.Back(backward, failing), 0)
assert len(kernels(twice)) == 1
assert not ahead._only_compiling.get() and ahead.active_mode.get() is None
"""


@pytest.mark.parametrize("body", [TWO_PASSES, WRONG], ids=["two passes", "what fails"])
def test_kernels_are_there_before_the_launch(body: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # Triton reads a kernel's source where it stands
    script.write_text(SCRIPT + body)
    env = {**os.environ, "PYTHONPATH": str(SRC), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


GUESSED = """
import sys
import kernel_launches
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from ssmtrain.kernels.parts import parts
from ssmtrain.kernels.selective_scan import selective_scan, triton as s6
from ssmtrain.kernels.ssd import ssd, triton as ssd_
from ssmtrain.kernels.ahead import Back

def names(launches):
    return {kernel_launches.specialised(one, "sm_90")[0].hash() for one in launches}

def compare(call, room, dtype):
    '''What a call's backward pass launches, and what was foreseen in its forward pass.'''
    new = lambda *sizes, dtype=torch.float32: torch.empty(*sizes, dtype=dtype, requires_grad=True)
    with FakeTensorMode(), kernel_launches.pretended("sm_90"), kernel_launches.recorded(False) as seen:
        wide = new(2, 256, 512, dtype=dtype)
        run, module, args = call(wide, new, room)
        results = module.scan(*args)
        first = len(seen)
        module.scan_back(*module._back_arguments(args, args, results))
        second = len(seen)
        y = run()
        third = len(seen)
        y.backward(torch.empty_like(y))
    foreseen, launched = seen[first:second], seen[third:]
    names_of = {one.name for one in launched}
    missing = names(launched) - names(foreseen)
    assert len(foreseen) > 1 and not missing, (module, room, dtype, names_of)

def mamba2(wide, new, room):
    cut = parts if room else lambda whole, shapes: tuple(new(2, 256, *s, dtype=whole.dtype) for s in shapes)
    x, B, C = cut(wide, [(4, 64), (1, 128), (1, 128)])
    dt, A, D, bias = new(2, 256, 4), new(4), new(4), new(4)
    args = (x, dt, A, B, C, D, bias, None, None, 2, 0, True, 0.0, float("inf"), False)
    return (lambda: ssd(x, dt, A, B, C, D=D, dt_bias=bias)[0]), ssd_, args

def mamba1(wide, new, room):
    cut = parts if room else lambda whole, shapes: tuple(new(2, 256, *s, dtype=whole.dtype) for s in shapes)
    u, z = cut(wide, [(256,), (256,)])
    dt, A, D, bias = new(2, 256, 256, dtype=wide.dtype), new(256, 16), new(256), new(256)
    B, C = new(2, 256, 16, dtype=wide.dtype), new(2, 256, 16, dtype=wide.dtype)
    args = (u, dt, A.t(), B, C, D, z, bias, None, None, 2, True, 0.0, float("inf"), False, True)
    return (lambda: selective_scan(u, dt, A, B, C, D=D, z=z, dt_bias=bias)[0]), s6, args

for dtype in (torch.bfloat16, torch.float32):
    for room in (False, True):
        compare(mamba2, room, dtype)
        compare(mamba1, room, dtype)
"""


def test_the_backward_passes_kernels_are_foreseen(tmp_path: Path) -> None:
    """Those that the forward pass begins to compile are those that the backward pass launches."""
    path = os.pathsep.join([str(SRC), str(SRC.parent / "scripts")])
    env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", GUESSED], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


class Asked:
    """An op on a GPU that is not there, and when it asks for its kernels."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.backs: list[ahead.Back | None] = []
        patch.setattr(tuned, "interpreting", lambda: False)
        patch.setattr(ahead, "_seen", set())
        patch.setattr(ahead, "compile_now", self.compile_now)
        patch.setattr(torch.cuda, "device", lambda device: FakeTensorMode())
        self.error: Exception | None = None

    def compile_now(self, op: Any, args: tuple, back: ahead.Back | None, device: object) -> None:
        self.backs.append(back)
        if self.error is not None:
            raise self.error


def test_asked_once_for_all_numbers_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each batch of a packed data set would have the op run twice."""
    asked, back = Asked(monkeypatch), ahead.Back(lambda: None, lambda *a: a)

    def op(x: Tensor, n_docs: int, low: float) -> int:
        return n_docs

    run = ahead.compiled_first(op, back)
    with FakeTensorMode():
        x = torch.empty(3, 4, device="cuda")
        assert [run(x, n, 0.0) for n in (5, 6, 7, 117)] == [5, 6, 7, 117]
        assert asked.backs == [None], "and of no backward pass, which there will not be"
        for n in (16, 32, 1):  # of these Triton makes other kernels
            run(x, n, 0.0)
        assert len(asked.backs) == 3
        run(x, 5, 1.0)
        run(torch.empty(2, 4, device="cuda"), 5, 0.0)
        assert len(asked.backs) == 5
        run(x.requires_grad_(), 5, 0.0)
        assert asked.backs[5:] == [back]
        asked.error = RuntimeError("no threads left")
        assert run(x.detach(), 5, 2.0) == 5, "kernels compile as they are launched"
        assert len(asked.backs) == 7
