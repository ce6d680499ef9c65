"""Something is wrong with one of two ranks: both decide alike, and the one it is gets named."""

from __future__ import annotations

import json
import socket
import time
from functools import partial
from pathlib import Path

import pytest

from faults import spoil
from faults.harness import write_page
from faults.ranks import Pair
from ssmtrain.train.pace import Judge


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_loss_of_nan_on_one_rank_is_a_step_that_both_skip(kind: str, tmp_path: Path) -> None:
    """And the same step, whichever rank it was: to the last bit."""
    write_page(tmp_path, steps=6, every=100)
    stories = []
    for rank in (0, 1):
        story = Pair(tmp_path, f"nan-on-{rank}", kind=kind)
        done = story.done(story.go(before={rank: partial(spoil.loss_of_nan, 3)}))
        assert done.code == 0, done.output
        assert done.output.count("skipped: the loss is not finite (1 in a row, 3 stop the run)") == 1
        assert json.loads((story.path / "report.json").read_text())["nonfinite"] == 1
        stories.append(story)
    one, other = (story.ledger() for story in stories)
    assert one == other and [line["loss_hex"] == "nan" for line in one] == [step == 4 for step in range(1, 7)]
    params = [line["params"] for line in one]
    assert params[3] == params[2] and params[4] != params[3]
    assert all((a == b) == (kind == "ddp") for a, b in params)


def test_a_rank_that_hangs_is_named_and_ends_the_run(tmp_path: Path) -> None:
    """It is alive, and its rows never come: the other one waits in a message."""
    write_page(tmp_path, steps=9, every=1)
    story = Pair(tmp_path, "hung")
    begin = time.monotonic()
    ranks = story.go(None, "trainer.stall_seconds=2", before={1: partial(spoil.hang_reading, 3)})
    assert ranks.wait(grace=20) == [4, 4] and time.monotonic() - begin < 60
    said = ranks.output
    assert "no rank got further for 2 s" in said
    assert "rank 1 (process" in said and "stands; after step 3, in train/module.py" in said, said
    assert "rank 0 waits; after step 3, in parallel/ranks.py" in said and "rank 1 waits" not in said
    assert "continue with: " in said and f"fit config={story.path}/config.yaml" in said
    assert story.open().step == 3
    assert story.run().code == 0, story.starts[-1].output


def test_a_slow_rank_is_named_once(tmp_path: Path) -> None:
    write_page(tmp_path, steps=20, every=100)
    story = Pair(tmp_path, "slow")
    hooks = {0: partial(spoil.called_slow_after, 10), 1: partial(spoil.slow_passes, 0.12)}
    done = story.done(story.go(before=hooks))
    assert done.code == 0, done.output
    assert done.output.count("is slow") == 1
    assert (
        f"rank 1 on {socket.gethostname()} is slow: 0.1" in done.output and "for 10 steps now" in done.output
    )
    lines = [json.loads(line) for line in (story.path / "metrics.jsonl").read_text().splitlines()]
    (record,) = (line for line in lines if line["kind"] == "slow")
    assert (record["step"], record["rank"]) == (10, 1) and record["seconds"] > 1.3 * record["others"]


def test_who_is_slow_for_how_long() -> None:
    judge = Judge()
    even, odd = [1.0, 1.2, 1.0], [1.0, 1.4, 1.0]
    for _ in range(4):
        assert judge.look(odd, 2.0, 10) == []
    assert judge.look(even, 2.0, 10) == []  # forty steps, and then no more
    for _ in range(4):
        assert judge.look(odd, 2.0, 10) == []
    assert judge.look(odd, 2.0, 10) == [(1, 1.4, 1.0, 50)]
    assert judge.look(odd, 2.0, 10) == []  # told already
    # What a step spends on it is too little to tell of.
    assert [judge.look([0.01, 0.02], 1.0, 50) for _ in range(3)] == [[], [], []]
    assert judge.look([0.1, 0.2], 1.0, 50) == [(1, 0.2, 0.1, 50)]


def test_a_full_disk_of_one_rank_is_survived_by_both(tmp_path: Path) -> None:
    write_page(tmp_path, steps=6, every=2)
    story = Pair(tmp_path, "full", kind="fsdp")
    done = story.done(story.go(before={1: partial(spoil.disk_full, 2)}))
    assert done.code == 0 and done.saved == 6, done.output
    said = "checkpoint not saved, training goes on ({} more failures stop it): could not save"
    assert said.format(2) in done.output and said.format(1) in done.output
    assert "rank 1: No space left on device" in done.output
    story = Pair(tmp_path, "fuller", kind="fsdp")
    done = story.done(story.go(before={1: partial(spoil.disk_full, 3)}), grace=20)
    assert done.output.startswith("[2, 2]") and done.saved == 0, done.output
    assert (
        "checkpoint not saved: " in done.output and "the last good one: none; free space under" in done.output
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_leap_of_one_rank_turns_both_back(kind: str, tmp_path: Path) -> None:
    """To the checkpoint's weights, without the rows since; the same bits when one is killed then."""
    write_page(tmp_path, steps=16, every=4)
    spikes = "trainer.spikes={action: rollback, window: 8}"
    calm = Pair(tmp_path, "calm", kind=kind)
    assert calm.run(None, spikes).code == 0, calm.starts[-1].output
    samples = [line["samples"] for line in calm.ledger()]
    hooks = dict.fromkeys((0, 1), partial(spoil.steep_rows, [samples[10][-1]], 1000.0))  # a row of rank 1
    steep, killed = Pair(tmp_path, "steep", kind=kind), Pair(tmp_path, "killed", kind=kind)
    done = steep.done(steep.go(None, spikes, before=hooks))
    assert done.code == 0, done.output
    assert done.output.count("after step 11 the run went back to step-00000008, 12 rows are left out") == 1
    lines = steep.ledger()
    assert lines[:8] == calm.ledger()[:8] and [line["step"] for line in lines] == list(range(1, 17))
    assert [line["samples"] for line in lines[8:13]] == samples[11:16]
    assert killed.done(killed.go({1: "step_end:10"}, spikes, before=hooks)).code == -9
    assert killed.done(killed.go(None, spikes, before=hooks)).code == 0, killed.starts[-1].output
    assert killed.ledger() == lines
