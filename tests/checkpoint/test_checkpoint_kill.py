"""kill -9 at every named point of a save, and at random moments: the newest good checkpoint is never lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from ssmtrain.checkpoint import faults, store

FORK = multiprocessing.get_context("fork")


def _tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((3000,), float(step))},
        "optim": {"m": torch.full((3000,), -float(step))},
    }


def _check(folder: Path, at_least: int) -> int:
    """The newest good step, whose contents are those of that step."""
    newest = store.newest_good(folder, pytest.fail)
    assert newest is not None
    step = store.step_of(newest)
    assert step >= at_least
    for stem, named in _tensors(step).items():
        for name, tensor in named.items():
            assert torch.equal(store.load_tensors(newest, stem)[name], tensor)
    return step


def _save_then_prune(folder: Path, step: int, fault: str) -> None:
    faults.arm(fault)
    store.save(folder, step, _tensors(step), {"step": step})
    store.prune(folder, 2)


@pytest.mark.parametrize("name", faults.SAVE_POINTS)
def test_killed_at_a_named_point(tmp_path: Path, name: str) -> None:
    for step in (1, 2, 3):
        store.save(tmp_path, step, _tensors(step), {"step": step})
    child = FORK.Process(target=_save_then_prune, args=(tmp_path, 4, f"{name}:1"))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL, f"{name} was not passed"
    published = faults.SAVE_POINTS.index(name) >= faults.SAVE_POINTS.index("after_rename")
    assert _check(tmp_path, 3) == (4 if published else 3)
    left = [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name]
    assert bool(left) == (name not in ("after_rename", "before_prune"))
    assert [path.name for path in store.clean(tmp_path)] == left
    store.save(tmp_path, 4, _tensors(4), {"step": 4})
    store.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def _save_for_ever(folder: Path, start: int, begun: object) -> None:
    begun.set()
    for step in range(start, start + 10_000):
        store.save(folder, step, _tensors(step), {"step": step})
        store.prune(folder, 2)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    draw = random.Random(1)
    step = store.step_of(store.save(tmp_path, 1, _tensors(1), {"step": 1}))
    for _ in range(30):
        begun = FORK.Event()
        child = FORK.Process(target=_save_for_ever, args=(tmp_path, step + 1, begun))
        child.start()
        assert begun.wait(60)
        time.sleep(draw.uniform(0.01, 0.15))
        child.kill()
        child.join(60)
        step = _check(tmp_path, step)
        store.clean(tmp_path)
        assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]
    assert step > 5


def _hold(folder: Path, ready: object, go: object) -> None:
    def wait(written: int) -> None:
        ready.set()
        go.wait(60)

    from ssmtrain.checkpoint import shard

    write = shard.write_file
    shard.write_file = lambda path, pieces, progress: write(path, pieces, wait)
    store.save(folder, 2, _tensors(2), {})


def test_a_living_writer_is_not_cleaned_away(tmp_path: Path) -> None:
    ready, go = FORK.Event(), FORK.Event()
    child = FORK.Process(target=_hold, args=(tmp_path, ready, go))
    child.start()
    assert ready.wait(60)
    assert store.clean(tmp_path) == []
    go.set()
    child.join(60)
    assert child.exitcode == 0
    assert store.verify(tmp_path / "step-00000002") == []


def test_clean_takes_only_its_own_names(tmp_path: Path) -> None:
    names = ["step-00000001.tmp-1", "notes.tmp-" + "0" * 32, "step-00000001"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ("step-00000002.tmp-" + "0" * 32)).symlink_to(tmp_path / names[0])
    stale = tmp_path / ("step-00000003.tmp-" + "0" * 32)
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    assert store.clean(tmp_path) == [stale]
    assert all((tmp_path / name).is_dir() for name in names)


def test_points_count_and_name_their_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    monkeypatch.setattr(faults, "_passed", faults.Counter())
    faults.point("step_end")
    faults.arm("step_end:2:TERM")
    for name in ("step_end", "other", "other", "step_end", "step_end"):
        faults.point(name)
    assert sent == [signal.SIGTERM]
