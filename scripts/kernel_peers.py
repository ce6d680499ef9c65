"""The public implementations that bench_kernels.py times beside ours, on the same inputs.

Each function returns cases by the name of the package, and the reason for each package that is left out.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernel_cases import Case, Inputs, leaves

Peers = tuple[dict[str, Case], dict[str, str]]
PACKAGES = ("mamba-ssm", "causal-conv1d", "flash-linear-attention")
EXTENSION = "selective_scan_cuda"
"""mamba-ssm's CUDA kernels: the scan of Mamba."""


def versions() -> dict[str, str]:
    """Installed peers and their versions."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def collect(makers: dict[str, Callable[[], Case]]) -> Peers:
    """Make each case; a package that cannot be imported is left out, with its error."""
    cases, missing = {}, {}
    for name, make in makers.items():
        try:
            cases[name] = make()
        except Exception as error:  # a peer built for another torch fails in ways of its own
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return cases, missing


def ssd(case: Case) -> Peers:
    """mamba-ssm's chunked scan, and flash-linear-attention's with B and C expanded to all heads."""
    return collect({"mamba-ssm": lambda: _mamba_scan(case), "fla": lambda: _fla_scan(case)})


def mamba_part(name: str) -> Any:
    """Import a part of mamba_ssm, whose `__init__` asks for a CUDA extension that a pure wheel lacks.

    Where it is missing an empty module stands in for it during the import; what would call it fails.
    """
    absent = importlib.util.find_spec(EXTENSION) is None
    if absent:
        sys.modules[EXTENSION] = types.ModuleType(EXTENSION)
    try:
        return importlib.import_module(f"mamba_ssm.{name}")
    finally:
        if absent:
            del sys.modules[EXTENSION]


def _mamba_scan(case: Case) -> Case:
    scan = mamba_part("ops.triton.ssd_combined").mamba_chunk_scan_combined

    def call(i: Inputs) -> tuple[Tensor, ...]:
        rest = {"D": i["D"], "dt_bias": i["dt_bias"], "dt_softplus": True, "seq_idx": i["doc_ids"]}
        return (scan(i["x"], i["dt"], i["A"], i["B"], i["C"], 256, **rest),)

    return Case(case.name, case.op, case.make, call)


def _fla_scan(case: Case) -> Case:
    scan = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla

    def make(device: torch.device | str) -> Inputs:
        # Step sizes and decays are made beforehand: only the scan itself is timed.
        i: Any = case.make(device)
        if i["doc_ids"] is not None:
            raise NotImplementedError("documents of one length per batch are not its layout")
        with torch.no_grad():
            steps = torch.nn.functional.softplus(i["dt"].float() + i["dt_bias"])
            wide = i["x"].shape[2] // i["B"].shape[2]
            q, k = (i[name].repeat_interleave(wide, dim=2).contiguous() for name in ("C", "B"))
            return leaves({"q": q, "k": k, "v": (i["x"] * steps[..., None]).to(q.dtype), "g": steps * i["A"]})

    def call(i: Inputs) -> tuple[Tensor, ...]:
        return (scan(**i, scale=1.0)[0],)

    return Case(case.name, case.op, make, call)


def conv(case: Case) -> Peers:
    """causal-conv1d, and flash-linear-attention's convolution."""
    return collect({"causal-conv1d": lambda: _cuda_conv(case), "fla": lambda: _fla_conv(case)})


def _cuda_conv(case: Case) -> Case:
    run = importlib.import_module("causal_conv1d").causal_conv1d_fn

    def call(i: Any) -> tuple[Tensor, ...]:
        x = i["x"].transpose(1, 2)
        y = run(x, i["weight"], i["bias"], activation="silu", seq_idx=i["doc_ids"])
        return (y.transpose(1, 2),)

    return Case(case.name, case.op, case.make, call)


def _fla_conv(case: Case) -> Case:
    try:
        run = importlib.import_module("fla.modules.conv").causal_conv1d
    except (ImportError, AttributeError):
        run = importlib.import_module("fla.modules.convolution").causal_conv1d

    def call(i: Any) -> tuple[Tensor, ...]:
        if i["doc_ids"] is not None:
            raise NotImplementedError("documents of one length per batch are not its layout")
        return (run(i["x"], i["weight"], i["bias"], activation="silu")[0],)

    return Case(case.name, case.op, case.make, call)


def norm(case: Case) -> Peers:
    """mamba-ssm's gated RMSNorm, gate first."""

    def make() -> Case:
        run = mamba_part("ops.triton.layernorm_gated").rmsnorm_fn

        def call(i: Inputs) -> tuple[Tensor, ...]:
            return (run(i["x"], i["weight"], None, z=i["z"], eps=1e-5, norm_before_gate=False),)

        return Case(case.name, case.op, case.make, call)

    return collect({"mamba-ssm": make})


def scan(case: Case) -> Peers:
    """mamba-ssm's selective scan, a CUDA extension that wants (B, E, L)."""

    def make() -> Case:
        importlib.import_module(EXTENSION)
        run = mamba_part("ops.selective_scan_interface").selective_scan_fn

        def inputs(device: torch.device | str) -> Inputs:
            i: Any = case.make(device)
            turned = {k: i[k].detach().transpose(1, 2).contiguous() for k in ("u", "dt", "B", "C", "z")}
            return leaves(turned | {k: i[k].detach() for k in ("A", "D", "dt_bias")})

        def call(i: Any) -> tuple[Tensor, ...]:
            names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
            return (run(*(i[name] for name in names), delta_softplus=True),)

        return Case(case.name, case.op, inputs, call)

    return collect({"mamba-ssm": make})


def mixer1(case: Case, d_model: int) -> Peers:
    """mamba-ssm's Mamba module, by its fused path."""

    def make() -> Case:
        importlib.import_module(EXTENSION)
        return _module(case, lambda: mamba_part("modules.mamba_simple").Mamba(d_model), d_model)

    return collect({"mamba-ssm": make})


def mixer(case: Case, d_model: int, d_state: int) -> Peers:
    """mamba-ssm's Mamba-2 module: its fused path, with torch's convolution where causal-conv1d is missing."""
    fused = has_conv()

    def make() -> Case:
        kind = mamba_part("modules.mamba2").Mamba2
        sizes = {"d_state": d_state, "d_conv": 4, "expand": 2, "headdim": 64, "use_mem_eff_path": fused}
        return _module(case, lambda: kind(d_model, **sizes), d_model)

    return collect({"mamba-ssm" if fused else "mamba-ssm, torch's conv": make})


def has_conv() -> bool:
    """Whether causal-conv1d is installed, which mamba-ssm's fused path calls."""
    return importlib.util.find_spec("causal_conv1d") is not None


def _module(case: Case, build: Callable[[], torch.nn.Module], d_model: int) -> Case:
    """A public layer under bf16 autocast."""
    modules: list[torch.nn.Module] = []

    def inputs(device: torch.device | str) -> Inputs:
        modules[:] = [build().to(device)]
        x = torch.randn(case.shape["B"], case.shape["L"], d_model, device=device, dtype=torch.bfloat16)
        return leaves({"x": x}) | dict(modules[0].named_parameters())

    def call(i: Inputs) -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16):
            return (modules[0](i["x"]),)

    return Case(case.name, case.op, inputs, call)
