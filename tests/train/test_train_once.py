"""Work that one process does for several: they wait, and one takes the place of one that was killed."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ssmtrain.train.once import once

CONTEXT = multiprocessing.get_context("spawn")


def process(folder: Path, name: str, seconds: float, fails: bool = False) -> None:
    """Work for some seconds, or wait for another that does; what happens stands in `log`."""

    def note(what: str) -> None:
        with open(folder / "log", "a") as file:
            file.write(f"{name} {what}\n")

    def work() -> dict[str, Any]:
        note("works")
        time.sleep(seconds)
        if fails:
            raise ValueError("no\nuse")
        note("is done")
        return {"kernels": 3}

    try:
        once(folder / "record.json", work, lambda: note("waits"), lead=False)
        note("goes on")
    except ValueError:
        note("fails")


def start(folder: Path, *names: str, seconds: float = 0.0, fails: bool = False) -> list[Any]:
    found = [CONTEXT.Process(target=process, args=(folder, name, seconds, fails)) for name in names]
    for one in found:
        one.start()
    return found


def until(folder: Path, line: str) -> None:
    end = time.monotonic() + 60
    while line not in log(folder):
        assert time.monotonic() < end, log(folder)
        time.sleep(0.01)


def log(folder: Path) -> list[str]:
    path = folder / "log"
    return path.read_text().splitlines() if path.exists() else []


def ended(processes: list[Any]) -> None:
    for one in processes:
        one.join(60)
        assert one.exitcode is not None


def test_one_works_and_the_others_wait(tmp_path: Path) -> None:
    processes = start(tmp_path, "a", "b", "c", seconds=4.0)
    ended(processes)
    lines = log(tmp_path)
    assert sum(line.endswith("works") for line in lines) == 1, lines
    assert sum(line.endswith("waits") for line in lines) == 2, lines
    done = next(i for i, line in enumerate(lines) if line.endswith("is done"))
    assert all(i > done for i, line in enumerate(lines) if line.endswith("goes on")), lines
    process(tmp_path, "later", 0.0)
    assert log(tmp_path)[len(lines) :] == ["later goes on"]
    assert json.loads((tmp_path / "record.json").read_text()) == {"kernels": 3}


def test_one_that_is_killed_at_work_is_succeeded(tmp_path: Path) -> None:
    first = start(tmp_path, "a", seconds=600.0)
    until(tmp_path, "a works")
    others = start(tmp_path, "b", "c")
    for name in "bc":
        until(tmp_path, f"{name} waits")
    os.kill(first[0].pid, signal.SIGKILL)
    ended([*first, *others])
    lines = log(tmp_path)
    assert sum(line.endswith("is done") for line in lines) == 1, lines
    assert {"b goes on", "c goes on"} <= set(lines), lines


def test_those_who_waited_for_one_that_failed_do_not_fail_too(tmp_path: Path) -> None:
    first = start(tmp_path, "a", seconds=6.0, fails=True)
    until(tmp_path, "a works")
    second = start(tmp_path, "b")
    until(tmp_path, "b waits")
    ended([*first, *second])
    assert "b goes on" in log(tmp_path)
    assert "b works" not in log(tmp_path)
    assert json.loads((tmp_path / "record.json").read_text()) == {"error": "ValueError: no"}
    process(tmp_path, "later", 0.0)
    assert log(tmp_path)[-3:] == ["later works", "later is done", "later goes on"]


def test_who_is_told_to_stop_has_done_nothing(tmp_path: Path) -> None:
    def work() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "record.json", work, lambda: None, lead=True)
    assert not (tmp_path / "record.json").exists()
    process(tmp_path, "next", 0.0)
    assert "next is done" in log(tmp_path)


@pytest.mark.parametrize("lead", [True, False])
def test_where_files_cannot_be_locked_the_lead_works(
    lead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    ran: list[int] = []
    once(tmp_path / "record.json", lambda: {"kernels": len(ran) or ran.append(1) or 1}, lambda: None, lead)
    assert bool(ran) == lead


def test_a_broken_record_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{")
    process(tmp_path, "a", 0.0)
    assert log(tmp_path) == ["a works", "a is done", "a goes on"]
