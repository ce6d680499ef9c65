"""Two ranks that write their checkpoints together, killed wherever it hurts: the unbroken run to the bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from faults.harness import write_page
from faults.ranks import Pair
from ssmtrain.check.compare import compare
from ssmtrain.checkpoint import faults

KILLED = -signal.SIGKILL
EVERY = 2


def kills(draw: random.Random, number: int) -> list[tuple[str, int, int]]:
    """(where, rank, at which passing): a third inside saves, a third in steps, a third at random moments."""
    found = []
    for _ in range(number):
        kind = draw.choice(["save", "step", "moment"])
        victim = draw.randrange(2)
        if kind == "save":
            # The first rank publishes and prunes; of the points of a save the others pass the one in a file.
            found.append((draw.choice(faults.SAVE_POINTS) if victim == 0 else "mid_file", victim, 1))
        elif kind == "step":
            found.append((draw.choice(faults.STEP_POINTS), victim, draw.randint(1, 2 * EVERY)))
        else:
            when = draw.choice(["while training"] * 3 + ["while starting"])
            found.append((when, victim, draw.randint(1, 2 * EVERY)))
    return found


def chained(folder: Path, kind: str, number: int, steps: int, seed: int) -> tuple[Pair, Pair]:
    """An undisturbed run, and one that is killed `number` times and then left to finish; compared."""
    draw = random.Random(seed)
    write_page(folder, steps, EVERY)
    limit = 60.0 + 3 * steps
    oracle, story = (Pair(folder, f"{kind}-{name}", kind=kind, limit=limit) for name in ("oracle", "killed"))
    assert oracle.run().code == 0, oracle.starts[-1].output
    expected = oracle.ledger()
    for how, victim, count in kills(draw, number):
        before = story.starts[-1].saved if story.starts else 0
        done = story.kill(draw, how, victim, count)
        assert done.code == KILLED, (how, victim, count, done.output)
        assert done.saved >= before, done.output
        lines = story.ledger()
        assert lines == expected[: len(lines)], (how, victim, count)
    assert story.run().code == 0, story.starts[-1].output
    equal, differences = compare(oracle.open(), story.open(), steps)
    assert differences == [] and equal["hashes of parameters"] == steps
    assert [path.name for path in story.path.rglob("*") if ".tmp-" in path.name or path.name == "beats"] == []
    return oracle, story


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "number", "seed"), [("ddp", 4, 2), ("fsdp", 8, 7)])
def test_eight_kills_of_two_ranks(kind: str, number: int, seed: int, tmp_path: Path) -> None:
    oracle, story = chained(tmp_path, kind, number, steps=16, seed=seed)
    assert len(story.starts) == number + 1
    assert story.open().checkpoint is not None
    files = {path.name for path in story.open().checkpoint.iterdir()}  # type: ignore[union-attr]
    assert {"model_00000.safetensors", "model_00001.safetensors"} <= files
    # Replicas hold the same weights at every step; of a model that is cut each rank has its own rows.
    same = [len(set(line["params"])) == 1 for line in oracle.ledger()]
    assert all(same) if kind == "ddp" else not any(same)


@pytest.mark.faults
@pytest.mark.timeout(40000)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_sixty_kills_of_two_ranks(kind: str, tmp_path: Path) -> None:
    number = int(os.environ.get("SSMTRAIN_FAULT_KILLS", 60))
    # A start that is killed gets one step further in the mean, six at most.
    chained(tmp_path, kind, number, steps=2 * number + 20, seed=11)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_thirty_signals_to_one_of_two_ranks(tmp_path: Path) -> None:
    """At any moment of the training: both finish the step, save it and end with 75; nothing is repeated."""
    steps, draw = 200, random.Random(2)
    write_page(tmp_path, steps, every=50)
    oracle, story = (Pair(tmp_path, name, limit=600) for name in ("oracle", "asked"))
    assert oracle.run().code == 0, oracle.starts[-1].output
    for _ in range(30):
        enough = story.has_done(draw.randint(1, 4))
        ranks = story.go()
        while ranks.processes[0].is_alive() and not enough():
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.1))
        begin = time.monotonic()
        ranks.signal(draw.randrange(2), draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))
        done = story.done(ranks, grace=30)
        assert done.output.startswith("[75, 75]") and time.monotonic() - begin < 30, done.output
        assert done.saved == len(story.ledger()) < steps
        assert story.ledger() == oracle.ledger()[: done.saved]
    assert story.run().code == 0, story.starts[-1].output
    assert compare(oracle.open(), story.open(), steps)[1] == []
