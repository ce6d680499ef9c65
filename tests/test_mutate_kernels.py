"""The mutations of the kernels still apply (scripts/mutate_kernels.py tries them, in minutes)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
script = importlib.import_module("mutate_kernels")
sys.path.pop(0)


@pytest.mark.parametrize("mutation", script.MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_text_and_the_tests_are_there(mutation: script.Mutation) -> None:
    source = (ROOT / mutation.file).read_text()
    broken = script.mutated(source, mutation)
    assert broken is not None, f"{mutation.file} has changed: write this mutation anew"
    assert broken != source and compile(broken, mutation.file, "exec")
    assert all((ROOT / word).is_file() for word in mutation.tests if word.endswith(".py"))


def test_one_occurrence_is_replaced() -> None:
    mutation = script.Mutation("name", "file", "a", "b", ())
    assert script.mutated("aXaXa", mutation) == "bXaXa"
    assert script.mutated("aXaXa", script.Mutation("name", "file", "a", "b", (), 2)) == "aXaXb"
    assert script.mutated("aXaXa", script.Mutation("name", "file", "a", "b", (), 3)) is None
    assert script.mutated("XX", mutation) is None
