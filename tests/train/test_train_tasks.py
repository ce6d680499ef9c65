"""Tasks in training: learned, scored, resumed to the bit; checks beside a run change none of its bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmtrain.checkpoint import faults
from ssmtrain.checkpoint.records import read_config
from ssmtrain.cli import main
from ssmtrain.config.errors import UserError
from ssmtrain.config.request import Request
from ssmtrain.data.mixture import Mixture
from ssmtrain.data.module import open_data
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


def stopped_after(step: int, train: Train, task: dict[str, Any], whole: Path) -> Path:
    """The folder of a run that was stopped after a step and went on, to the bits of the unbroken run."""
    faults.arm(f"step_end:{step}:TERM")
    assert train(name="parts", **task)[0] == 75
    faults.arm()
    torch.rand(3)
    code, parts = train(name="parts", **task)
    assert code == 0 and ledger(parts) == ledger(whole)
    for stem in ("model", "optim", "rng"):
        assert same(weights(parts, 8, stem), weights(whole, 8, stem)), stem
    return parts


def test_a_run_on_a_task_resumes_to_the_bit_with_its_checks(train: Train) -> None:
    task = {**TASK, "data": {**TASK["data"], "train_rows": 10}, "checks": {"more": {**RECALL, "every": 2}}}
    _, whole = train(name="whole", **task)
    parts = stopped_after(4, train, task, whole)
    for kind in ("val", "check"):
        assert records(parts, kind) == records(whole, kind)


def test_several_tasks_in_one_run_are_scored_each_and_resume_to_the_bit(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """One in epochs, one whose rows never come twice; the weights change half-way."""
    sources = {
        "recall": {**without(RECALL, "seq_len"), "train_rows": 9, "val_rows": 16, "val_lengths": [12]},
        "again": {"kind": "copy", "vocab_size": 6, "weight": 3, "val_rows": 24},
    }
    phases = [{"from_step": 4, "weights": {"recall": 3, "again": 1}}]
    task = {
        **TASK, "data": {"kind": "mix", "seq_len": 8, "sources": sources, "phases": phases},
        "trainer__global_batch": 64,
    }  # fmt: skip
    code, whole = train(name="whole", **task)
    assert code == 0
    mixture = open_data(read_config(whole)).train
    rows = [row for line in ledger(whole) for row in line["samples"]]
    assert rows == mixture.names(mixture.samples(range(64)).tolist())
    recall, again = ([int(r.split(":")[1]) for r in rows if r.startswith(n)] for n in ("recall", "again"))
    assert (len(recall), len(again)) == (32, 32) and again == list(range(32))
    assert all(sorted(recall[i : i + 9]) == list(range(9)) for i in (0, 9, 18)) and recall[:9] != recall[9:18]
    report, last = json.loads((whole / "report.json").read_text()), records(whole, "val")[-1]
    sets = [last["recall"], last["again"]]
    labels = [one["labels"] for one in sets]
    assert labels[0] == 32 and last["labels"] == sum(labels) and last["lengths"].keys() == {"recall/12"}
    right = sum(one["accuracy"] * n for one, n in zip(sets, labels, strict=True))
    assert report["val_accuracy"] == last["accuracy"] == pytest.approx(right / sum(labels))
    assert last["row_accuracy"] == pytest.approx(
        sum(s["row_accuracy"] * n for s, n in zip(sets, (16, 24))) / 40
    )
    assert report["val_bpb"] is None and report["val_sets"]["again"] == last["again"]
    shown = capsys.readouterr().out
    for words in (
        "% right",
        "rows of recall/12: loss",
        "             again: loss",
        "recall: ",
        "again: loss",
    ):
        assert words in shown
    for split in ("val", "train"):
        assert command(Request("eval", None, str(whole), [], {"json": True, "split": split})) == 0
        scored = json.loads(capsys.readouterr().out)
        assert scored["sets"].keys() == sources.keys() and scored["sets"]["recall"]["labels"] == (
            32 if split == "val" else 18
        )
        if split == "val":
            assert scored["sets"]["again"]["accuracy"] == last["again"]["accuracy"]
            assert scored["lengths"].keys() == {"recall/12"}
    assert command(Request("eval", None, str(whole), [], {})) == 0
    assert "\nagain: " in capsys.readouterr().out

    parts = stopped_after(3, train, task, whole)
    assert records(parts, "val") == records(whole, "val")
    capsys.readouterr()
    assert main(["replay", f"run={whole}", "step=6"]) == 0
    page = capsys.readouterr().out
    assert "equal to the bit" in page and " of recall, mqar with seed " in page and "  asked       " in page
    assert main(["data", "show", f"run={whole}", "source=recall", "--find", "4", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["steps"]
    at = [i for i, row in enumerate(rows) if row == "recall:4"]
    assert [(hit["step"], hit["index"]) for hit in hits] == [(i // 8 + 1, i % 8) for i in at] and len(at) > 2


def without(page: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in page.items() if name != key}


def test_a_tasks_rows_hang_on_its_name_and_the_seed_alone(tmp_path: Path) -> None:
    """Another source beside it, or another weight, changes neither its rows nor their order."""
    source = {**without(RECALL, "seq_len"), "train_rows": 30}

    def opened(sources: dict[str, Any], seed: int = 0) -> Mixture:
        task = {**TASK, "data": {"kind": "mix", "seq_len": 8, "sources": sources}, "seed": seed}
        found = open_data(page(tmp_path, **task)).train
        assert isinstance(found, Mixture)
        return found

    alone, other = opened({"a": source}), opened({"b": source, "a": {**source, "weight": 9}})
    assert isinstance(alone.sources["a"], TaskRows) and isinstance(other.sources["a"], TaskRows)
    one, two = (mix.sources["a"].batch(range(40)) for mix in (alone, other))
    assert one.inputs.equal(two.inputs) and one.sample_ids == two.sample_ids
    assert not one.inputs.equal(other.sources["b"].batch(range(40)).inputs)
    assert not one.inputs.equal(opened({"a": source}, seed=1).sources["a"].batch(range(40)).inputs)
    far = 10**15
    assert other.batch([far]).inputs.equal(other.batch([far, far + 1]).inputs[:1])


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
    from ssmtrain.train.warm import batches

    (batch,) = batches(open_data(page(tmp_path, **TASK)), 4)
    assert batch.inputs.shape == (4, 8) and batch.doc_ids is None
