"""Tasks in training: learned, scored, resumed to the bit; checks beside a run change none of its bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmtrain.checkpoint import faults
from ssmtrain.config.errors import UserError
from ssmtrain.config.request import Request
from ssmtrain.data.tasks import TaskRows
from ssmtrain.eval.command import command
from train.conftest import ledger, page, records, same, weights

Train = Callable[..., tuple[int, Path]]

RECALL: dict[str, Any] = {"kind": "mqar", "seq_len": 8, "vocab_size": 8, "n_pairs": 2}
TASK: dict[str, Any] = {
    "data": {**RECALL, "train_rows": None, "val_rows": 64},
    "tokenizer": {"kind": "ids"},
    "optim__lr": 0.02,
    "trainer__health_every": 0,
}


def test_a_tiny_hybrid_learns_a_task(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"kind": "induction", "seq_len": 8, "vocab_size": 8, "val_rows": 128, "val_lengths": [16]}
    changes = {"trainer__max_steps": 60, "trainer__global_batch": 512, "trainer__val_every": 20}
    code, folder = train(
        **{**TASK, "data": data, "optim__lr": 0.01}, **changes, trainer__save_every=60, trainer__log_every=60
    )
    assert code == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["val_accuracy"] == report["val_row_accuracy"] > 0.95
    assert report["val_bpb"] is None and report["yardsticks"] == {}
    early, late = records(folder, "val")[0], records(folder, "val")[-1]
    assert early["accuracy"] < late["accuracy"] == report["val_accuracy"]
    assert late["lengths"]["16"]["accuracy"] > 0.3 and late["labels"] == 128
    assert "bpb" not in late and "bpb" not in records(folder, "train")[0]
    shown = capsys.readouterr().out
    for words in ("% right", "rows of 16:", "answers right in the first row", "nats an answer, training"):
        assert words in shown

    assert command(Request("eval", None, str(folder), [], {"json": True})) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["accuracy"] == report["val_accuracy"] and scored["labels"] == 128
    assert scored["lengths"]["16"]["accuracy"] == late["lengths"]["16"]["accuracy"]
    assert "bits_per_byte" not in scored
    assert command(Request("eval", None, str(folder), [], {"split": "train"})) == 0
    assert "128 answers in 128 rows of 8 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="can read no text"):
        command(Request("eval", None, str(folder), [], {"file": "x.txt"}))


def test_checks_change_no_bit_of_a_run(train: Train, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("it is a truth universally acknowledged " * 3)
    checks = {
        "recall": {**RECALL, "every": 2, "rows": 16},
        "notes": {"kind": "file", "path": str(tmp_path / "notes.txt"), "every": 3, "seq_len": 16},
    }
    _, plain = train(name="plain")
    code, busy = train(name="busy", checks=checks)
    assert code == 0
    assert ledger(busy) == ledger(plain)
    for stem in ("model", "optim", "rng"):
        assert same(weights(busy, 8, stem), weights(plain, 8, stem)), stem
    found = records(busy, "check")
    names = [(r["step"], sorted(r.keys() & checks.keys())) for r in found]
    both = ["notes", "recall"]
    assert names == [(2, ["recall"]), (3, ["notes"]), (4, ["recall"]), (6, both), (8, both)]
    assert found[0]["recall"]["labels"] == 32 and 0 <= found[0]["recall"]["accuracy"] <= 1
    notes = found[1]["notes"]
    assert notes["bpb"] == pytest.approx(notes["loss"] / 0.6931472 * 118 / 117)
    assert json.loads((busy / "report.json").read_text())["checks"] == {n: found[-1][n] for n in both}


def test_a_run_on_a_task_resumes_to_the_bit_with_its_checks(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {**TASK, "data": {**TASK["data"], "train_rows": 10}, "checks": {"more": {**RECALL, "every": 2}}}
    _, whole = train(name="whole", **task)
    faults.arm("step_end:4:TERM")
    assert train(name="parts", **task)[0] == 75
    faults.arm()
    torch.rand(3)
    code, parts = train(name="parts", **task)
    assert code == 0 and ledger(parts) == ledger(whole)
    for stem in ("model", "optim", "rng"):
        assert same(weights(parts, 8, stem), weights(whole, 8, stem)), stem
    for kind in ("val", "check"):
        assert records(parts, kind) == records(whole, kind)


def test_a_run_refuses_to_continue_on_another_task(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    faults.arm("step_end:3:TERM")
    assert train(**TASK)[0] == 75
    faults.arm()
    with pytest.raises(UserError, match="power"):
        train(**{**TASK, "data": {**TASK["data"], "power": 0.5}})


def test_a_check_whose_file_is_no_text_says_so(train: Train, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"checks\.notes\.path=.*not UTF-8"):
        train(checks={"notes": {"kind": "file", "path": str(tmp_path / "notes.txt")}})


def test_the_rows_of_a_check_are_apart_from_those_of_the_run(tmp_path: Path) -> None:
    from ssmtrain.data.module import open_data
    from ssmtrain.data.tasks.source import check_rows

    config = page(tmp_path, **TASK, checks={"same": {**RECALL, "vocab_size": 64}})
    config = config.model_copy(update={"data": config.data.model_copy(update={"vocab_size": 64})})
    check = config.checks["same"]
    assert check.kind == "mqar"
    data = open_data(config)
    for rows in (data.train, data.val):
        assert isinstance(rows, TaskRows)
        assert not rows.batch(range(8)).inputs.equal(check_rows(check).batch(range(8)).inputs)


def test_kernels_are_warmed_up_on_the_rows_of_a_task(tmp_path: Path) -> None:
    from ssmtrain.data.module import open_data
    from ssmtrain.train.warm import batches

    (batch,) = batches(open_data(page(tmp_path, **TASK)), 4)
    assert batch.inputs.shape == (4, 8) and batch.doc_ids is None
