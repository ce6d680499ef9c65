"""One process, then several, then one: the same tokens in the same order, whoever computes them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from faults.harness import Story, write_page
from faults.ranks import Pair
from ssmtrain.check.compare import compare
from ssmtrain.checkpoint import store
from ssmtrain.config.load import load
from ssmtrain.data.module import open_data
from ssmtrain.data.tokenizer import load_tokenizer

STEPS = 12


def _expected_rows(page: Path) -> list[list[int]]:
    """The rows of each step, straight from the data."""
    config = load([f"config={page}"])
    rows = open_data(config, load_tokenizer(config.tokenizer)).train
    size = config.trainer.global_batch // config.data.seq_len
    return [rows.batch(range(step * size, (step + 1) * size)).sample_ids for step in range(STEPS)]


@pytest.mark.timeout(900)
def test_any_number_of_ranks_goes_on_with_what_another_saved(tmp_path: Path) -> None:
    """One process, two whole copies, three parts, two groups of two, two of DeepSpeed's, and one."""
    write_page(tmp_path, STEPS, every=100, rows=12)
    alone, story = Pair(tmp_path, "alone", world=1), Pair(tmp_path, "elastic", world=1)
    undisturbed = alone.go(None, "ema.decay=0.5")
    ways = [
        (1, "auto", []),
        (2, "ddp", []),
        (3, "fsdp", ["parallel.unit=1"]),
        (4, "fsdp", ["parallel.replicas=2"]),
        (2, "deepspeed_zero3", []),
    ]
    for i, (world, kind, words) in enumerate(ways):
        story.world, story.kind = world, kind
        done = story.run({world - 1: "step_start:2:TERM"}, "ema.decay=0.5", *words)
        assert done.code == 75 and done.saved == 2 * (i + 1), done.output
        assert i == 0 or f" to {world}" in done.output.split("trainer.devices changes from ")[1][:9]
    story.world = 1
    done = story.run(None, "ema.decay=0.5")
    assert done.code == 0, done.output
    assert alone.done(undisturbed).code == 0, alone.starts[-1].output

    lines, expected = story.ledger(), alone.ledger()
    assert [line["samples"] for line in lines] == _expected_rows(tmp_path / "tiny.yaml")
    for key in ("samples", "tokens"):
        assert [line[key] for line in lines] == [line[key] for line in expected]
    for key in ("loss_hex", "grad_norm_hex"):
        found = [float.fromhex(line[key]) for line in lines]
        assert found == pytest.approx([float.fromhex(line[key]) for line in expected], rel=1e-5)
    averages = [
        store.load_tensors(s.path / "checkpoints" / store.step_name(STEPS), "ema") for s in (alone, story)
    ]
    assert averages[0].keys() == averages[1].keys() != set()
    for name, tensor in averages[0].items():
        assert tensor.allclose(averages[1][name], rtol=1e-2, atol=2e-3), name
    assert [len(line["params"]) for line in lines] == [n for n in (1, 2, 3, 4, 2, 1) for _ in range(2)]


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
