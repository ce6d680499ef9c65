"""Time the Triton kernels on one NVIDIA GPU, in bf16, beside the public ones that are installed.

    python scripts/bench_kernels.py                            # all sections, a few minutes
    python scripts/bench_kernels.py --only ssd,conv --rounds 50 --json kernels.json
    python scripts/bench_kernels.py --profile                  # time by GPU kernel instead

Medians of rounds by CUDA events, all implementations of a row taking turns in each round, on input sets that
rotate so that none is in the L2 cache. `floor` is the time to move the bytes that must be moved, at the
bandwidth of a copy in the same run: each input and output once, and for the backward pass the inputs, the
output's gradient and the inputs' gradients once. Before anything is timed, outputs and gradients are compared
with the fp32 torch reference on a smaller shape; an op that is wrong gets no figures, and the exit code is 1.
mamba-ssm, causal-conv1d and flash-linear-attention are compared with where they are installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernel_peers
from kernel_cases import Case, Inputs, conv_case, doc_ids, leaves, norm_case, selective_case, ssd_case
from kernel_timing import Runner, attempt, bandwidth, contest, errors, floors, tensor_bytes
from ssmtrain.kernels import backend
from ssmtrain.layers.base import Context, Layer
from ssmtrain.layers.mamba1 import Mamba1Config
from ssmtrain.layers.mamba2 import Mamba2Config

SECTIONS = ("ssd", "conv", "norm", "mixer", "scan", "mixer1", "documents", "cold")
WIDTH, STATE = 2560, 128
"""Of the Mamba-2 mixer; the Mamba mixer has the width too."""
CONV, PROJECTION = 5376, 10576
"""Channels of that mixer's convolution, and of the projection whose slice they are."""
TOLERANCE = 2e-2
"""Norm of the error over norm of the reference: bf16 inputs and products give 2e-3 to 1e-2."""


@dataclass
class Timing:
    """Medians of one implementation in one row, in milliseconds."""

    section: str
    shape: str
    implementation: str
    forward: float | None = None
    both: float | None = None
    floor_forward: float | None = None
    floor_both: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A shape to time: the case, a smaller one to check, and the peers."""

    case: Case
    small: Case
    peers: Callable[[Case], kernel_peers.Peers]
    floor: bool = True


def mixer_case(B: int, L: int, documents: int = 0, kind: str = "mamba2") -> Case:
    """Our Mamba or Mamba-2 layer under bf16 autocast; the same weights each time."""
    config = Mamba2Config(d_state=STATE) if kind == "mamba2" else Mamba1Config()
    modules: list[Layer] = []

    def make(device: torch.device | str) -> Inputs:
        modules[:] = [config.build(WIDTH)]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for module in modules[0].modules():
                for name, spec in getattr(module, "param_specs", {}).items():
                    parameter = getattr(module, name)
                    parameter.copy_(spec.init(tuple(parameter.shape), generator))
        modules[0].to(device)
        x = torch.randn(B, L, WIDTH, device=device, dtype=torch.bfloat16)
        found = leaves({"x": x}) | dict(modules[0].named_parameters())
        return found | {"doc_ids": doc_ids(B, L, documents, device)}

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        x: Any = inputs["x"]
        ids = inputs["doc_ids"]
        context = Context(doc_ids=ids, n_docs=None if ids is None else B * -(-L // documents))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            return (modules[0](x, context)[0],)

    name = f"mixer {kind} d{WIDTH} N{config.d_state} B{B} L{L}" + (f" docs {documents}" if documents else "")
    return Case(name, "mixer", make, call, shape={"B": B, "L": L})


def rows(section: str) -> Iterator[Row]:
    """The shapes of a section."""
    if section == "ssd":
        for B, L, H, P, N, G in (
            (8, 4096, 80, 64, 128, 1),
            (1, 32768, 80, 64, 128, 1),
            (8, 4096, 80, 64, 64, 1),
            (8, 4096, 128, 64, 256, 1),
            (8, 4096, 128, 64, 128, 8),
        ):
            small = ssd_case(min(B, 2), 512 + 40, H, P, N, G)
            yield Row(ssd_case(B, L, H, P, N, G), small, kernel_peers.ssd)
    elif section == "conv":
        for parent in (PROJECTION, None):
            small = conv_case(2, 552, CONV, parent=parent)
            yield Row(conv_case(8, 4096, CONV, parent=parent), small, kernel_peers.conv)
    elif section == "norm":
        small = norm_case(2, 552, 2 * WIDTH, parent=PROJECTION)
        yield Row(norm_case(8, 4096, 2 * WIDTH, parent=PROJECTION), small, kernel_peers.norm)
    elif section == "mixer":
        peers = lambda case: kernel_peers.mixer(case, WIDTH, STATE)  # noqa: E731
        yield Row(mixer_case(8, 4096), mixer_case(2, 552), peers, floor=False)
    elif section == "scan":
        for B, L, E in ((8, 4096, 5120), (1, 32768, 5120), (8, 2048, 2048)):
            # The smaller one has rows longer than a window where the other has.
            small = selective_case(1, 8200, 64) if B == 1 else selective_case(2, 552, E)
            yield Row(selective_case(B, L, E), small, kernel_peers.scan)
    elif section == "mixer1":
        ours, small = mixer_case(8, 4096, kind="mamba1"), mixer_case(2, 552, kind="mamba1")
        yield Row(ours, small, lambda case: kernel_peers.mixer1(case, WIDTH), floor=False)


def document_rows() -> Iterator[tuple[Case, Row]]:
    """Rows of one document each, and the same rows as documents of 512 tokens."""
    scan, sliced = (80, 64, 128), {"parent": PROJECTION}
    packed = Row(
        ssd_case(8, 4096, *scan, documents=512), ssd_case(2, 552, *scan, documents=100), kernel_peers.ssd
    )
    yield ssd_case(8, 4096, *scan), packed
    packed = Row(
        conv_case(8, 4096, CONV, documents=512, **sliced),
        conv_case(2, 552, CONV, documents=100, **sliced),
        kernel_peers.conv,
    )
    yield conv_case(8, 4096, CONV, **sliced), packed
    none = lambda case: ({}, {})  # noqa: E731
    yield mixer_case(8, 4096), Row(mixer_case(8, 4096, 512), mixer_case(2, 552, 100), none)
    scan = selective_case(8, 4096, 5120, documents=512)
    yield selective_case(8, 4096, 5120), Row(scan, selective_case(2, 552, 5120, documents=100), none)


def wrong(case: Case) -> str:
    """What is wrong with our op on a case, or nothing."""
    found = errors(case)
    bad = [f"{name} {error:.1e}" for name, error in found.items() if not error <= TOLERANCE]
    print(f"# {case.name}: largest error {max(found.values()):.1e}", flush=True)
    return f"WRONG: {', '.join(bad)}" if bad else ""


def time_row(row: Row, section: str, rounds: int, with_peers: bool, bytes_per_ms: float) -> Iterator[Timing]:
    """Check ours, then time all implementations."""
    shape = row.case.name
    remark = wrong(row.small)
    if remark:
        yield Timing(section, shape, "ours", note=remark)
        return
    peers, missing = row.peers(row.case) if with_peers else ({}, {})
    found = contest({"ours": row.case, **peers}, rounds)
    bounds: tuple[float | None, float | None] = (None, None)
    ours = found["ours"]
    if row.floor and isinstance(ours, Runner):
        inputs = ours.sets[0].values()
        learnt = [x for x in inputs if x is not None and x.requires_grad]
        sizes = tensor_bytes(inputs), tensor_bytes(ours.grads), tensor_bytes(learnt)
        bounds = floors(*sizes, bytes_per_ms)
    for name, runner in found.items():
        if isinstance(runner, str):
            yield Timing(section, shape, name, note=runner)
        else:
            yield Timing(section, shape, name, runner.median("forward"), runner.median("both"), *bounds)
    for name, reason in missing.items():
        yield Timing(section, shape, name, note=f"left out: {reason}")


def time_documents(rounds: int, with_peers: bool) -> Iterator[Timing]:
    """Time rows of one document and the same rows cut into documents."""
    for whole, row in document_rows():
        remark = wrong(row.small)
        if remark:
            yield Timing("documents", whole.name, "ours", note=remark)
            continue
        contenders = {"ours": whole, "ours, documents": row.case}
        if with_peers:
            contenders |= row.peers(whole)[0]
            contenders |= {f"{name}, documents": case for name, case in row.peers(row.case)[0].items()}
        found = contest(contenders, rounds)
        for name, runner in found.items():
            timing = Timing("documents", whole.name, name)
            if isinstance(runner, str):
                timing.note = runner
            else:
                timing.forward, timing.both = runner.median("forward"), runner.median("both")
                plain = found.get(name.removesuffix(", documents"))
                if name.endswith(", documents") and isinstance(plain, Runner):
                    ratios = [runner.median(part) / plain.median(part) for part in ("forward", "both")]
                    timing.note = f"{ratios[0]:.2f}x and {ratios[1]:.2f}x one document per row"
            yield timing
        torch.cuda.empty_cache()


COLD = {
    "ours": ssd_case(8, 4096, 80, 64, 128),
    "ours, fp32": ssd_case(8, 4096, 80, 64, 128, dtype=torch.float32),
    "mamba-ssm": ssd_case(8, 4096, 80, 64, 128),
    "selective scan": selective_case(8, 4096, 5120),
}


def time_cold(with_peers: bool) -> Iterator[Timing]:
    """Time the first call in a fresh process whose cache is empty."""
    for name, case in COLD.items():
        if name == "mamba-ssm" and not with_peers:
            continue
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"TRITON_CACHE_DIR": cache}
            command = [sys.executable, str(Path(__file__).resolve()), "--first-call", name]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        timing = Timing("cold", case.name, name)
        if done.returncode:
            timing.note = (done.stderr.strip().splitlines() or ["failed"])[-1]
        else:
            timing.forward, timing.both = json.loads(done.stdout.splitlines()[-1])
            timing.note = "first call, cache empty, imports not counted"
        yield timing


def first_call(name: str) -> None:
    """Print the milliseconds of this process's first forward, and first forward and backward pass."""
    case = COLD[name]
    if name == "mamba-ssm":
        peers, missing = kernel_peers.ssd(case)
        if name not in peers:
            sys.exit(missing[name])
        case = peers[name]
    inputs = case.make("cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    outputs = case.call(inputs)
    torch.cuda.synchronize()
    middle = time.perf_counter()
    case.gradients(inputs, outputs, [torch.ones_like(y) for y in outputs])
    torch.cuda.synchronize()
    print(json.dumps([1e3 * (middle - start), 1e3 * (time.perf_counter() - start)]))


def profile(sections: list[str]) -> None:
    """Print the GPU kernels of one forward and backward pass of each of our ops, longest first."""
    for row in (row for section in sections for row in rows(section)):
        runner = attempt(row.case)
        print(f"\n{row.case.name}, forward and backward")
        if isinstance(runner, str):
            print(f"  {runner}")
            continue
        kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds) as trace:
            runner.both()
            torch.cuda.synchronize()
        events = [e for e in trace.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        events.sort(key=lambda e: -e.self_device_time_total)
        total = sum(e.self_device_time_total for e in events)
        for event in events:
            taken = event.self_device_time_total
            print(f"  {taken:9.1f} us {taken / total:6.1%} {event.count:4d} calls  {event.key[:80]}")
        print(f"  {total:9.1f} us in all")
        del runner
        torch.cuda.empty_cache()


def table(timings: list[Timing]) -> Iterator[str]:
    """Lines of the report; the last column is how many times as long as ours each one takes."""
    head = f"{'implementation':26s} {'fwd ms':>9s} {'fwd+bwd':>9s} {'/ floor':>8s} {'/ floor':>8s}  over ours"
    shape = None
    for timing in timings:
        if (timing.section, timing.shape) != shape:
            shape = timing.section, timing.shape
            floor = ""
            if timing.floor_forward is not None and timing.floor_both is not None:
                floor = f" (floor {timing.floor_forward:.3f} and {timing.floor_both:.3f} ms)"
            yield f"\n{timing.section}: {timing.shape}{floor}"
            yield head
        ours = next(
            (t for t in timings if (t.section, t.shape) == shape and t.implementation == "ours"), timing
        )
        numbers = [timing.forward, timing.both]
        ratios = [over(timing.forward, timing.floor_forward), over(timing.both, timing.floor_both)]
        cells = [f"{'' if n is None else f'{n:.3f}':>9s}" for n in numbers]
        cells += [f"{'' if r is None else f'{r:.2f}':>8s}" for r in ratios]
        against = [over(timing.forward, ours.forward), over(timing.both, ours.both)]
        mine = " ".join(f"{r:.2f}x" for r in against if r is not None and timing is not ours)
        yield f"{timing.implementation:26s} {' '.join(cells)}  {mine} {timing.note}".rstrip()


def over(value: float | None, base: float | None) -> float | None:
    """The quotient, where both are known."""
    return value / base if value is not None and base else None


def environment(bytes_per_ms: float) -> dict[str, Any]:
    """What the figures depend on."""
    import triton

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "peers": kernel_peers.versions(),
        "copy_TB_s": round(bytes_per_ms / 1e9, 3),
        "command": " ".join(["python", "scripts/bench_kernels.py", *sys.argv[1:]]),
    }


def measure(section: str, rounds: int, with_peers: bool, bytes_per_ms: float) -> Iterator[Timing]:
    """Timings of a section; what goes wrong becomes a note and the next row goes on."""
    if section in ("documents", "cold"):
        try:
            yield from time_documents(rounds, with_peers) if section == "documents" else time_cold(with_peers)
        except Exception as error:
            yield Timing(section, "", "ours", note=f"FAILED {type(error).__name__}: {error}".splitlines()[0])
        return
    for row in rows(section):
        try:
            yield from time_row(row, section, rounds, with_peers, bytes_per_ms)
        except Exception as error:
            note = f"FAILED {type(error).__name__}: {error}".splitlines()[0]
            yield Timing(section, row.case.name, "ours", note=note)
        torch.cuda.empty_cache()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {', '.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, default=25, help="rounds that count (default 25)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--no-peers", action="store_true", help="ours only")
    parser.add_argument("--profile", action="store_true", help="GPU kernels by time, nothing else")
    parser.add_argument("--first-call", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.only = arguments.only.split(",")
    unknown = set(arguments.only) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown sections {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    return arguments


def main() -> int:
    """Parse the command line, measure, print."""
    arguments = parse()
    if not torch.cuda.is_available():
        sys.exit("bench_kernels.py needs an NVIDIA GPU; torch sees none (ssmtrain doctor)")
    backend.configure("auto", "cuda")
    if arguments.first_call:
        first_call(arguments.first_call)
        return 0
    if arguments.profile:
        profile(arguments.only)
        return 0
    bytes_per_ms = bandwidth()
    facts = environment(bytes_per_ms)
    print("\n".join(f"# {name}: {value}" for name, value in facts.items()), flush=True)
    timings: list[Timing] = []
    for section in arguments.only:
        found = []
        for timing in measure(section, arguments.rounds, not arguments.no_peers, bytes_per_ms):
            # As they come too: peers that tune themselves take minutes, and a run may be cut short.
            medians = f"{timing.forward}, {timing.both} ms"
            print(f"# {timing.shape}, {timing.implementation}: {medians} {timing.note}", flush=True)
            found.append(timing)
        print(*table(found), sep="\n", flush=True)
        timings += found
    if arguments.json:
        document = {"environment": facts, "timings": [dataclasses.asdict(timing) for timing in timings]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any(t.note.startswith(("WRONG", "FAILED")) for t in timings) else 0


if __name__ == "__main__":
    sys.exit(main())
