"""Find launch configurations for the GPU that is present and write them to ssmtrain/kernels/tuned.json.

    python scripts/tune_kernels.py --dry-run             # what would change
    python scripts/tune_kernels.py --only ssd_outputs    # one kernel
    python scripts/tune_kernels.py                       # all of them: tens of minutes

The ops run as users call them, on the shapes of kernel_cases.to_tune. From the configuration in force, each
number is doubled and halved (num_stages, maxnreg: a step up and down), or a kernel module's own
`candidates(kernel, config)` says what to try; the best that is --gain better is kept and its neighbours are
tried next. All candidates are compiled at once, on all cores. One is timed only if the op's outputs and
gradients with it agree with those of the fallback; timed are the launches that it changed, replayed on the
tensors that the op made, taking turns with the launches that they replace.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernel_launches  # before triton: it makes kernels be decorated for compiling
from kernel_cases import Case, Inputs, to_tune
from kernel_launches import Launch
from kernel_timing import milliseconds
from ssmtrain.kernels import backend, tuned

TABLE = Path(tuned.__file__).parent / "tuned.json"
TOLERANCE = 1e-2
"""Norm of the difference over norm: another block size rounds bf16 in other places, no more."""
LIMITS = {"num_warps": (1, 16), "num_stages": (1, 6), "maxnreg": (64, 255)}
STEPS = {"num_stages": 1, "maxnreg": 32}
"""What is stepped rather than doubled."""

Key = tuple[str, str]
"""(kernel, shape key)"""


@dataclass
class Run:
    """An op's results under some table, what it launched and what it looked up."""

    results: tuple[Tensor, ...]
    launches: list[Launch]
    asked: dict[Key, tuned.Config]


def neighbours(config: tuned.Config) -> Iterator[tuned.Config]:
    """Configurations that differ in one number."""
    for name, value in config.items():
        low, high = LIMITS.get(name, (1, 4096))
        step = STEPS.get(name)
        for other in (value // 2, value * 2) if step is None else (value - step, value + step):
            if low <= other <= high and other != value:
                yield config | {name: other}


def candidates(op: str, kernel: str, config: tuned.Config) -> list[tuned.Config]:
    """What to try from a configuration: the kernel module's own ideas, or the neighbours."""
    module = importlib.import_module(f"ssmtrain.kernels.{op}.triton")
    own = getattr(module, "candidates", None)
    found: Iterable[tuned.Config] = neighbours(config) if own is None else own(kernel, config)
    return [other for other in found if other != config]


def with_entry(table: Any, arch: str, key: Key, config: tuned.Config) -> Any:
    """A copy of a table with one entry set."""
    made = json.loads(json.dumps(table))
    made.setdefault(arch, {}).setdefault(key[0], {})[key[1]] = dict(config)
    return made


def compiles(work: tuple[str, str, Any]) -> str:
    """Compile, into Triton's cache, what a case launches under a table; what went wrong, or nothing."""
    name, arch, table = work
    case = next(case for case in to_tune() if case.name == name)
    try:
        with kernel_launches.table(table):
            for launch in kernel_launches.record_fake(case, arch):
                kernel_launches.compiled(launch, arch)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def run(case: Case, inputs: Inputs, table: Any) -> Run:
    """Run forward and backward under a table."""
    with kernel_launches.table(table) as asked, kernel_launches.recorded(execute=True) as launches:
        results = case.both(inputs)
    torch.cuda.synchronize()
    return Run(results, launches, asked)


def identity(launch: Launch) -> str:
    """What must be equal for two launches to take the same time."""
    shapes = [tuple(arg.shape) if isinstance(arg, Tensor) else arg for arg in launch.args]
    return f"{launch.name} {launch.grid} {launch.constants()} {shapes}"


def changed(base: list[Launch], other: list[Launch]) -> tuple[list[Launch], list[Launch]]:
    """The launches of each that the other has not."""
    ours, theirs = [identity(launch) for launch in base], [identity(launch) for launch in other]
    return (
        [launch for launch, name in zip(base, ours, strict=True) if name not in theirs],
        [launch for launch, name in zip(other, theirs, strict=True) if name not in ours],
    )


def speedup(base: Run, other: Run, rounds: int) -> float:
    """How many times as long the launches of `base` take that `other` replaces."""
    taken: tuple[list[float], list[float]] = ([], [])
    both = changed(base.launches, other.launches)
    if not all(both):
        return 1.0
    for number in range(rounds + 3):
        for samples, launches in zip(taken, both, strict=True):
            time = milliseconds(lambda launches=launches: [launch.replay() for launch in launches])
            if number >= 3:
                samples.append(time)
    return statistics.median(taken[0]) / statistics.median(taken[1])


def agree(base: Run, other: Run) -> bool:
    """Whether outputs and gradients are the same but for rounding."""
    for a, b in zip(base.results, other.results, strict=True):
        if not (a.float() - b.float()).norm() <= TOLERANCE * a.float().norm():
            return False
    return True


def tune(case: Case, key: Key, table: Any, arch: str, options: argparse.Namespace, pool: Any) -> Any:
    """The table, with a better configuration for one kernel and shape where there is one."""
    torch.manual_seed(0)
    inputs = case.make("cuda")
    fallback = run(case, inputs, {})
    best = run(case, inputs, table)
    config = {**fallback.asked[key], **table.get(arch, {}).get(key[0], {}).get(key[1], {})}
    for _ in range(options.steps):
        tries = candidates(case.op, key[0], config)
        tables = [with_entry(table, arch, key, other) for other in tries]
        failures = pool.map(compiles, [(case.name, arch, content) for content in tables], chunksize=1)
        found: list[tuple[float, int]] = []
        for number, failure in enumerate(failures):
            remark = failure
            if not failure:
                try:
                    other = run(case, inputs, tables[number])
                    found.append(
                        (speedup(best, other, options.rounds) if agree(fallback, other) else 0.0, number)
                    )
                    remark = f"{found[-1][0]:.3f}x" if found[-1][0] else "WRONG RESULT"
                except Exception as error:  # out of shared memory or registers shows at the launch
                    remark = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"  {key[0]} {tries[number]}: {remark}", flush=True)
        gain, number = max(found, default=(0.0, 0))
        if gain < 1 + options.gain:
            break
        config, table = tries[number], tables[number]
        best = run(case, inputs, table)
        print(f"{key[0]} [{key[1]}] {config}: {gain:.3f}x", flush=True)
    return table


def main() -> int:
    """Parse the command line, tune, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], help="kernels, by the start of their name")
    parser.add_argument("--case", default="", help="cases, by a part of their name")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count (default 15)")
    parser.add_argument("--steps", type=int, default=4, help="improvements in a row, at most (default 4)")
    parser.add_argument("--gain", type=float, default=0.02, help="least gain worth an entry (default 0.02)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_kernels.py needs an NVIDIA GPU; torch sees none (ssmtrain doctor)")
    backend.configure("auto", "cuda")
    arch = tuned.architecture(torch.device("cuda"))
    table = json.loads(TABLE.read_text())
    done: set[Key] = set()
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for case in to_tune():
            if options.case not in case.name:
                continue
            print(f"{case.name}", flush=True)
            keys = run(case, case.make("cuda"), table).asked
            for key in keys:
                if key in done or (options.only and not key[0].startswith(tuple(options.only))):
                    continue
                done.add(key)
                table = tune(case, key, table, arch, options, pool)
                if not options.dry_run:
                    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
