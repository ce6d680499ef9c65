"""Timing calls on one NVIDIA GPU, and comparing them with the fp32 reference.

What bench_kernels.py and tune_kernels.py share.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kernel_cases import Case, Inputs
from ssmtrain.kernels import backend

DEVICE = "cuda"
NAP = 4_000_000
"""Clock cycles for which the GPU waits while the launches of one call are queued."""


@dataclass
class Runner:
    """A case with its input sets."""

    case: Case
    sets: list[Inputs]
    grads: list[Tensor]
    turn: int = 0
    samples: dict[str, list[float]] = field(default_factory=lambda: {"forward": [], "both": []})

    @classmethod
    def prepare(cls, case: Case) -> Runner:
        """Make input sets worth several L2 caches, two at least, and warm up: compile, autotune."""
        sets = [case.make(DEVICE)]
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        wanted = 1 if case.op == "mixer" else max(2, min(16, 1 + 3 * cache // tensor_bytes(sets[0].values())))
        sets += [case.make(DEVICE) for _ in range(wanted - 1)]
        with torch.no_grad():
            outputs = case.call(sets[0])
        runner = cls(case, sets, [torch.randn_like(y) for y in outputs])
        for _ in range(3):
            milliseconds(runner.forward)
            milliseconds(runner.both)
        return runner

    def _next(self) -> Inputs:
        self.turn += 1
        return self.sets[self.turn % len(self.sets)]

    def forward(self) -> None:
        """One forward pass, no gradients wanted."""
        with torch.no_grad():
            self.case.call(self._next())

    def both(self) -> None:
        """One forward and backward pass."""
        inputs = self._next()
        self.case.gradients(inputs, self.case.call(inputs), self.grads)

    def sample(self) -> None:
        """Time one of each."""
        for name, step in (("forward", self.forward), ("both", self.both)):
            self.samples[name].append(milliseconds(step))

    def median(self, name: str) -> float:
        """Median of the samples."""
        return statistics.median(self.samples[name])


def milliseconds(step: Callable[[], object]) -> float:
    """GPU time of a step: the GPU naps while the launches queue up, so that Python's pace does not count."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(NAP)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def tensor_bytes(tensors: Any) -> int:
    """Bytes of the elements of tensors, Nones skipped."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def floors(inputs: int, outputs: int, grads: int, bytes_per_ms: float) -> tuple[float, float]:
    """Milliseconds to move the bytes of a forward, and of a forward and backward pass."""
    forward = inputs + outputs
    return forward / bytes_per_ms, (forward + inputs + outputs + grads) / bytes_per_ms


def bandwidth() -> float:
    """Bytes a millisecond of a copy of 1 GiB, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    taken = [milliseconds(lambda: target.copy_(source)) for _ in range(15)]
    return 2 * source.numel() / statistics.median(taken[5:])


def errors(case: Case) -> dict[str, float]:
    """Error of outputs and gradients against the fp32 reference, as a fraction of the reference's norm."""
    torch.manual_seed(0)
    inputs = case.make(DEVICE)
    outputs = case.call(inputs)
    grads = [torch.randn_like(y) for y in outputs]
    found = outputs + case.gradients(inputs, outputs, grads)
    names = [f"output {i}" for i in range(len(outputs))]
    names += [f"d {name}" for name, x in inputs.items() if x is not None and x.requires_grad]
    exact = {
        name: x.detach().float().requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    if case.op == "mixer":
        exact |= {name: x for name, x in inputs.items() if name != "x"}  # the module's own parameters
    ops = dict.fromkeys(backend.op_names(), "reference")
    with mock.patch.object(backend, "_current", backend.Backend("reference", DEVICE, ops, "comparing")):
        outputs = case.call(exact)
        wanted = outputs + case.gradients(exact, outputs, [g.float() for g in grads])
    return {
        name: ((a.float() - b).norm() / b.norm()).item()
        for name, a, b in zip(names, found, wanted, strict=True)
    }


def attempt(case: Case) -> Runner | str:
    """A runner, or why there is none."""
    try:
        return Runner.prepare(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def contest(contenders: dict[str, Case], rounds: int) -> dict[str, Runner | str]:
    """Time several implementations, taking turns in each round."""
    found = {name: attempt(case) for name, case in contenders.items()}
    runners = [runner for runner in found.values() if isinstance(runner, Runner)]
    for number in range(rounds):
        for runner in runners[:: 1 if number % 2 else -1]:
            runner.sample()
    return found
