"""`runs tail`: each record as it comes, until the run ends or the watcher goes."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import pytest

from runs.conftest import MakeRun, train_record, val_record
from ssmtrain.checkpoint import lock
from ssmtrain.cli import main
from ssmtrain.runs import tail
from ssmtrain.runs.words import record_line


def test_tail_follows_to_the_end(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("mine", 15)
    held = lock.acquire(folder / "lock")
    coming = deque([[train_record(16)], [], [val_record(16, 2.0), train_record(17)], [train_record(18)]])

    def pause(seconds: float) -> None:
        """The run writes while the watcher sleeps; with its last record it ends."""
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps(one) + "\n" for one in coming.popleft()))
        if not coming:
            held.release()

    monkeypatch.setattr(tail.time, "sleep", pause)
    assert main(["runs", "tail", "mine", "lines=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()[:3]) for line in lines[:-1]] == [
        "step 14 loss",
        "step 15 loss",
        "step 16 loss",
        "step 16 validation",
        "step 17 loss",
        "step 18 loss",
    ]
    assert lines[-1].startswith("mine: stopped (SIGTERM) at step 18; continue: ssmtrain fit config=")


def test_ctrl_c_ends_the_watcher_only(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    folder = make_run("mine")
    held = lock.acquire(folder / "lock")
    monkeypatch.setattr(tail.time, "sleep", interrupt)
    assert main(["runs", "tail", "mine"]) == 130
    assert "error" not in capsys.readouterr().err
    held.release()
    assert main(["runs", "tail", "mine", "lines=none"]) == 2
    make_run("other")
    assert main(["runs", "tail", "*"]) == 2
    assert "takes one run, the line names 2" in capsys.readouterr().err


def test_the_live_view(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("mine")
    view = tail.Live(folder, 5)
    view.show(
        [train_record(5), val_record(5, 1.38), {"kind": "sample", "step": 5, "text": "[red]\x1b[2J"}], 3
    )
    view.show([train_record(10)], 1)
    lines = tail.picture("mine", view.train, view.val, view.goals, view.losses)
    view.close()
    assert lines[0] == "mine  step 10/20  20.5k tokens"
    assert lines[1] == "█" * 15 + "░" * 15 + " 50.0 %  12 s left"
    assert "validation 2.0000 bits/byte" in lines[2] and lines[3].startswith("█▁  ")
    told = capsys.readouterr().out
    assert "sample: [red]\\x1b[2J" in told and "\x1b[2J" not in told
    assert tail.picture("new", {}, {}, (None, None), deque())[1] == "░" * 30 + " 0.0 %"


@pytest.mark.parametrize(
    "record", [{}, {"kind": "train"}, {"kind": "train", "step": "x"}, {"kind": "odd", "step": 1}]
)
def test_odd_records_have_no_line(record: dict[str, object], tmp_path: Path) -> None:
    assert record_line(record) is None
    assert record_line({"kind": "train", "step": 1, "loss": None, "bpb": [], "lr": "x"}) is not None
