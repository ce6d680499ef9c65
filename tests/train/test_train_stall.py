"""Ranks that stand still: which one is named, and that the run ends."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ssmtrain.runs.folder import state_of
from ssmtrain.train.stall import Beat, Watcher, culprits, place
from train.test_train_ddp import two_forked, two_ranks

LIMIT = 40.0


class Rank:
    """A watcher without its thread, and what its rank does."""

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.at = (0, 0)
        self.watcher = Watcher(folder, rank, world, LIMIT, lambda: self.at, pytest.fail)
        self.watcher.main = None

    def look(self, now: float) -> str | None:
        return self.watcher.look(now)


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Rank]:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    found = [Rank(tmp_path, rank, 3) for rank in range(3)]
    for rank in found:
        rank.clock = clock  # type: ignore[attr-defined]
    return found


def run(ranks: list[Rank], seconds: int, alive: tuple[int, ...] = (0, 1, 2)) -> dict[int, str]:
    """Let the ranks look every five seconds; what each says."""
    said = {}
    clock = ranks[0].clock  # type: ignore[attr-defined]
    for _ in range(0, seconds, 5):
        clock[0] += 5
        for rank in alive:
            text = ranks[rank].look(clock[0])
            if text is not None:
                said[rank] = text
    return said


def go(ranks: list[Rank], *steps: int) -> None:
    for rank, step in zip(ranks, steps, strict=True):
        rank.at = (step, 2 * step)


def test_ranks_that_get_on_say_nothing(ranks: list[Rank]) -> None:
    for step in range(1, 5):
        go(ranks, step, step, step)
        assert run(ranks, 35) == {}


def test_the_one_behind_is_named(ranks: list[Rank]) -> None:
    go(ranks, 5, 5, 5)
    run(ranks, 10)
    go(ranks, 6, 5, 6)
    said = run(ranks, 60)
    assert set(said) == {0, 1, 2}
    for text in said.values():
        assert "no rank got further for 40 s" in text
        assert "rank 1 (process" in text and "is behind the others; after step 5" in text
        assert "rank 0 waits; after step 6" in text and "rank 1 waits" not in text
        assert culprits(text).startswith("rank 1 (process") and "rank 0" not in culprits(text)


def test_one_that_is_not_heard_of_is_named(ranks: list[Rank]) -> None:
    """Though it was no less far than the others when it was last heard of."""
    go(ranks, 5, 5, 5)
    run(ranks, 10)
    said = run(ranks, 60, alive=(0, 1))
    assert set(said) == {0, 1}
    assert "rank 2 (process" in said[0] and "has not been heard of for" in said[0]
    assert "rank 0 waits" in said[0] and "behind" not in said[0]


def test_one_that_never_came(ranks: list[Rank]) -> None:
    said = run(ranks, 60, alive=(0, 2))
    assert "rank 1 was never heard of" in said[0]


def test_all_at_one_place(ranks: list[Rank]) -> None:
    go(ranks, 7, 7, 7)
    said = run(ranks, 60)
    assert all(f"rank {rank} (process" in said[0] for rank in range(3)) and "stands; after step 7" in said[0]


def test_a_rank_that_was_started_again_is_another(ranks: list[Rank], tmp_path: Path) -> None:
    """Beats that an earlier start left are not taken for this one's."""
    old = Beat(1, "there", 1, 99, 50, 100, "somewhere")
    (tmp_path / "rank-00001.json").write_text(json.dumps(asdict(old)))
    run(ranks, 10, alive=(0,))
    go(ranks, 1, 0, 1)
    assert "is behind the others; after step 0" in run(ranks, 60)[0]
    assert ranks[0].watcher.seen[1][0] != replace(old)


def test_half_a_beat_is_none(ranks: list[Rank], tmp_path: Path) -> None:
    (tmp_path / "rank-00001.json").write_text('{"rank": 1')
    assert "rank 1 was never heard of" in run(ranks, 60, alive=(0, 2))[0]


def test_the_place_is_a_line_of_ours() -> None:
    assert place(sys._getframe()) == "no line of ours"
    from ssmtrain.train import clock

    with clock.Clock()("step"):
        frame = sys._getframe()
    assert place(frame) == "no line of ours"
    found: list[str] = []

    class Progress(dict):
        def get(self, *args: object) -> float:
            found.append(place(sys._getframe()))
            return 0.0

    timer = clock.Clock()
    timer.spent = Progress()
    with timer("step"):
        pass
    assert found and found[0].startswith("train/clock.py:") and found[0].endswith(" __call__")


def test_a_stopped_rank_ends_the_run(tmp_path: Path) -> None:
    """Rank 1 is stopped in its third step: rank 0 says so and ends both."""
    begin = time.monotonic()
    code, folder, said = two_ranks(
        tmp_path, "1", "after_forward:3:STOP", name="stopped", trainer__stall_seconds=4.0
    )
    assert code == 4 and time.monotonic() - begin < 100, said
    assert "rank 1 (process" in said and "has not been heard of for" in said and "after step 2" in said, said
    assert said.count("no rank got further for 4 s") == 1 and "continue with: " in said
    assert re.search(r"rank 0 waits; after step 2, in train/(module|engine)\.py:\d+ \w+", said), said
    state, why = state_of(folder)
    assert state == "stalled" and why.startswith("rank 1 (process") and "; after step " in why
    assert "rank 0" not in why
    code, folder, _ = two_forked(tmp_path, name="stopped", trainer__stall_seconds=60.0)
    assert code == 0 and not (folder / "beats").exists()
