"""docs/faults.md names tests: all of them are there, every row has one, and the long ones are marked so."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "faults.md"
NAMED = re.compile(r"(\*long\* )?`(tests/[\w/]+\.py)::(\w+)`")


@functools.cache
def named_in(file: Path) -> dict[str, bool]:
    """The tests of a file, and whether each is only in `make test-faults`."""
    tree = ast.parse(file.read_text())
    return {
        node.name: any("mark.faults" in ast.unparse(mark) for mark in node.decorator_list)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_test_named_is_there() -> None:
    named = NAMED.findall(PAGE.read_text())
    assert len(named) > 70
    missing = [f"{file}::{test}" for _, file, test in named if test not in named_in(ROOT / file)]
    assert missing == []


def test_every_row_names_a_test_that_runs_in_ci() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| what ")]
    assert len(rows) > 25
    for row in rows:
        assert row.count("|") == 5, row
        short = [not named_in(ROOT / file)[test] for _, file, test in NAMED.findall(row)]
        assert any(short), row
        assert not re.search(r"\*long\*", row) or not all(short), row


def test_every_test_of_this_folder_is_named() -> None:
    text = PAGE.read_text()
    found = [
        f"{path.name}::{test}"
        for path in sorted(Path(__file__).parent.glob("test_*.py"))
        for test in named_in(path)
        if path != Path(__file__)
    ]
    assert [name for name in found if name not in text] == []


def test_there_are_no_workers() -> None:
    """Nobody forks or feeds rows from another process, so none can die unseen; text that is prepared is
    encoded by processes that are watched."""
    words = re.compile(r"\b(DataLoader|num_workers|os\.fork|import multiprocessing|from multiprocessing)\b")
    found = [str(path) for path in (ROOT / "src").rglob("*.py") if words.search(path.read_text())]
    assert found == [str(ROOT / "src/ssmtrain/data/encode.py")]
