"""replay: a step once more, to the bit, and what its loss and gradient are made of."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmtrain.checkpoint.records import read_config
from ssmtrain.checkpoint.runs import resolve
from ssmtrain.cli import main
from ssmtrain.explain.insight import Insight
from ssmtrain.explain.replay import Verdict, last_step
from ssmtrain.train import replay as replays
from ssmtrain.train.fit import fit
from ssmtrain.train.forks import load_from
from ssmtrain.train.module import LitLM
from train.conftest import ledger
from train.conftest import parent as parent
from train.conftest import trained as trained

Capture = pytest.CaptureFixture[str]


def replayed(capsys: Capture, *line: str) -> dict[str, Any]:
    assert main(["replay", *line, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def content(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file of a run: what is in it, and when it was last written."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_step_between_records_is_proved_by_the_next(spiky: Path, capsys: Capture) -> None:
    """No ledger, a record every third step: step 11 is equal because the window that ends at 12 is."""
    before = content(spiky)
    found = replayed(capsys, f"run={spiky}", "step=11")
    assert found["verdict"]["differ"] == [] and found["verdict"]["exact"]
    assert (found["verdict"]["steps"], found["verdict"]["equal"]) == ([9, 12], 4)
    assert content(spiky) == before
    rows = found["rows"]
    labels = sum(row["labels"] for row in rows)
    assert sum(row["loss"] * row["labels"] for row in rows) / labels == pytest.approx(
        found["taken"]["loss"], rel=1e-5
    )
    norm = found["taken"]["grad_norm"]
    assert math.hypot(*found["kinds"].values()) == pytest.approx(norm, rel=1e-5)
    assert math.hypot(*found["parts"].values()) == pytest.approx(norm, rel=1e-5)
    assert norm <= sum(row["grad_norm"] for row in rows) * (1 + 1e-5)
    assert [row["row"] for row in rows] == found["taken"]["samples"]
    assert set(found["activations"]) == {"block 0 (M) mixer", "block 1 (A) mixer", "block 1 (A) ffn"}


def test_the_spike_is_the_row_of_the_other_text(spiky: Path, capsys: Capture) -> None:
    assert main(["data", "show", f"run={spiky}", "--find", "3.txt", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["steps"]
    hit = next(hit for hit in hits if hit["step"] > 14)
    assert main(["replay", f"run={spiky}", f"step={hit['step']}"]) == 0
    told = capsys.readouterr().out
    assert "equal to the bit to what the run recorded" in told
    worst = next(line for line in told.splitlines() if line.startswith("row "))
    assert (
        worst.startswith(f"row {hit['index']} (row {hit['row']:,} of the split)")
        and "/3.txt" in told
        and "\x1b" not in told
    )


def test_every_step_of_a_ledger_is_equal(trained: Path, capsys: Capture) -> None:
    """With a ledger each step is compared, rows too; @step names the checkpoint to begin from."""
    found = replayed(capsys, f"run={trained}", "step=8")
    assert (found["verdict"]["steps"], found["verdict"]["equal"], found["verdict"]["differ"]) == (
        [7, 8],
        4,
        [],
    )
    found = replayed(capsys, f"run={trained}@step-2", "step=8")
    assert found["verdict"]["steps"] == [3, 4, 5, 6, 7, 8] and found["verdict"]["differ"] == []


def test_another_loss_is_told(trained: Path, tmp_path: Path, capsys: Capture, monkeypatch: Any) -> None:
    """A record that is off by its last bit, and weights that are not those of the run."""
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    lines = [json.loads(line) for line in (copy / "ledger.jsonl").read_text().splitlines()]
    value = float.fromhex(lines[7]["loss_hex"])
    lines[7]["loss_hex"] = math.nextafter(value, 9).hex()
    (copy / "ledger.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["replay", f"run={copy}", "step=8"]) == 0
    told = capsys.readouterr().out
    assert f"DIFFERS from what the run recorded: loss of step 8: {math.nextafter(value, 9)!r} then" in told
    lines[7]["samples"] = lines[7]["samples"][::-1]
    lines[7]["loss_hex"] = value.hex()
    (copy / "ledger.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert replayed(capsys, f"run={copy}", "step=8")["verdict"]["differ"][0].startswith("rows of step 8")
    real = LitLM.on_fit_start

    def spoiled(self: LitLM) -> None:
        real(self)
        with torch.no_grad():
            self.model.input.weight[0, 0] += 1e-3

    monkeypatch.setattr(LitLM, "on_fit_start", spoiled)
    assert replayed(capsys, f"run={trained}", "step=8")["verdict"]["differ"]


def test_steps_of_two_ranks_are_held_to_a_tolerance(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    lines = [json.loads(line) for line in (copy / "ledger.jsonl").read_text().splitlines()]
    for line in lines:
        line["params"] *= 2
        line["loss_hex"] = (float.fromhex(line["loss_hex"]) * (1 + 1e-6)).hex()
    (copy / "ledger.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = replayed(capsys, f"run={copy}", "step=8")["verdict"]
    assert not found["exact"] and found["within"] >= 2 and found["differ"] == []
    assert main(["replay", f"run={copy}", "step=8"]) == 0
    assert "equal within 1e-04" in capsys.readouterr().out
    config = replays.alone(read_config(copy), 2)
    assert config.trainer.micro_batch == 2 and config.trainer.devices == 1


def test_what_is_not_finite_ends_the_replay_with_its_place(
    trained: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Insight.look

    def look(self: Insight, lit: LitLM) -> None:
        with torch.no_grad():
            lit.model.head.norm.weight[0] = math.nan
            next(p for p in lit.model.parameters() if p.grad is not None).grad[0] = math.nan  # type: ignore[index]
        real(self, lit)

    monkeypatch.setattr(Insight, "look", look)
    found = replayed(capsys, f"run={trained}", "trainer.max_nonfinite=1", "step=8")
    assert found["taken"] is None and "not finite in 1 steps" in found["nonfinite"][0]
    assert all(row["loss"] is None for row in found["rows"]) and len(found["worst"]) == 3


def test_where_the_replay_ends_and_what_it_counts() -> None:
    assert last_step(5, {3, 6, 9}, set()) == 6 and last_step(6, {3, 6}, set()) == 6
    assert last_step(5, {6}, {5}) == 5 and last_step(7, {3}, set()) == 7
    verdict = Verdict(exact=True, tolerance=1e-4)
    assert verdict.said(1)[0].startswith("the run wrote no figures")
    verdict.compare(1, "loss", None, math.nan)
    verdict.compare(1, "loss", 1.0, 1.0)
    assert verdict.equal == 2 and not verdict.differ
    verdict.compare(1, "loss", None, 2.0)
    verdict.compare(1, "loss", 2.0, math.inf)
    assert len(verdict.differ) == 2


def test_what_cannot_be_replayed(trained: Path, capsys: Capture) -> None:
    for line, said in [
        ("step=9", "ends at step 8"),
        ("step=x", "expected a step"),
    ]:
        assert main(["replay", f"run={trained}", line]) == 2
        assert said in capsys.readouterr().err
    assert main(["replay", f"run={trained}@step-8", "step=8"]) == 2
    assert "no such checkpoint before step 8" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["the same", "another"])
def test_a_fork_is_replayed_from_where_it_began(text: str, parent: Path, capsys: Capture) -> None:
    """Its first step comes after another run's checkpoint; on another text its rows begin at the first."""
    words = [f"runs_dir={parent.parent}", "name=twin", "trainer.save_every=6"]
    if text == "another":
        (parent.parent / "other.txt").write_text("quite another text than that of the parent\n" * 90)
        words.append(f"data.train={parent.parent / 'other.txt'}")
    config = load_from({"from": f"{parent}@step-4"}, words)
    run = resolve(config)
    try:
        assert fit(config, run) == 0
    finally:
        run.close()
    capsys.readouterr()
    assert main(["data", "show", f"run={run.folder}", "step=6", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["row"] for row in rows] == ledger(run.folder)[1]["samples"]
    found = replayed(capsys, f"run={run.folder}", "step=6")
    assert (found["verdict"]["steps"], found["verdict"]["differ"]) == ([5, 6], [])
    assert main(["data", "show", f"run={run.folder}", "step=4"]) == 2
    assert f"earlier steps are those of run={parent}" in capsys.readouterr().err


def test_a_checkpoint_may_be_named_by_its_folder(trained: Path, capsys: Capture) -> None:
    found = replayed(capsys, f"run={trained}/checkpoints/step-00000004", "step=6")
    assert found["verdict"]["steps"] == [5, 6] and found["run"] == str(trained)
    assert main(["replay", f"run={trained}/text.yaml", "step=6"]) == 2
