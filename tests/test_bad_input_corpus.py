"""The catalogue of bad inputs, 1 to 145: every number is a case of a table, or a test of its own."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

from checkpoint import test_checkpoint_bad_input as checkpoints
from cli import test_cli_bad_input as lines
from cli import test_cli_process as processes
from config import test_config_bad_input as pages
from data import test_data_bad_files as texts
from data import test_data_bad_input as inputs

NOT_OURS = {
    27: "experts are not spread over devices",
}
"""What would have to be wrong does not exist here."""


def numbers(module: ModuleType) -> set[int]:
    """The numbers of a module's cases and tests."""
    cases = [case[0] if isinstance(case, tuple) else case.number for case in getattr(module, "CASES", [])]
    named = [re.match(r"([0-9]+)( |$)", str(case)) for case in cases]
    tests = [re.match(r"test_([0-9]+)_", name) for name in vars(module)]
    return {int(found[1]) for found in [*named, *tests] if found}


@pytest.mark.parametrize(
    ("module", "first", "last"),
    [(pages, 1, 65), (pages, 90, 90), (texts, 74, 78), (texts, 80, 85), (checkpoints, 98, 126)],
)
def test_a_table_has_its_part_of_the_catalogue(module: ModuleType, first: int, last: int) -> None:
    """Each case is one input and what is said of it; the id of the case begins with its number."""
    assert set(range(first, last + 1)) - set(NOT_OURS) <= numbers(module)


def test_files_and_folders_have_theirs() -> None:
    wanted = {66, 67, 68, 69, 70, 71, 72, 73, 79, 86, 87, 88, 89, *range(91, 98)}
    assert wanted <= numbers(inputs)


def test_no_number_is_left_out() -> None:
    found = set().union(*map(numbers, (pages, texts, inputs, checkpoints, lines, processes)))
    assert set(range(1, 146)) - set(NOT_OURS) == found & set(range(1, 146))
