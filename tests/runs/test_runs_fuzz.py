"""Files of a run harmed at random: the run is listed, shown and reported all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz import JSON, bounded, replaced, tries
from runs.conftest import MakeRun, train_record, val_record
from ssmtrain.checkpoint.best import Best
from ssmtrain.cli import main
from ssmtrain.runs.folder import STATES, look
from ssmtrain.train import attempts

FILES = ("status.json", "attempts.jsonl", "metrics.jsonl", "lock", "config.yaml", "goodput.json")
LINES = st.sampled_from([b"[" * 3000, b"[" * 10**5, b"\xff", b"", b"{}", b"null", b"1", b'{"step": 1e999}'])


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    records = [*(train_record(step) for step in range(1, 5)), val_record(4, 2.0)]
    return make_run("one", 4, records=records)


@tries(25)
@given(draw=st.data(), name=st.sampled_from(FILES))
def test_files_with_something_replaced(
    run: Path, draw: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is in one of its files, looking at a run ends with figures or with none."""
    path = run / name
    before = path.read_bytes() if path.exists() else None
    lines = (before or b"").splitlines() or [b"{}"]
    at = draw.draw(st.integers(0, len(lines) - 1))
    if name == "config.yaml" or draw.draw(st.booleans()):
        lines[at] = draw.draw(LINES)
    else:
        found = json.loads(lines[at] or b"{}")
        lines[at] = json.dumps(replaced(found, draw, JSON)).encode()
    path.write_bytes(b"\n".join(lines) + draw.draw(st.sampled_from([b"\n", b"", b"\n{"])))
    try:
        with bounded():
            assert look(run, Path("runs")).state in STATES
            account = attempts.account(attempts.read(run / attempts.FILE))
            assert attempts.line(account).startswith("goodput: ")
            assert Best(run, run / "checkpoints", run / "metrics.jsonl").step is None
            assert main(["runs", "ls"]) == 0 and main(["runs", "show", "one"]) in (0, 2)
            assert "Traceback" not in capsys.readouterr().err
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)
