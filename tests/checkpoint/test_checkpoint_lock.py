"""One process in a run folder: the second is told who the first is, a dead one is succeeded."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from ssmtrain.checkpoint import lock

FORK = multiprocessing.get_context("fork")


def _hold(path: Path, ready: object, go: object) -> None:
    lock.acquire(path)
    ready.set()
    go.wait(60)


@pytest.fixture
def holder(tmp_path: Path):
    """A living process that holds the lock; killed at the end."""
    ready, go = FORK.Event(), FORK.Event()
    child = FORK.Process(target=_hold, args=(tmp_path / "lock", ready, go))
    child.start()
    assert ready.wait(60)
    yield child
    child.kill()
    child.join(60)


def test_the_second_is_told_who_the_first_is(tmp_path: Path, holder) -> None:
    with pytest.raises(lock.Held, match=rf"process {holder.pid} on \S+ \(since 20"):
        lock.acquire(tmp_path / "lock")


def test_a_killed_owner_is_succeeded(tmp_path: Path, holder) -> None:
    holder.kill()
    holder.join(60)
    taken = lock.acquire(tmp_path / "lock")
    assert f"process {holder.pid} on " in (taken.taken_over or "")
    taken.release()
    assert lock.acquire(tmp_path / "lock").taken_over is None


def test_released_and_taken_again(tmp_path: Path) -> None:
    first = lock.acquire(tmp_path / "lock")
    assert first.taken_over is None
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600
    with pytest.raises(lock.Held, match=f"process {os.getpid()} on"):
        lock.acquire(tmp_path / "lock")
    first.release()
    first.release()
    lock.acquire(tmp_path / "lock").release()


def test_a_child_of_a_dead_owner_does_not_keep_the_run(tmp_path: Path) -> None:
    """A process forked by the owner (a data loader) inherits the flock and may outlive it."""
    path = tmp_path / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    gone = FORK.Process(target=int)
    gone.start()
    gone.join(60)
    _record(path, pid=gone.pid)
    assert f"process {gone.pid} on" in (lock.acquire(path).taken_over or "")
    os.close(descriptor)


@pytest.mark.parametrize(
    ("change", "dead"),
    [
        ({}, False),
        ({"started": 1}, True),
        ({"boot": "another"}, True),
        ({"host": "elsewhere", "started": 1}, False),
        ({"pid": "1"}, False),
    ],
)
def test_where_files_cannot_be_locked_the_record_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, dead: bool
) -> None:
    def refused(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    path = tmp_path / "lock"
    lock.acquire(path)
    _record(path, **change)
    if dead:
        assert lock.acquire(path).taken_over
    else:
        with pytest.raises(lock.Held):
            lock.acquire(path)
    path.write_text("")
    assert lock.acquire(path).taken_over is None


def _race(path: Path, start: object, done: object, winners: object) -> None:
    start.wait(60)
    try:
        lock.acquire(path)
    except lock.Held:
        return
    winners.put(os.getpid())
    done.wait(60)


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    _hold_dead(path)
    for _ in range(10):
        start, done, winners = FORK.Event(), FORK.Event(), FORK.SimpleQueue()
        racers = [FORK.Process(target=_race, args=(path, start, done, winners)) for _ in range(6)]
        for racer in racers:
            racer.start()
        start.set()
        first = winners.get()
        losers = [racer for racer in racers if racer.pid != first]
        for racer in losers:
            racer.join(60)
        assert winners.empty()
        done.set()
        for racer in racers:
            racer.join(60)


def _hold_dead(path: Path) -> None:
    child = FORK.Process(target=lock.acquire, args=(path,))
    child.start()
    child.join(60)


def _record(path: Path, **change: object) -> None:
    """Write the owner's record as this process would, with changes."""
    taken = lock.acquire(path.with_name("other"))
    owner = json.loads(path.with_name("other").read_text()) | change
    taken.release()
    path.write_text(json.dumps(owner))
