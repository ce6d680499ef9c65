"""`ssmtrain doctor`: versions, devices, kernels, disk, and what would be slow here and why.

With config= or run= also what that recipe or run needs: room for its next checkpoint, memory (needs.py).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.config.errors import FINISHED, UserError

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
    if request.overrides and not request.words:
        stray = request.overrides[0]
        raise UserError(f"doctor takes no {stray!r}", "keys go beside config=<recipe> or run=<run>")
    found = examine()
    if request.words and not any(pair in MALICIOUS for pair in found["packages"].items()):
        from ssmtrain import needs

        found["needs"] = needs.needs(request.words, request.overrides)
        found["advice"] += needs.advice(found["needs"], found["gpus"], found["compilers"])
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
        "compilers": {"cc": compiler(), "cxx": compiler("CXX", ("c++", "g++", "clang++"))},
        "python_headers": headers(),
    }
    advice = package_advice(packages)
    if any(pair in MALICIOUS for pair in packages.items()):
        # Importing anything beside a malicious package would run it.
        return {**found, "gpus": [], "kernels": {}, "advice": advice}
    found["gpus"] = gpus()
    found["kernels"] = kernels(bool(found["gpus"]))
    found["advice"] = advice + conflicts() + speed_advice(found) + disk_advice(found["disk"])
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


def compiler(variable: str = "CC", names: tuple[str, ...] = ("cc", "gcc", "clang")) -> str | None:
    """The C (or C++) compiler that Triton and torch.compile would call."""
    named = os.environ.get(variable)
    return next((path for path in map(shutil.which, filter(None, (named, *names))) if path), None)


def headers() -> bool:
    """Whether Python's own header is there, which what Triton compiles includes."""
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def conflicts() -> list[str]:
    """Installed versions that another installed package says it does not work with."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        return ["packaging is not installed, so versions cannot be compared: pip install packaging"]
    lines = []
    for name in ("ssmtrain", *PACKAGES):
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in wanted:
            try:
                one = Requirement(text)
                if one.marker is not None and not one.marker.evaluate({"extra": ""}):
                    continue
                there = importlib.metadata.version(one.name)
            except (InvalidRequirement, importlib.metadata.PackageNotFoundError):
                continue
            if not one.specifier.contains(there, prereleases=True):
                wants = f"{one.name}{one.specifier}"
                lines.append(f"{name} needs {wants}, {there} is installed: pip install '{wants}'")
    return lines


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
        elif found["compilers"]["cxx"] is None:
            advice.append("no C++ compiler: trainer.compile=true cannot work here (apt-get install g++)")
    elif found["compiler"] is None:
        advice.append("no C compiler: Triton kernels cannot be built (apt-get install gcc)")
    elif not found["python_headers"]:
        advice.append("no Python.h: Triton kernels cannot be built (apt-get install python3-dev)")
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
    if "needs" in found:
        from ssmtrain import needs

        lines += ["", *needs.describe(found["needs"])]
    lines.append("")
    lines += [f"! {line}" for line in found["advice"]] or ["nothing to mend"]
    return lines
