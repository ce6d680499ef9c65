"""Which implementation of each op runs, and why: decided once per run, logged once.

An op has a Triton body when its folder holds a `triton.py`. `auto` takes it on a GPU; where an op has none,
the reference runs there and a warning says so by name, unless the reference is made of torch's own fused GPU
kernels. A backend asked for by name runs or is an error.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Name = Literal["auto", "reference", "triton"]

NATIVE = frozenset({"attention", "grouped_gemm"})
"""Ops whose torch form is the fast one on a GPU too: FlexAttention and SDPA, grouped_mm."""

log = logging.getLogger(__name__)


class BackendError(RuntimeError):
    """The kernel backend asked for cannot run here."""


@dataclass(frozen=True)
class Backend:
    """A decision: the implementation of every op on one device type."""

    name: str
    """What was asked for: auto, reference or triton."""
    device_type: str
    ops: dict[str, str]
    """Op -> "reference" or "triton"."""
    why: str
    """One sentence for the log and for `ssmtrain doctor`."""


_current: Backend | None = None


def op_names() -> list[str]:
    """Names of all ops: the folders beside this file."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/__init__.py"))


def has_triton(op: str) -> bool:
    """Whether the op has a Triton body in this version."""
    return (Path(__file__).parent / op / "triton.py").is_file()


def configure(name: str = "auto", device_type: str = "cpu") -> Backend:
    """Decide and log what runs each op on a device type ("cpu", "cuda"); BackendError if impossible."""
    global _current
    backend = _decide(name, device_type)
    if backend != _current:
        # On a GPU the reference is many times slower than a kernel: never silently.
        slow = backend.name == "auto" and device_type == "cuda" and any(map(_is_slow, backend.ops.items()))
        log.log(logging.WARNING if slow else logging.INFO, "kernels: %s", backend.why)
        _current = backend
    return backend


def chosen(op: str, device_type: str | None = None) -> str:
    """Return "reference" or "triton" for an op; tensors off the configured device use the reference."""
    backend = _current
    if backend is None:
        backend = configure("auto", device_type or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device_type is not None and device_type != backend.device_type:
        if device_type == "cuda":
            # Configured for the CPU, or not at all before its first CPU tensor: decide again, audibly.
            return configure(backend.name, "cuda").ops[op]
        return "reference"
    return backend.ops[op]


def describe() -> dict[str, object]:
    """Return the decision in force and what there is to choose from, as plain data for reports."""
    bodies = {op: ["reference", "triton"] if has_triton(op) else ["reference"] for op in op_names()}
    current = None
    if _current is not None:
        current = {
            "name": _current.name,
            "device": _current.device_type,
            "ops": dict(_current.ops),
            "why": _current.why,
        }
    return {"available": bodies, "triton_runs": triton_obstacle("cuda") is None, "current": current}


def triton_obstacle(device_type: str) -> str | None:
    """Return why Triton kernels cannot run on this device type, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device_type != "cuda":
        return "there is no GPU in this run and TRITON_INTERPRET=1 is not set"
    if not torch.cuda.is_available():
        return "torch sees no GPU (ssmtrain doctor)"
    return None


def _decide(name: str, device_type: str) -> Backend:
    ops = op_names()
    if name == "reference":
        why = f"reference for all ops on {device_type}, as asked"
        return Backend(name, device_type, dict.fromkeys(ops, "reference"), why)
    if name not in ("auto", "triton"):
        raise BackendError(f"unknown kernel backend {name!r}: choose auto, reference or triton")
    obstacle = triton_obstacle(device_type)
    without = [op for op in ops if not has_triton(op) and op not in NATIVE]
    bodies = {op: "triton" if has_triton(op) else "reference" for op in ops}
    if name == "triton":
        if obstacle:
            raise BackendError(f"kernel backend triton cannot run: {obstacle}. Use auto or reference")
        if without:
            names = ", ".join(without)
            raise BackendError(
                f"kernel backend triton cannot run: no Triton body for {names}. Use auto or reference"
            )
        return Backend(name, device_type, bodies, f"triton on {device_type}")
    if device_type != "cuda":
        why = f"reference for all ops on {device_type}, its fast path"
        return Backend(name, device_type, dict.fromkeys(ops, "reference"), why)
    if obstacle:
        without, bodies = [op for op in ops if op not in NATIVE], dict.fromkeys(ops, "reference")
    why = "triton on cuda"
    if without:
        cause = obstacle or "no Triton body in this version"
        why = f"on cuda the slow torch reference runs for {', '.join(without)}: {cause}"
    return Backend(name, device_type, bodies, why)


def _is_slow(decision: tuple[str, str]) -> bool:
    op, body = decision
    return body == "reference" and op not in NATIVE
