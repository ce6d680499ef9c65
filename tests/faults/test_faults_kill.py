"""A run that is killed again and again is, to the last bit, the run that was never disturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from faults.harness import Story, write_page
from faults.ranks import Pair
from ssmtrain.check.compare import compare
from ssmtrain.checkpoint import faults, store

KILLED = -signal.SIGKILL


def _undisturbed(folder: Path, steps: int, every: int) -> Story:
    write_page(folder, steps, every)
    reference = Story(folder, "undisturbed")
    done = reference.start()
    assert done.code == 0, done.output
    assert len(reference.ledger()) == steps
    return reference


def _so_far(story: Story, reference: Story) -> None:
    """Whatever has been done, also what a kill has made to be done again, is the reference's."""
    lines = story.ledger()
    assert lines == reference.ledger()[: len(lines)]


def _is_the_same(story: Story, reference: Story, steps: int) -> None:
    equal, differences = compare(reference.open(), story.open(), steps)
    assert differences == []
    assert equal["losses"] == equal["batches of rows"] == steps and equal["tensors of parameters"] > 30
    left = [path.name for path in story.path.rglob("*") if ".tmp-" in path.name]
    assert left == []


@pytest.mark.timeout(900)
def test_six_kills_two_signals_and_a_damaged_checkpoint(tmp_path: Path) -> None:
    steps = 40
    reference = _undisturbed(tmp_path, steps, every=3)
    story = Pair(tmp_path, "disturbed", world=1)
    # A point inside the save of a step; the newest good checkpoint afterwards.
    for fault, saved in [
        ("mid_file:2", 0),  # the optimiser's shard of the very first save
        ("after_manifest:2", 3),  # the second save, whole but unpublished
        ("mid_prune:1", 9),  # the third is published, the first half deleted
        ("before_optimizer:2", 9),
        ("after_rename:1", 12),
    ]:
        done = story.start(fault)
        assert (done.code, done.saved) == (KILLED, saved), done.output
        _so_far(story, reference)
    assert "continuing run disturbed from step 9" in story.starts[-1].output

    done = story.start_and_signal(signal.SIGKILL, story.has_done(4))
    assert done.code == KILLED and 15 <= done.saved < steps, done.output
    _so_far(story, reference)

    for number in (signal.SIGTERM, signal.SIGINT):
        done = story.start_and_signal(number, story.has_done(2))
        assert done.code == 75, done.output
        assert f"{number.name}: finishing this step, then saving" in done.output
        assert f"saved at step {done.saved}; continue with: " in done.output
        assert "ssmtrain fit config=" in done.output
        assert done.saved == len(story.ledger()) < steps
        _so_far(story, reference)

    newest = store.checkpoints(story.path / "checkpoints")[-1]
    damaged = newest / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 4
    damaged.write_bytes(data)
    done = story.start()
    assert done.code == 0, done.output
    assert f"{newest.name} is damaged: model.safetensors has sha256" in done.output
    assert f"continuing run disturbed from step {store.step_of(newest)}" not in done.output
    _is_the_same(story, reference, steps)


@pytest.mark.faults
@pytest.mark.timeout(40000)
def test_fifty_kills(tmp_path: Path) -> None:
    """Or as many as SSMTRAIN_FAULT_KILLS says."""
    number = int(os.environ.get("SSMTRAIN_FAULT_KILLS", 50))
    steps = 12 * number
    reference = _undisturbed(tmp_path, steps, every=5)
    story = Story(tmp_path, "disturbed")
    draw = random.Random(7)
    kills: list[str] = []
    while len(kills) < number:  # in fifty: 27 in saves, 10 in steps, 13 at moments
        kills += [f"{name}:{draw.randint(1, 2)}" for name in faults.SAVE_POINTS * 3]
        kills += [f"{name}:{draw.randint(1, 9)}" for name in faults.STEP_POINTS * 2]
        kills += ["while starting"] * 4 + ["while training"] * 9
    draw.shuffle(kills)
    del kills[number:]
    for kill in kills:
        if kill == "while starting":
            end = time.monotonic() + draw.uniform(0.2, 5)
            done = story.start_and_signal(signal.SIGKILL, lambda end=end: time.monotonic() > end)
        elif kill == "while training":
            done = story.start_and_signal(signal.SIGKILL, story.has_done(draw.randint(1, 9)))
        else:
            done = story.start(kill)
        assert done.code == KILLED, done.output
        _so_far(story, reference)
    assert story.start().code == 0, story.starts[-1].output
    assert len(story.starts) == number + 1
    _is_the_same(story, reference, steps)
