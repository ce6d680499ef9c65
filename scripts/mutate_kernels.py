"""Break the Triton kernels on purpose, one line at a time, and see that a test notices.

    python scripts/mutate_kernels.py                  # all mutations
    python scripts/mutate_kernels.py --only conv      # those whose name has the word
    python scripts/mutate_kernels.py --list

Each mutation replaces a text that occurs in its file, in a copy of the tree, and runs the tests that should
see it, which passed before: killed when they fail now, survived when they pass. The exit code is 1 when one
survives or its text is gone from the file (the kernel has changed: write the mutation anew). Tests run in the
interpreter, on the CPU; what shows on a Hopper GPU alone is left out elsewhere.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mutation import Mutation
from mutations_layers import CONV, HEAD, NORM, PARTS
from mutations_scan import N16, SELECTIVE
from mutations_ssd import HOPPER, SSD
from mutations_step import STEPS

ROOT = Path(__file__).resolve().parents[1]
MUTATIONS = CONV + NORM + HEAD + PARTS + SSD + HOPPER + SELECTIVE + N16 + STEPS


def mutated(source: str, mutation: Mutation) -> str | None:
    """The file with the mutation, or None where its text is gone."""
    parts = source.split(mutation.old)
    if len(parts) <= mutation.occurrence + 1:
        return None
    at = mutation.occurrence + 1
    return mutation.old.join(parts[:at]) + mutation.new + mutation.old.join(parts[at:])


def pytest(suite: tuple[tuple[str, ...], bool], tree: Path) -> subprocess.CompletedProcess[str]:
    """Run tests, on a GPU or interpreted, in a tree, to the first failure."""
    tests, gpu = suite
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["TRITON_INTERPRET"] = "0" if gpu else "1"
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
        done = pytest((mutation.tests, mutation.gpu), tree)
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


def has_hopper() -> bool:
    """Whether the device is what triton_hopper.py is for."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def main() -> int:
    """Parse the command line, mutate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutations whose name has this in it")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time (default 2)")
    parser.add_argument("--list", action="store_true", help="print the mutations, try none")
    options = parser.parse_args()
    found = [mutation for mutation in MUTATIONS if options.only in mutation.name]
    if options.list:
        print(*(f"{mutation.name}: {' '.join(mutation.tests)}" for mutation in found), sep="\n")
        return 0
    chosen = [mutation for mutation in found if not mutation.gpu or has_hopper()]
    if len(chosen) < len(found):
        print(f"{len(found) - len(chosen)} mutations need a Hopper GPU and are left out")
    bad = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        free = trees(Path(folder), options.jobs)

        def borrowed(work: Callable[[Any, Path], Any], subject: Any) -> Any:
            tree = free.pop()  # as many trees as threads
            try:
                return work(subject, tree)
            finally:
                free.append(tree)

        suites = sorted({(mutation.tests, mutation.gpu) for mutation in chosen})
        for (tests, _), done in zip(suites, pool.map(partial(borrowed, pytest), suites), strict=True):
            if done.returncode:
                sys.exit(
                    f"{' '.join(tests)} must pass before anything is mutated:\n{done.stdout}{done.stderr}"
                )
        attempt = partial(borrowed, verdict)
        for mutation, (fate, remark) in zip(chosen, pool.map(attempt, chosen), strict=True):
            bad += fate != "killed"
            print(f"{fate:8s} {mutation.name}: {remark}", flush=True)
    print(f"{len(chosen)} mutations, {len(chosen) - bad} killed")
    return 1 if bad or not found else 0


if __name__ == "__main__":
    sys.exit(main())
