"""Break the Triton kernels on purpose, one line at a time, and see that a test notices.

    python scripts/mutate_kernels.py                  # all mutations, in the interpreter, no GPU
    python scripts/mutate_kernels.py --only conv      # those whose name has the word
    python scripts/mutate_kernels.py --list

Each mutation replaces a text that occurs in its file, in a copy of the tree, and runs the tests that should
see it, which passed before: killed when they fail now, survived when they pass. The exit code is 1 when one
survives or its text is gone from the file (the kernel has changed: write the mutation anew).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "src/ssmtrain/kernels"
OFFSETS = "tests/kernels/triton/test_offsets.py"


@dataclass(frozen=True)
class Mutation:
    """A text to replace, and the tests (files, or files with -k) that should fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    occurrence: int = 0
    """Which of the text's occurrences."""


def conv(name: str, old: str, new: str, occurrence: int = 0, tests: str = "") -> Mutation:
    """A mutation of the convolution."""
    file, found = f"{KERNELS}/causal_conv1d/triton.py", tests or "tests/kernels/triton/test_triton_conv.py"
    return Mutation(f"conv: {name}", file, old, new, tuple(found.split()), occurrence)


def norm(name: str, old: str, new: str, occurrence: int = 0, tests: str = "") -> Mutation:
    """A mutation of the gated norm."""
    file = f"{KERNELS}/gated_norm/triton.py"
    found = tests or "tests/kernels/triton/test_triton_gated_norm.py"
    return Mutation(f"norm: {name}", file, old, new, tuple(found.split()), occurrence)


def ssd(name: str, part: str, old: str, new: str, occurrence: int = 0, tests: str = "") -> Mutation:
    """A mutation of ssd/triton{part}.py."""
    found = tests or "tests/kernels/triton/test_triton_ssd.py"
    return Mutation(
        f"ssd: {name}", f"{KERNELS}/ssd/triton{part}.py", old, new, tuple(found.split()), occurrence
    )


WIDE_CONV, WIDE_NORM, WIDE_SSD = (f"{OFFSETS} -k {op}" for op in ("conv1d", "norm", "ssd"))
WIDE_STEPS = f"{OFFSETS} -k steps"

CONV = [
    conv(
        "a document starts with the window before it",
        "(tl.where(starts, 0.0, window[lag - 1]),)",
        "(window[lag - 1],)",
    ),
    conv(
        "an initial state is not read", "(tl.where(starts, before, window[lag - 1]),)", "(window[lag - 1],)"
    ),
    conv("gradients reach the document before", "(tl.where(starts, 0.0, pending[j]),)", "(pending[j],)"),
    conv(
        "forward: no look at the document before",
        "ids, row, t - 1, t + UNROLL, L)",
        "ids, row, t, t + UNROLL, L)",
    ),
    conv("forward: no look at the token after", "ids, row, t - 1, t + UNROLL, L)", "ids, row, t - 1, t, L)"),
    conv(
        "backward: no look at the oldest in reach",
        "ids, row, t - (K - 1), t + COUNT, L)",
        "ids, row, t, t + COUNT, L)",
    ),
    conv(
        "the next run's first tokens write too",
        "(token >= bounds[0]) & (token < bounds[1])",
        "(token >= bounds[0] - 1)",
    ),
    conv("the gradient of SiLU", "(s + s * a * (1.0 - s))", "(s + a * (1.0 - s))"),
    conv("the final state's gradient is dropped", "pending[j] + more.to(tl.float32)", "pending[j]"),
    conv("rows past the end are read", "inside & (t + i >= 0) & (t + i < L)", "inside & (t + i >= 0)"),
    conv("rows before the start are read", "inside & (t + i >= 0) & (t + i < L)", "inside & (t + i < L)"),
    conv("taps in the wrong order", "k == K - 1 - lag, tile", "k == lag, tile"),
    conv("32-bit rows", "(run // runs).to(tl.int64)", "(run // runs)", tests=f"{OFFSETS} -k many_rows"),
    conv("32-bit offsets of y", "C = units.to(tl.int64) * ALIGN", "C = units * ALIGN", tests=WIDE_CONV),
    conv("32-bit offsets of dx", "C = units.to(tl.int64) * ALIGN", "C = units * ALIGN", 1, WIDE_CONV),
    conv("32-bit steps of x", "step = x_step.to(tl.int64) * ALIGN", "step = x_step * ALIGN", tests=WIDE_CONV),
    conv("32-bit steps of x back", "steps = (x_step.to(tl.int64)", "steps = (x_step", tests=WIDE_CONV),
    conv("32-bit steps of dy", "dy_step.to(tl.int64) * ALIGN", "dy_step * ALIGN", tests=WIDE_CONV),
    conv(
        "32-bit rows of a step",
        "(tl.program_id(0) // blocks).to(tl.int64)",
        "(tl.program_id(0) // blocks)",
        tests=WIDE_STEPS,
    ),
]

NORM = [
    norm(
        "32-bit rows",
        "program = tl.program_id(0).to(tl.int64)",
        "program = tl.program_id(0)",
        tests=WIDE_NORM,
    ),
    norm(
        "32-bit rows back",
        "program = tl.program_id(0).to(tl.int64)",
        "program = tl.program_id(0)",
        1,
        WIDE_NORM,
    ),
    norm(
        "32-bit rows of means",
        "program = tl.program_id(0).to(tl.int64)",
        "program = tl.program_id(0)",
        2,
        WIDE_NORM,
    ),
    norm("no epsilon", "/ CHANNELS + eps)", "/ CHANNELS)"),
    norm(
        "the mean over all groups",
        "tl.sum(squares, 1, keep_dims=True) / CHANNELS",
        "tl.sum(squares, 1, keep_dims=True) / (CHANNELS * GROUPS)",
    ),
    norm("the mean of a row that is read twice", "tl.sum(share, 0) / CHANNELS", "tl.sum(share, 0)"),
    norm("the mean back", "tl.sum(share, 1, keep_dims=True) / CHANNELS", "tl.sum(share, 1, keep_dims=True)"),
    norm("channels past the group", "live & (at < CHANNELS)", "live", 0),
    norm("rows past the end of a run", "(run < runs) & (channel < WIDTH)", "(channel < WIDTH)"),
]

SSD: list[Mutation] = [
    # To come: an exponent's clamp or mask, a reset at a document's start, a chunk's end, each 64-bit cast.
    ssd("32-bit rows of documents", "_chunks", "row.to(tl.int64) * length", "row * length", tests=WIDE_SSD),
    ssd(
        "32-bit documents in the walk",
        "_states",
        "first = d.to(tl.int64) * length",
        "first = d * length",
        tests=WIDE_SSD,
    ),
]

MUTATIONS = CONV + NORM + SSD


def mutated(source: str, mutation: Mutation) -> str | None:
    """The file with the mutation, or None where its text is gone."""
    parts = source.split(mutation.old)
    if len(parts) <= mutation.occurrence + 1:
        return None
    at = mutation.occurrence + 1
    return mutation.old.join(parts[:at]) + mutation.new + mutation.old.join(parts[at:])


def pytest(tests: tuple[str, ...], tree: Path) -> subprocess.CompletedProcess[str]:
    """Run tests in a tree, to the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=900)


def verdict(mutation: Mutation, tree: Path) -> tuple[str, str]:
    """("killed", by what), ("SURVIVED", "") or ("GONE", why) for a mutation tried in a tree of its own."""
    path = tree / mutation.file
    source = path.read_text()
    broken = mutated(source, mutation)
    if broken is None:
        return "GONE", f"the text is not in {mutation.file}"
    path.write_text(broken)
    try:
        done = pytest(mutation.tests, tree)
    finally:
        path.write_text(source)
    if done.returncode == 0:
        return "SURVIVED", ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return "killed", failed[1].split("/")[-1] if failed else f"exit code {done.returncode}"


def trees(folder: Path, count: int) -> list[Path]:
    """Copies of what the tests need."""
    made = []
    for number in range(count):
        tree = folder / str(number)
        for name in ("src", "tests", "configs"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        made.append(tree)
    return made


def main() -> int:
    """Parse the command line, mutate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutations whose name has this in it")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time (default 2)")
    parser.add_argument("--list", action="store_true", help="print the mutations, try none")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.name]
    if options.list:
        print(*(f"{mutation.name}: {' '.join(mutation.tests)}" for mutation in chosen), sep="\n")
        return 0
    bad = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        free = trees(Path(folder), options.jobs)

        def borrowed(work: Callable[[Any, Path], Any], subject: Any) -> Any:
            tree = free.pop()  # as many trees as threads
            try:
                return work(subject, tree)
            finally:
                free.append(tree)

        suites = sorted({mutation.tests for mutation in chosen})
        for tests, done in zip(suites, pool.map(partial(borrowed, pytest), suites), strict=True):
            if done.returncode:
                sys.exit(
                    f"{' '.join(tests)} must pass before anything is mutated:\n{done.stdout}{done.stderr}"
                )
        attempt = partial(borrowed, verdict)
        for mutation, (found, remark) in zip(chosen, pool.map(attempt, chosen), strict=True):
            bad += found != "killed"
            print(f"{found:8s} {mutation.name}: {remark}", flush=True)
    print(f"{len(chosen)} mutations, {len(chosen) - bad} killed")
    return 1 if bad or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
