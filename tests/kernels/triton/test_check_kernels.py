"""Every kernel compiles without a GPU and fits the smallest multiprocessor (scripts/check_kernels.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "check_kernels.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own: this one's kernels are decorated for the interpreter."""
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("arch", ["sm_86", "sm_90"])
def test_the_main_shapes_compile_and_fit(arch: str) -> None:
    done = run("--quick", "--arch", arch)
    assert done.returncode == 0, done.stdout + done.stderr
    for op in ("ssd", "causal_conv1d", "gated_norm"):
        assert f"\n{op}." in done.stdout, f"no kernel of {op} was compiled"


def test_what_does_not_fit_fails_the_check() -> None:
    done = run("--quick", "--arch", "sm_86", "--only", "gated_norm", "--spill", "-1")
    assert done.returncode == 1 and "spills 0 bytes" in done.stdout, done.stdout + done.stderr
