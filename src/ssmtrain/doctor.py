"""`ssmtrain doctor`: versions, devices, kernels, disk, and what would be slow here and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.config.errors import FINISHED

if TYPE_CHECKING:
    from ssmtrain.config.request import Request

PACKAGES = (
    "torch",
    "triton",
    "lightning",
    "hydra-core",
    "omegaconf",
    "pydantic",
    "numpy",
    "safetensors",
    "tokenizers",
    "datasets",
    "wandb",
    "deepspeed",
    "transformers",
    "peft",
    "lm-eval",
    "submitit",
    "tensorboard",
)

OPTIONAL = ("deepspeed", "transformers", "peft", "lm-eval", "submitit", "tensorboard")

MALICIOUS = {("lightning", "2.6.2"), ("lightning", "2.6.3")}
"""Releases that steal credentials when imported (April 2026)."""

TOO_OLD = {"torch": ((2, 10), "torch.load before 2.10 can be made to corrupt memory (CVE-2026-24747)")}


def command(request: Request) -> int:
    """Print what was found, as text or JSON; always exit 0."""
    found = examine()
    print(json.dumps(found, indent=2) if request.as_json else "\n".join(describe(found)))
    return FINISHED


def examine() -> dict[str, Any]:
    """Everything doctor reports, as plain data; `advice` is what would be slow, wrong or dangerous."""
    packages = versions()
    found: dict[str, Any] = {
        "ssmtrain": importlib.import_module("ssmtrain").__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "cpu": cpu(),
        "memory_bytes": memory(),
        "disk": disk(),
        "compiler": compiler(),
    }
    advice = package_advice(packages)
    if any(pair in MALICIOUS for pair in packages.items()):
        # Importing anything beside a malicious package would run it.
        return {**found, "gpus": [], "kernels": {}, "advice": advice}
    found["gpus"] = gpus()
    found["kernels"] = kernels(bool(found["gpus"]))
    found["advice"] = advice + speed_advice(found) + disk_advice(found["disk"])
    return found


def versions() -> dict[str, str | None]:
    """Installed versions from the packages' metadata, nothing imported; None: not installed."""
    result: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = None
    return result


def package_advice(packages: dict[str, str | None]) -> list[str]:
    """Missing, malicious and vulnerable versions."""
    advice = []
    for name, version in packages.items():
        if version is None:
            if name not in OPTIONAL and not (name == "triton" and sys.platform != "linux"):
                advice.append(f"{name} is not installed: pip install {name}")
        elif (name, version) in MALICIOUS:
            advice.append(
                f"{name} {version} is a malicious release that steals credentials: remove it now "
                f"(pip install 'lightning>=2.6.6'), and replace every token this machine had"
            )
        elif name in TOO_OLD and _numbers(version) < TOO_OLD[name][0]:
            least = ".".join(map(str, TOO_OLD[name][0]))
            advice.append(f"{name} {version} is too old, {TOO_OLD[name][1]}: pip install '{name}>={least}'")
    return advice


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def cpu() -> dict[str, Any]:
    """Cores this process may use, and what it was told to use."""
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:
        usable = os.cpu_count() or 1
    return {"cores": os.cpu_count(), "usable": usable, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}


def memory() -> int | None:
    """Bytes of physical memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def disk() -> dict[str, Any]:
    """Free space where runs and prepared data would go, and whether it can be written."""
    result = {}
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for name, folder in (("runs", Path("runs")), ("cache", Path(cache))):
        place = folder.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        try:
            free: int | None = shutil.disk_usage(place).free
        except OSError:
            free = None
        result[name] = {"path": str(folder), "free_bytes": free, "writable": os.access(place, os.W_OK)}
    return result


def compiler() -> str | None:
    """The C compiler that Triton and torch.compile would call."""
    named = os.environ.get("CC")
    return next(
        (path for path in map(shutil.which, filter(None, (named, "cc", "gcc", "clang"))) if path), None
    )


def gpus() -> list[dict[str, Any]]:
    """The GPUs that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    result = []
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        result.append(
            {
                "name": about.name,
                "memory_bytes": about.total_memory,
                "capability": f"{about.major}.{about.minor}",
                "bf16": about.major >= 8,
            }
        )
    return result


def kernels(on_gpu: bool) -> dict[str, Any]:
    """What the kernel backend would choose here, and why."""
    from ssmtrain.kernels import backend

    decided = backend.configure("auto", "cuda" if on_gpu else "cpu")
    return {"decision": decided.ops, "why": decided.why, **backend.describe()}


def speed_advice(found: dict[str, Any]) -> list[str]:
    """What would be slow, and what would mend it."""
    import torch

    advice = []
    if not found["gpus"]:
        built = torch.version.cuda is not None
        why = "torch is built for CUDA but sees no GPU (driver, CUDA_VISIBLE_DEVICES)" if built else "no GPU"
        advice.append(f"{why}: small models only; the CPU does about 1/1000 of an H100")
        if found["compiler"] is None:
            advice.append("no C compiler: trainer.compile=true cannot work (apt-get install gcc)")
    elif found["compiler"] is None:
        advice.append("no C compiler: Triton kernels cannot be built (apt-get install gcc)")
    for op in [op for op, which in found["kernels"].get("decision", {}).items() if which == "reference"]:
        if found["gpus"]:
            advice.append(
                f"{op} runs its torch reference on the GPU, many times slower: {found['kernels']['why']}"
            )
    if any(not gpu["bf16"] for gpu in found["gpus"]):
        advice.append("a GPU here has no bf16: use trainer.precision=fp32")
    threads = found["cpu"]["OMP_NUM_THREADS"]
    if not found["gpus"] and threads and threads.isdigit() and int(threads) < found["cpu"]["usable"]:
        advice.append(f"OMP_NUM_THREADS={threads} leaves {found['cpu']['usable'] - int(threads)} cores idle")
    if importlib.util.find_spec("fla") is not None and not found["gpus"]:
        advice.append(
            "flash-linear-attention without a GPU breaks some transformers models: pip uninstall fla-core"
        )
    return advice


def disk_advice(places: dict[str, Any]) -> list[str]:
    """Full or read-only places."""
    advice = []
    for name, place in places.items():
        if not place["writable"]:
            key = "runs_dir" if name == "runs" else "data.cache_dir"
            advice.append(f"{place['path']} cannot be written: set {key}=…")
        elif place["free_bytes"] is not None and place["free_bytes"] < 5 * 2**30:
            advice.append(f"only {place['free_bytes'] / 2**30:.1f} GiB free for {place['path']}")
    return advice


def describe(found: dict[str, Any]) -> list[str]:
    """What was found, as lines."""
    lines = [f"ssmtrain {found['ssmtrain']}, Python {found['python']}, {found['system']}", "", "packages:"]
    for name, version in found["packages"].items():
        missing = "not installed (optional)" if name in OPTIONAL else "not installed"
        lines.append(f"  {name.ljust(14)} {version or missing}")
    gib = f"{found['memory_bytes'] / 2**30:.0f} GiB" if found["memory_bytes"] else "unknown"
    cores = found["cpu"]
    lines += ["", f"cpu: {cores['usable']} of {cores['cores']} cores usable, memory {gib}"]
    for i, gpu in enumerate(found["gpus"]):
        lines.append(f"gpu {i}: {gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, sm {gpu['capability']}")
    if not found["gpus"]:
        lines.append("gpu: none")
    if found["kernels"]:
        lines.append(f"kernels: {found['kernels']['why']}")
    lines.append(f"compiler: {found['compiler'] or 'none'}")
    for name, place in found["disk"].items():
        free = f"{place['free_bytes'] / 2**30:.0f} GiB free" if place["free_bytes"] is not None else "unknown"
        lines.append(f"disk for {name}: {place['path']}, {free}{'' if place['writable'] else ', read-only'}")
    lines.append("")
    lines += [f"! {line}" for line in found["advice"]] or ["nothing to mend"]
    return lines
