"""Shared pytest settings."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

# Without a GPU the Triton kernels run in Triton's interpreter, and that is settled when triton is first
# imported: its own tl.sum and tl.cumsum are decorated then. Lightning and torch.compile import it, any test
# may share its process with kernels/triton, and collection imports everything first, so the variable is set
# here, for the whole run. Nothing else heeds it: on a CPU `auto` is the reference, and inductor makes C++.
# With a GPU the kernels are compiled; TRITON_INTERPRET=1 in the environment interprets them there too.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def no_fault_is_left() -> Iterator[None]:
    """A fault that a test planned in this process does not await the next test."""
    yield
    faults = sys.modules.get("ssmtrain.checkpoint.faults")
    if faults is not None:
        faults.arm()
