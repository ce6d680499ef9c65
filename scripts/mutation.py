"""What is broken on purpose: a mutation, and where the kernels and their tests are."""

from __future__ import annotations

from dataclasses import dataclass

KERNELS = "src/ssmtrain/kernels"
LAYERS = "src/ssmtrain/layers"
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
    gpu: bool = False
    """Whether the tests need a Hopper GPU."""
