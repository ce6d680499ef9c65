"""Goodput: what all starts of a run spent, and what of it was done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmtrain.checkpoint import faults
from ssmtrain.train.attempts import Attempt, Attempts, account, line, read
from ssmtrain.train.clock import Clock
from train.conftest import ledger

Train = Callable[..., tuple[int, Path]]


def _attempt(begin: int, step: int, **time: float) -> Attempt:
    return Attempt(begin, step, {"start": 1.0, "data": 2.0, "step": 8.0, "save": 1.0, "other": 0.0, **time})


def test_what_is_done_again_is_lost() -> None:
    found = account([_attempt(0, 10), _attempt(6, 16, val=3.0, sample=2.0), _attempt(16, 20)])
    # Four of the first start's ten steps: 40 % of its ten seconds of steps and data.
    assert found["lost_steps"] == 4
    assert found["time"] == pytest.approx(
        {
            "productive": 0.6 * 8 + 8 + 8,
            "start": 3.0,
            "data": 0.6 * 2 + 2 + 2,
            "save": 3.0,
            "val": 3.0,
            "sample": 2.0,
            "lost": 4.0,
            "other": 0.0,
        }
    )
    assert found["seconds"] == pytest.approx(3 * 12 + 5) == sum(found["time"].values())
    assert found["goodput"] == pytest.approx(20.8 / 41)
    said = line(found)
    assert said.startswith("goodput: 50.7 % of 41 s in 3 starts; start-up 7.3 %, waiting for data 12.7 %")
    assert said.endswith("validation 7.3 %, samples 4.9 %, 4 steps done again 9.8 %, other 0.0 %")


def test_a_later_start_may_go_back_further() -> None:
    """The second start never got to a step, the third found the newest checkpoint damaged."""
    starts = [_attempt(0, 10), Attempt(8, 8, {"start": 1.0}), _attempt(4, 12)]
    assert account(starts)["lost_steps"] == 6
    assert account(starts)["time"]["lost"] == pytest.approx(6.0)
    # A start that went on twice from the same step.
    assert account([_attempt(4, 6), _attempt(4, 6), _attempt(4, 8)])["lost_steps"] == 4
    assert account([])["goodput"] == 0.0


def test_the_file_outlives_kills(tmp_path: Path) -> None:
    clock = Clock()
    first = Attempts(tmp_path, 0, clock)
    with clock("step"):
        first.write({"kind": "train", "step": 3})
    first.file.close()  # killed
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('[]\n{"attempt": 1}\n{"attempt": 1, "begin": 0, "st')
    second = Attempts(tmp_path, 2, Clock())
    assert [(a.begin, a.step) for a in second.past] == [(0, 3)]
    second.write({"kind": "train", "step": 4})
    second.write({"kind": "val", "step": 4})
    second.close()
    assert [(a.begin, a.step) for a in read(tmp_path / "attempts.jsonl")] == [(0, 3), (2, 4)]
    stored = json.loads((tmp_path / "goodput.json").read_text())
    assert stored["attempts"] == 2 and stored["lost_steps"] == 1
    # What was said of an earlier start is one line from then on.
    Attempts(tmp_path, 4, Clock()).file.close()
    assert len((tmp_path / "attempts.jsonl").read_text().splitlines()) == 3


def test_the_clock_splits_all_of_its_time() -> None:
    clock = Clock()
    clock.start -= 10.0
    assert clock.split()["start"] == pytest.approx(10.0, abs=0.5)
    clock.startup = 4.0
    clock.spent["step"] = 5.0
    split = clock.split()
    assert split["start"] == 4.0 and split["other"] == pytest.approx(1.0, abs=0.5)
    assert sum(split.values()) == pytest.approx(clock.elapsed, abs=0.1)
    assert Clock(start=clock.start).elapsed == pytest.approx(10.0, abs=0.5)


def test_a_run_of_two_starts_says_where_its_time_went(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faults.arm("step_end:6:TERM")
    code, folder = train(trainer__log_every=1, trainer__sample_every=2)
    assert code == 75
    assert "goodput: " in capsys.readouterr().out
    assert json.loads((folder / "goodput.json").read_text())["lost_steps"] == 0
    faults.arm()
    # As after a power cut: the newest checkpoint is gone, and with it two steps.
    done = ledger(folder)[-1]["step"]
    shutil.rmtree(folder / "checkpoints" / f"step-{done:08d}")
    code, folder = train(trainer__log_every=1, trainer__sample_every=2)
    assert code == 0
    found: dict[str, Any] = json.loads((folder / "goodput.json").read_text())
    assert (found["attempts"], found["lost_steps"]) == (2, done - 4)
    time = found["time"]
    assert min(time[part] for part in ("productive", "start", "data", "save", "val", "sample", "lost")) > 0
    assert found["seconds"] == pytest.approx(sum(time.values()), abs=0.01)
    assert found["goodput"] == pytest.approx(time["productive"] / found["seconds"], abs=1e-3)
    said = capsys.readouterr().out
    assert "in 2 starts; start-up " in said and f"{done - 4} steps done again" in said
    assert "- goodput: " in (folder / "report.md").read_text()
    assert json.loads((folder / "report.json").read_text())["goodput"]["attempts"] == 2
