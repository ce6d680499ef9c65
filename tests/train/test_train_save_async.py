"""Saves beside the training: nothing waits for the disk, nothing is lost, nothing is another's moment."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmtrain.checkpoint import faults, store
from ssmtrain.checkpoint.parts import Part
from ssmtrain.config.errors import UserError
from ssmtrain.train.hold import Hold
from train.conftest import ledger, losses, weights

Train = Callable[..., tuple[int, Path]]
ASYNC = {"trainer__save_async": True, "trainer__save_every": 2, "trainer__val_every": 0}


def test_the_same_checkpoints(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds the moment of its step, though training went on over the same tensors."""
    plain = train(name="plain", **ASYNC | {"trainer__save_async": False}, trainer__keep_last=9)
    real = store.save
    monkeypatch.setattr(store, "save", lambda *args: (time.sleep(0.3), real(*args))[1])
    beside = train(name="beside", **ASYNC, trainer__keep_last=9)
    assert plain[0] == beside[0] == 0
    paths = [store.checkpoints(folder / "checkpoints") for _, folder in (plain, beside)]
    assert [p.name for p in paths[0]] == [p.name for p in paths[1]] and len(paths[0]) == 4
    for one, other in zip(*paths, strict=True):
        for kind in ("model", "optim", "rng"):
            mine, theirs = store.load_tensors(one, kind), store.load_tensors(other, kind)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine), (one.name, kind)


def test_steps_go_on_while_a_disk_is_slow(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are taken inside a save, and no two saves overlap; the end waits for the last."""
    real, under_way, seen, taken = store.save, threading.Lock(), [], []

    def slow(*args: Any) -> Path:
        assert under_way.acquire(blocking=False), "two saves at a time"
        begin = time.time()
        try:
            time.sleep(0.4)
            taken.append(len(ledger(args[0].parent)))
            return real(*args)
        finally:
            seen.append((args[1], begin, time.time(), threading.current_thread().name))
            under_way.release()

    monkeypatch.setattr(store, "save", slow)
    code, folder = train(**ASYNC)
    assert code == 0 and [step for step, *_ in seen] == [2, 4, 6, 8]
    assert [name.startswith("ssmtrain-save") for *_, name in seen] == [True, True, True, False]
    assert all(later[1] >= earlier[2] for earlier, later in itertools.pairwise(seen))
    assert taken[0] > 2, "no step was taken during the first save"
    assert store.checkpoints(folder / "checkpoints")[-1].name == "step-00000008"
    records = (folder / "metrics.jsonl").read_text()
    assert records.count('"kind": "save"') == 4


def test_a_killed_run_continues_to_the_same_bits(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = train(name="whole", **ASYNC)
    faults.arm("step_start:6:TERM")
    code, folder = train(name="broken", **ASYNC)
    assert code == 75
    faults.arm()
    assert train(name="broken", **ASYNC)[0] == 0
    assert losses(folder) == losses(whole) and len(ledger(folder)) == 8
    one, other = weights(whole, 8), weights(folder, 8)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("failing, code", [(1, 0), (3, 2)])
def test_a_disk_that_refuses(
    failing: int, code: int, train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One failure is told and survived, three in a row end the run."""
    real, left = store.save, [failing]

    def refuse(*args: Any) -> Path:
        if left[0]:
            left[0] -= 1
            raise store.SaveFailed(args[0], OSError(28, "No space left on device"))
        return real(*args)

    monkeypatch.setattr(store, "save", refuse)
    if code:
        with pytest.raises(UserError, match="No space left"):
            train(**ASYNC)
        return
    assert train(**ASYNC)[0] == code
    assert "training goes on (2 more failures stop it)" in caplog.text


def test_what_is_held_is_of_its_moment() -> None:
    hold, tensor = Hold(), torch.arange(4.0)
    shares = {"model": {"w": Part(tensor, 2, 8)}}
    held = hold.copy(shares)
    tensor.zero_()
    assert held["model"]["w"].tensor.tolist() == [0, 1, 2, 3]
    assert (held["model"]["w"].start, held["model"]["w"].total) == (2, 8)
    again = hold.copy(shares)["model"]["w"].tensor
    assert again.tolist() == [0] * 4 and again.data_ptr() == held["model"]["w"].tensor.data_ptr()


def test_memory_is_taken_before_it_is_wanted(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, by the saving thread, after the first step; the first copy finds it there."""
    real, taken = Hold.reserve, []

    def reserve(hold: Hold, shares: Any) -> None:
        time.sleep(0.3)  # the copy waits for it
        real(hold, shares)
        taken.append((threading.current_thread().name, {at: b.data_ptr() for at, b in hold.buffers.items()}))

    copied = []
    copy = Hold.copy

    def note(hold: Hold, shares: Any) -> Any:
        held = copy(hold, shares)
        copied.append({(kind, name): p.tensor.data_ptr() for kind in held for name, p in held[kind].items()})
        return held

    monkeypatch.setattr(Hold, "reserve", reserve)
    monkeypatch.setattr(Hold, "copy", note)
    assert train(**ASYNC)[0] == 0
    (thread, reserved), first = taken[0], copied[0]
    assert thread.startswith("ssmtrain-save") and reserved == first and len(first) > 20
    assert all(places == reserved for _, places in taken), "a copy takes no more of it"
