"""Losses that leap: the step is left out, or the run goes back, and a run that is killed does the same."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import spoil
from ssmtrain.checkpoint import faults
from ssmtrain.cli import main
from ssmtrain.config.errors import NonFinite
from ssmtrain.config.trainer import SpikeConfig
from ssmtrain.train import spikes
from ssmtrain.train.callbacks.ledger import digest
from ssmtrain.train.module import LitLM
from ssmtrain.train.state import RunState
from train.conftest import ledger, losses, records

Train = Callable[..., tuple[int, Path]]
STEPS = {"trainer__max_steps": 16, "trainer__micro_batch": 1, "trainer__keep_last": 9, "optim__lr": 0.003}
SKIP = {**STEPS, "trainer__spikes": {"window": 8}}
BACK = {**STEPS, "trainer__spikes": {"window": 8, "action": "rollback"}}


@pytest.fixture
def calm(train: Train, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run without a leap; what a test spoils afterwards is mended after it."""
    monkeypatch.setattr(LitLM, "run_model", LitLM.run_model)
    return train(name="calm", **STEPS)[1]


def spoil_step(calm: Path, *steps: int) -> list[int]:
    """Let the first row that the calm run read in each of these steps be steep; those rows."""
    rows = [ledger(calm)[step - 1]["samples"][0] for step in steps]
    spoil.steep_rows(rows, 100.0)
    return rows


def params(folder: Path) -> list[Any]:
    return [line["params"] for line in ledger(folder)]


def test_what_is_a_leap() -> None:
    """Six deviations above the mean of the window, of the loss or of the gradient's norm, and not below."""
    page, state = SpikeConfig(window=8), RunState()
    values = [2.0, 2.2, 1.8, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0, 2.2]
    for i, value in enumerate(values):
        assert spikes.leap(page, state, 1e9 if i < 4 else value, 1.0) is None, "too few to say"
        spikes.note(page, state, value, value / 2)
    recent = values[-8:]
    mean = sum(recent) / 8
    deviation = math.sqrt(sum((v - mean) ** 2 for v in recent) / 7)
    edge = mean + 6 * deviation
    assert state.recent_losses == recent and spikes.leap(page, state, edge - 1e-9, 1.0) is None
    assert "the loss of" in str(spikes.leap(page, state, edge + 1e-9, 1.0))
    assert "the gradient of" in str(spikes.leap(page, state, 2.0, edge / 2 + 1e-9))
    assert spikes.leap(page, state, -1e9, 0.0) is None and spikes.leap(None, state, 1e9, 1e9) is None


def test_without_the_option_it_is_trained_on(train: Train, calm: Path) -> None:
    spoil_step(calm, 11)
    code, folder = train(name="open", **STEPS)
    assert code == 0 and losses(folder)[10] > 20 and params(folder)[10] != params(folder)[9]


def test_a_leap_is_left_out(train: Train, calm: Path) -> None:
    spoil_step(calm, 11)
    code, folder = train(name="whole", **SKIP)
    assert code == 0 and losses(folder)[:10] == losses(calm)[:10] and losses(folder)[10] > 20
    assert [a == b for a, b in zip(params(folder)[1:], params(folder)[:-1], strict=True)].index(True) == 9
    (record,) = records(folder, "spike")
    assert record["step"] == 11 and "standard deviations above" in record["why"]
    assert json.loads((folder / "report.json").read_text())["spikes"] == 1
    # Killed after it, the window is what it was.
    faults.arm("step_end:13:TERM")
    code, again = train(name="again", **SKIP)
    assert code == 75
    faults.arm()
    assert train(name="again", **SKIP)[0] == 0
    assert ledger(again) == ledger(folder)


def test_too_many_leaps_end_the_run(train: Train, calm: Path) -> None:
    spoil_step(calm, 11, 12, 13)
    with pytest.raises(NonFinite, match="3 steps in a row were left out, up to step 13"):
        train(name="steep", **SKIP)


def test_the_run_goes_back_and_leaves_the_rows_out(
    train: Train, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 11 to the checkpoint of step 8, whose weights are there again to the bit."""
    bad = spoil_step(calm, 11)
    found: list[str] = []
    real = spikes._put_back

    def put_back(lit: LitLM, checkpoint: Path) -> RunState:
        state = real(lit, checkpoint)
        found.append(digest({**lit.model.state_dict(), **dict(lit.model.named_parameters())}))
        return state

    monkeypatch.setattr(spikes, "_put_back", put_back)
    code, folder = train(name="whole", ema__decay=0.5, **BACK)
    lines, calm_lines = ledger(folder), ledger(calm)
    assert code == 0 and [line["step"] for line in lines] == list(range(1, 17))
    assert [found] == [lines[7]["params"]]
    assert losses(folder)[:8] == losses(calm)[:8]
    # Rows of steps 9 to 11 are left out; those of step 12 come next.
    assert [e["samples"] for e in lines[8:13]] == [e["samples"] for e in calm_lines[11:16]]
    assert not any(set(bad) & set(line["samples"]) for line in lines)
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in calm_lines]
    (record,) = records(folder, "rollback")
    assert (record["step"], record["after"], record["rows_left_out"]) == (9, 11, 12)
    assert [r["step"] for r in records(folder, "train")] == [1, 2, 4, 6, 8, 10, 12, 14, 16]
    goodput = json.loads((folder / "goodput.json").read_text())
    assert goodput["attempts"] == 1 and goodput["lost_steps"] > 0
    # Killed before the next save, it goes back once more and does the same.
    for count in (12, 14):
        monkeypatch.undo()
        monkeypatch.setenv("SSMTRAIN_LEDGER", "1")
        spoil.steep_rows(bad, 100.0)
        faults.arm(f"step_end:{count}:TERM")
        code, again = train(name=f"killed-{count}", ema__decay=0.5, **BACK)
        assert code == 75
        faults.arm()
        assert train(name=f"killed-{count}", ema__decay=0.5, **BACK)[0] == 0
        assert ledger(again) == lines


def test_going_back_without_end_is_no_use(train: Train, calm: Path) -> None:
    """Each time another row is steep; the fourth ends the run."""
    spoil_step(calm, 11, 13, 15, 16)
    with pytest.raises(NonFinite, match="3 times, and no step was saved since"):
        train(name="steep", **{**BACK, "trainer__save_every": 8})


def test_a_leap_before_the_first_checkpoint_is_left_out(train: Train, calm: Path) -> None:
    spoil_step(calm, 11)
    code, folder = train(name="unsaved", **{**BACK, "trainer__save_every": 100})
    assert code == 0 and len(records(folder, "spike")) == 1 and not records(folder, "rollback")


def test_steps_that_are_not_finite_turn_the_run_back(train: Train, calm: Path) -> None:
    rows = [ledger(calm)[step - 1]["samples"][0] for step in (10, 11, 12)]
    spoil.steep_rows(rows, math.inf)
    code, folder = train(name="infinite", logger={"kind": "tensorboard"}, **{**BACK, "trainer__log_every": 1})
    assert code == 0 and len(ledger(folder)) == 16
    (record,) = records(folder, "rollback")
    assert (record["after"], record["step"]) == (12, 9) and "not finite in 3 steps" in record["why"]
    # TensorBoard shows the steps that were taken again once, as they are in metrics.jsonl.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    tokens = [(event.step, event.value) for event in shown.Scalars("train/tokens")]
    assert tokens == [(one["step"], one["tokens"]) for one in records(folder, "train")]
    assert len(list((folder / "tensorboard").iterdir())) == 2


def test_a_run_that_went_back_is_replayed_with_the_rows_that_it_kept(
    train: Train, calm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps after the checkpoint read later rows than they would have: data show and replay know."""
    spoil_step(calm, 10)
    code, folder = train(name="back", **BACK)
    assert code == 0 and records(folder, "rollback")
    capsys.readouterr()
    assert main(["data", "show", f"run={folder}", "step=10", "--json"]) == 0
    rows = [row["row"] for row in json.loads(capsys.readouterr().out)["rows"]]
    assert rows == ledger(folder)[9]["samples"] != ledger(calm)[9]["samples"]
    assert main(["replay", f"run={folder}", "step=10", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert verdict["differ"] == [] and verdict["steps"] == [9, 10]
    # Also before a later checkpoint says so, and in what --find finds.
    for step in (12, 16):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    assert main(["data", "show", f"run={folder}", "step=11", "--json"]) == 0
    rows = [row["row"] for row in json.loads(capsys.readouterr().out)["rows"]]
    assert rows == ledger(folder)[10]["samples"]
    assert main(["data", "show", f"run={folder}", "--find", "text.txt", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["steps"]
    assert [hit["row"] for hit in hits] == [row for line in ledger(folder) for row in line["samples"]]
