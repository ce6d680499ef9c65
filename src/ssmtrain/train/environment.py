"""What a run is computed with: versions, processor and driver. Another one may change the last bits."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import torch

import ssmtrain

DRIVER = Path("/proc/driver/nvidia/version")


@functools.cache
def environment(device: torch.device) -> dict[str, str | None]:
    """The versions and the processor that this process trains with, as a checkpoint keeps them."""
    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    on_gpu = device.type == "cuda"
    return {
        "ssmtrain": ssmtrain.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": _driver() if on_gpu else None,
    }


def changes(then: Any, now: dict[str, str | None]) -> list[str]:
    """What differs, as "torch 2.12.0 then, 2.13.0 now"; a checkpoint that does not say is not compared."""
    if not isinstance(then, dict):
        return []
    differing = [key for key in now if key in then and then[key] != now[key]]
    return [f"{key} {str(then[key])[:60]} then, {now[key]} now" for key in differing]


def _processor() -> str:
    """The CPU by what decides the order of its sums: architecture and vector instructions."""
    return f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _driver() -> str | None:
    """The version of NVIDIA's driver, where the system tells it."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text())
    except OSError:
        return None
    return found[0] if found else None
