"""Dense bf16 peaks of GPUs, from their datasheets, in FLOP/s: the measure of model FLOPs utilisation."""

from __future__ import annotations

import torch

PEAKS = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "A30": 165e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
}
"""By a part of the device's name; of several that fit, the longest counts."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device; None on a CPU and on GPUs that the table does not know."""
    return peak_of_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of_name(name: str) -> float | None:
    """Dense bf16 peak of a GPU by the name its driver gives."""
    words = f" {name} ".replace("-", " ")
    fits = [part for part in PEAKS if f" {part} " in words]
    return PEAKS[max(fits, key=len)] if fits else None
