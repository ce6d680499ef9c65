"""Triton kernels on the CPU, in Triton's interpreter with its traps repaired; natively where there is a GPU.

tests/conftest.py sets TRITON_INTERPRET=1 where there is no GPU and says why so early. `device` is then the
CPU; on a GPU the same tests run compiled. Tests marked gpu are skipped under the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ssmtrain.kernels.tuned import interpreting

HERE = Path(__file__).parent

pytest.importorskip("triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder's gpu tests under the interpreter: their sizes would take it hours."""
    for item in items:
        if interpreting() and HERE in item.path.parents and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="for compiled kernels; TRITON_INTERPRET=1 is set"))


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Repair the interpreter for each test of the folder; nothing to repair in compiled kernels."""
    if not interpreting():
        yield
        return
    from kernels.triton.shim import repaired

    with repaired():
        yield


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run: the CPU under the interpreter, else the GPU."""
    return torch.device("cpu" if interpreting() else "cuda")
