"""Launch configurations of the Triton kernels: a table by architecture and shape, never tuned while training.

The table, `tuned.json`, is written by `scripts/tune_kernels.py`; a shape that it does not know gets the
kernel's own fallback, which is small enough for every supported architecture.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import torch

Config = dict[str, int]
"""Block sizes and the like by name, with num_warps and num_stages."""


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def lookup(kernel: str, device: torch.device, key: str, fallback: Config) -> Config:
    """Return the tuned configuration of a kernel for a shape key on this device, else the fallback."""
    found = _table().get(architecture(device), {}).get(kernel, {}).get(key)
    return fallback if found is None else {**fallback, **found}


@functools.cache
def architecture(device: torch.device) -> str:
    """Return the device's key in the table: "sm_90" and the like, "cpu" under the interpreter."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors the device has, as many as an H100 under the interpreter.

    For how work is handed out only: no bit of a result may depend on it.
    """
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _table() -> dict[str, dict[str, dict[str, Config]]]:
    return json.loads((Path(__file__).parent / "tuned.json").read_text())
