"""Compile every Triton kernel for every supported architecture, without a GPU, and read what each one takes.

    python scripts/check_kernels.py                        # all of it, minutes on two cores
    python scripts/check_kernels.py --quick --arch sm_90   # the main shapes, one architecture
    python scripts/check_kernels.py --only ssd --verbose

The ops are called on fake tensors with the configurations that the fallbacks and tuned.json choose, and what
they launch is compiled. The exit code is 1 when a kernel does not compile, wants more shared memory than a
block may have, more registers than a multiprocessor has, or spills more than --spill bytes a thread; when a
copy overwrites what a product in flight reads (kernel_hazards.py); and when no case here reaches an entry of
tuned.json. A second run is quick: Triton caches.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# isort: off
import kernel_launches  # before triton: it makes kernels be decorated for compiling
import triton

# isort: on
from kernel_cases import to_compile
from kernel_hazards import hazards
from kernel_launches import Launch
from ssmtrain.kernels import tuned

SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
"""Shared memory of a block: the multiprocessor's, less the 1 KiB that the system takes for each block."""
REGISTERS = 65536
"""Of a multiprocessor; a block has to fit."""
SPILLS = {
    "ssd.triton_hopper.one_pass": 32,
    "selective_scan.triton_backward.backward": 640,
    "selective_scan.triton_n16_backward.backward": 384,
}
"""Bytes a thread may spill in the place of --spill: the first one's accumulators must stay; more programs
of the second side by side are worth it (9.2 ms instead of 12.5); the third's are between its loops."""
SPILLS_FP32 = 12 << 10
"""Of kernels that take fp32 as six products of bf16 parts: they do not fit, which is slower and as right."""
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100"]


@dataclass(frozen=True)
class Row:
    """A compiled kernel and what it takes."""

    kernel: str
    arch: str
    case: str
    config: str
    warps: int
    registers: int
    spilled: int
    """Bytes of local memory a thread."""
    shared: int
    """Bytes a block."""
    error: str
    """Why it did not compile, or what is wrong with what came out."""

    def wrong(self, spill: int) -> str:
        """What is wrong with it, or nothing."""
        if self.error:
            return self.error
        if self.shared > SHARED_KIB[self.arch] * 1024:
            return f"more than {SHARED_KIB[self.arch]} KiB shared"
        if self.registers * self.warps * 32 > REGISTERS:
            return "more registers than there are"
        limit = SPILLS.get(self.kernel, spill) if spill >= 0 else spill
        if "PRECISION=bf16x6" in self.config and spill >= 0:
            limit = SPILLS_FP32
        return f"spills {self.spilled} bytes" if self.spilled > limit else ""


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) a thread, as cuobjdump reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def row(launch: Launch, arch: str, case: str) -> Row:
    """Compile one launch."""
    config, warps = "", int(launch.kwargs.get("num_warps", 4))
    try:
        constants = launch.constants()
        config = " ".join(f"{k}={v}" for k, v in constants.items() if isinstance(v, (int, str, bool)))
        made = kernel_launches.compiled(launch, arch)
        registers, spilled = usage(made.asm["cubin"])
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return Row(launch.name, arch, case, config, warps, 0, 0, 0, text)
    found = next(hazards(made.asm["ttgir"]), "") if "ttgir" in made.asm else ""
    return Row(launch.name, arch, case, config, warps, registers, spilled, made.metadata.shared, found)


def check(arch: str, quick: bool, only: list[str]) -> tuple[list[Row], list[str]]:
    """Rows of an architecture, each kernel once, and the entries of tuned.json that no case reaches."""
    rows: dict[Any, Row] = {}
    entries = {} if quick else tuned._table()
    unreached = {(kernel, key) for kernel, keys in entries.get(arch, {}).items() for key in keys}
    for content in ({}, entries) if unreached else ({},):
        for case in to_compile(quick):
            if only and case.op not in only:
                continue
            with kernel_launches.table(content) as asked:
                launches, failure = attempt(case, arch)
            unreached -= set(asked)
            if failure is not None:
                rows[case.name] = failure
            for launch in launches:
                key = identity(launch, arch)
                rows[key] = rows.get(key) or row(launch, arch, case.name)
    missed = [] if only else [f"{arch} {kernel} {key}" for kernel, key in sorted(unreached)]
    return list(rows.values()), missed


def identity(launch: Launch, arch: str) -> Any:
    """What tells one compiled kernel from another."""
    try:
        source, options, _ = kernel_launches.specialised(launch, arch)
    except Exception:
        return launch.name  # `row` fails on it in the same way, and says how
    return source.hash(), str(sorted(options.items(), key=str))


def attempt(case: Any, arch: str) -> tuple[list[Launch], Row | None]:
    """The launches of a case, or a row that says why there are none."""
    try:
        return kernel_launches.record_fake(case, arch), None
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return [], Row("(host)", arch, case.name, "", 0, 0, 0, 0, text)


def table(rows: list[Row], spill: int, verbose: bool) -> Iterator[str]:
    """Lines of the report: with `verbose` every kernel, else the worst of each name and what is wrong."""
    yield f"{'kernel':44s} {'arch':7s} {'warps':>5s} {'regs':>5s} {'spill':>6s} {'KiB':>6s}  remarks"
    names = sorted({(row.kernel, row.arch) for row in rows}, key=lambda name: (name[0], int(name[1][3:])))
    for name in names:
        group = [row for row in rows if (row.kernel, row.arch) == name]
        worst = max(group, key=lambda row: (row.spilled, row.registers, row.shared))
        for row in group:
            wrong = row.wrong(spill)
            if not (verbose or wrong or row is worst):
                continue
            remark = wrong or (f"worst of {len(group)}" if not verbose and len(group) > 1 else "")
            where = f"[{row.case}] {row.config}" if verbose or wrong else f"[{row.case}]"
            yield (
                f"{row.kernel:44s} {row.arch:7s} {row.warps:5d} {row.registers:5d} {row.spilled:6d} "
                f"{row.shared / 1024:6.1f}  {remark} {where}"
            )


def main() -> int:
    """Parse the command line, compile, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=list(SHARED_KIB), default=ARCHITECTURES)
    parser.add_argument("--only", nargs="+", default=[], help="ops, by folder name")
    parser.add_argument("--quick", action="store_true", help="main shapes only")
    parser.add_argument("--spill", type=int, default=256, help="bytes a thread may spill (default 256)")
    parser.add_argument("--jobs", type=int, default=2, help="architectures at a time (default 2)")
    parser.add_argument("--verbose", action="store_true", help="a line for every compiled kernel")
    arguments = parser.parse_args()
    work = [(arch, arguments.quick, arguments.only) for arch in arguments.arch]
    with multiprocessing.get_context("spawn").Pool(min(arguments.jobs, len(work))) as pool:
        results = pool.starmap(check, work, chunksize=1)
    rows = [row for found, _ in results for row in found]
    unreached = [entry for _, missed in results for entry in missed]
    print(*table(rows, arguments.spill, arguments.verbose), sep="\n")
    for entry in unreached:
        print(f"no case in kernel_cases.to_compile reaches the entry of tuned.json for {entry}")
    wrong = sum(bool(row.wrong(arguments.spill)) for row in rows)
    print(f"{len(rows)} kernels compiled, {wrong} wrong")
    return 1 if wrong or unreached or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
