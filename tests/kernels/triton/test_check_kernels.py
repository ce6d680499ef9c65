"""Every kernel compiles without a GPU and fits its multiprocessor (scripts/check_kernels.py)."""

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


def test_the_main_shapes_compile_and_fit() -> None:
    """On Hopper, for which there are kernels of their own; `make check-kernels` takes all architectures."""
    done = run("--quick", "--arch", "sm_90")
    assert done.returncode == 0, done.stdout + done.stderr
    for op in ("ssd", "causal_conv1d", "gated_norm", "linear_cross_entropy"):
        assert f"\n{op}." in done.stdout, f"no kernel of {op} was compiled"


def test_what_does_not_fit_fails_the_check() -> None:
    done = run("--quick", "--arch", "sm_86", "--only", "gated_norm", "--spill", "-1")
    assert done.returncode == 1 and "spills 0 bytes" in done.stdout, done.stdout + done.stderr


RACE = """
import kernel_launches
from kernel_cases import ssd_case
from kernel_hazards import hazards

tile = {"P=32,N=64,dtype=bfloat16": {"BP": %d}}
with kernel_launches.table({"sm_90": {"ssd_through_states": tile}}):
    launches = kernel_launches.record_fake(ssd_case(1, 256, 4, 32, 64), "sm_90")
made = [kernel_launches.compiled(each, "sm_90") for each in launches if each.name.endswith("through_states")]
print(len(made), [found for kernel in made for found in hazards(kernel.asm["ttgir"])])
"""


@pytest.mark.parametrize("tile,races", [(32, True), (64, False)])
def test_a_copy_under_a_product_in_flight_is_found(tile: int, races: bool) -> None:
    """Triton's own, on Hopper; where it is gone, ssd's `_candidates` need not go round it any more."""
    command = [sys.executable, "-c", RACE % tile]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=SCRIPT.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 ") and ("a copy overwrites %state" in done.stdout) == races, done.stdout


TURN = """
    %ring = ttg.local_alloc : () -> !ttg.memdesc<{size}x32x64xbf16, #shared, #smem, mutable>
    %out = scf.for %i = %c0_i32 to %n iter_args(%acc = %zero, %in = %c1_i32, %at = %c-1_i32) -> (f32, i32) {{
      %at_2 = arith.addi %at, %c1_i32 : i32
      %at_3 = arith.select %over, %c0_i32, %at_2 : i32
      %tile = ttg.memdesc_index %ring[%at_3] : !ttg.memdesc
      %turned = ttg.memdesc_trans %tile {{order}} : !ttg.memdesc
      %acc_2 = ttng.warp_group_dot %a, %turned, %acc {{inputPrecision = 0 : i32, isAsync = true}} : tensor
      {wait}
      %in_2 = arith.addi %in, %c1_i32 : i32
      %in_3 = arith.select %past, %c0_i32, %in_2 : i32
      %next = ttg.memdesc_index %ring[%in_3] : !ttg.memdesc
      %token = ttg.async_copy_global_to_local %pointers, %next mask %some : tensor
      scf.yield %acc_2, %in_3, %at_3 : tensor, i32, i32
"""
WAIT = "%w = ttng.warp_group_dot_wait %acc_2 {{pendings = {} : i32}} : tensor"


@pytest.mark.parametrize(
    "size,wait,races",
    [
        (2, "", True),  # of the same turn
        (2, WAIT.format(0), False),
        (2, WAIT.format(1), True),
        (3, "", True),  # of the turn before
        (3, WAIT.format(1), False),
        (4, "", False),
    ],
)
def test_what_is_waited_for_is_no_hazard(size: int, wait: str, races: bool) -> None:
    sys.path.append(str(SCRIPT.parent))
    from kernel_hazards import hazards

    found = list(hazards(TURN.format(size=size, wait=wait.replace("{{", "{").replace("}}", "}"))))
    assert bool(found) == races, found
