"""One process, then two, then one: the same tokens in the same order, whoever computes them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from faults.harness import Story, write_page
from ssmtrain.check.compare import compare
from ssmtrain.config.load import load
from ssmtrain.data.module import open_data
from ssmtrain.data.tokenizer import load_tokenizer

STEPS = 9


def _expected_rows(page: Path) -> list[list[int]]:
    """The rows of each step, straight from the data."""
    config = load([f"config={page}"])
    rows = open_data(config, load_tokenizer(config.tokenizer)).train
    size = config.trainer.global_batch // config.data.seq_len
    return [rows.batch(range(step * size, (step + 1) * size)).sample_ids for step in range(STEPS)]


@pytest.mark.timeout(900)
def test_one_process_then_two_then_one(tmp_path: Path) -> None:
    write_page(tmp_path, STEPS, every=100)
    alone, story = Story(tmp_path, "alone"), Story(tmp_path, "elastic")
    undisturbed = alone.begin()
    assert story.start("step_start:3:TERM").code == 75, story.starts[-1].output
    done = story.start("step_start:3:TERM", "trainer.devices=2")
    assert done.code == 75 and done.saved == 6, done.output
    assert "trainer.devices changes from None to 2" in done.output
    done = story.start()
    assert done.code == 0, done.output
    assert alone.end(undisturbed).code == 0, alone.starts[-1].output

    lines, expected = story.ledger(), alone.ledger()
    assert [line["samples"] for line in lines] == _expected_rows(tmp_path / "tiny.yaml")
    assert [line["samples"] for line in lines] == [line["samples"] for line in expected]
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in expected]
    losses = [float.fromhex(line["loss_hex"]) for line in lines]
    assert losses == pytest.approx([float.fromhex(line["loss_hex"]) for line in expected], rel=1e-5)
    assert losses[:3] == [float.fromhex(line["loss_hex"]) for line in expected[:3]]


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_two_processes_killed_again_and_again(tmp_path: Path) -> None:
    """On two processes all along, the bits are those of two undisturbed processes."""
    steps, two = 20, "trainer.devices=2"
    write_page(tmp_path, steps, every=3)
    alone, story = Story(tmp_path, "alone"), Story(tmp_path, "killed")
    assert alone.start("", two).code == 0, alone.starts[-1].output
    for fault in ("mid_file:1", "after_optimizer:5", "before_rename:2", "mid_prune:2", "after_rename:1"):
        assert story.start(fault, two).code == -signal.SIGKILL, story.starts[-1].output
    done = story.start_and_signal(signal.SIGKILL, story.has_done(2), two)
    assert done.code == -signal.SIGKILL and done.saved < steps
    done = story.start("", two)
    assert done.code == 0, done.output
    assert compare(alone.open(), story.open(), steps)[1] == []
