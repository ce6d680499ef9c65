"""States carried from row to row in training: kept to the bit, whoever reads which row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from faults import spoil
from ssmtrain.check.compare import compare
from ssmtrain.checkpoint import faults, store
from ssmtrain.checkpoint.runs import open_run
from ssmtrain.cli import main
from ssmtrain.config.errors import UserError
from ssmtrain.data.module import open_data
from ssmtrain.kernels.ssd import ssd
from ssmtrain.layers import mamba2
from ssmtrain.train import warm
from ssmtrain.train.carry import Carry
from ssmtrain.train.module import LitLM
from train.conftest import TEXT, ledger, losses, norms, page, records, same, weights
from train.test_train_ddp import two_forked
from train.test_train_forks import fork
from train.test_train_room import memory_for

Train = Callable[..., tuple[int, Path]]

SMALL: dict[str, Any] = {
    "d_model": 16,
    "layout": "ME",
    "blocks": {
        "M": {"mixer": {"kind": "mamba2", "d_state": 8, "head_dim": 8}},
        "E": {"mixer": {"kind": "mamba1", "d_state": 4}, "ffn": {"kind": "mlp", "hidden": 24}},
    },
}
CARRY: dict[str, Any] = {"model": SMALL, "data__carry_state": True, "trainer__val_every": 0}


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    """Changes for runs that carry states: five steps an epoch, documents of all lengths."""
    files = []
    for number, length in enumerate([50, 7, 180, 31, 96, 1, 64, 33, 140, 20, 75]):
        files.append(tmp_path / f"{number:02}.txt")
        files[-1].write_text((TEXT * 2)[number * 40 :][:length])
    (tmp_path / "val.txt").write_text(TEXT[:200])
    names = [str(file) for file in files]
    return {**CARRY, "data__train": names, "data__val": str(tmp_path / "val.txt"), "trainer__micro_batch": 2}


def test_a_run_resumes_to_the_bit_wherever_it_is_killed(train: Train, short: dict[str, Any]) -> None:
    """Inside an epoch and beyond its end."""
    _, whole = train(name="whole", **short)
    for fault in ("step_end:1:TERM", "after_optimizer:1:TERM"):
        faults.arm(fault)
        code, parts = train(name="parts", **short)
        assert code == 75
    faults.arm()
    torch.rand(3)
    assert train(name="parts", **short)[0] == 0 and ledger(parts) == ledger(whole)
    for stem in ("model", "optim", "rng", "carry"):
        assert same(weights(parts, 8, stem), weights(whole, 8, stem)), stem
    equal, differences = compare(open_run(str(parts)), open_run(str(whole)), 8)
    assert equal["carried states"] == 4 and differences == []
    saved = weights(whole, 8, "carry")
    assert sorted(saved) == ["0/conv", "0/ssm", "1/conv", "1/ssm"]
    assert saved["0/ssm"].shape[0] == 4 and saved["0/ssm"].any()


@pytest.mark.parametrize(
    ("spoil_it", "says"),
    [
        (lambda saved: saved.pop("1/ssm"), "of other blocks, such as '1/ssm'"),
        (lambda saved: saved.update({"0/conv": saved["0/conv"][:3]}), r"0/conv is \(3, .*expected \(4, "),
        (lambda saved: saved["1/conv"].fill_(float("nan")), "NaN or infinity in 1 of 4 tensors"),
    ],
)
def test_states_that_do_not_fit_are_refused(
    spoil_it: Callable[[dict[str, torch.Tensor]], Any],
    says: str,
    train: Train,
    short: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short |= {"trainer__max_steps": 2, "trainer__save_every": 1, "trainer__log_every": 5}
    faults.arm("step_start:1:TERM")
    assert train(**short)[0] == 75
    faults.arm()
    real = store.load_tensors

    def load_tensors(path: Path, stem: str) -> dict[str, torch.Tensor]:
        found = real(path, stem)
        if stem == "carry":
            spoil_it(found)
        return found

    monkeypatch.setattr(store, "load_tensors", load_tensors)
    with pytest.raises(UserError, match=says):
        train(**short)


def test_a_replayed_step_has_the_states_that_it_had(
    train: Train, short: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = train(**short, trainer__recompute="block")
    capsys.readouterr()
    assert main(["replay", f"run={folder}", "step=7", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert verdict["differ"] == [] and verdict["exact"] and verdict["within"] == 0
    _, kept = train(name="kept", **short, trainer__recompute="none")
    assert losses(kept) == losses(folder), "computed again from the same states"
    assert norms(kept) == norms(folder)


def test_the_rows_of_a_step_tell_which_go_on(
    train: Train, short: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = train(**short)
    found = {}
    for step in range(1, 9):
        shown = []
        for words in ([], ["--json"]):
            capsys.readouterr()
            assert main(["data", "show", f"run={folder}", f"step={step}", *words]) == 0
            shown.append(capsys.readouterr().out)
        found[step] = [row["goes_on"] for row in json.loads(shown[1])["rows"]]
        assert shown[0].count("with the states of the row before") == sum(found[step])
    rows = open_data(page(folder.parents[1], **short)).train
    assert found == {step: rows.batch(range(4 * step - 4, 4 * step)).goes_on for step in range(1, 9)}
    assert {True, False} == {one for step in found.values() for one in step} and not any(found[1])


@pytest.fixture
def begun(tmp_path: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[int, bool]:
    """By step of the data, whether its rows began with anything; one document, seven steps an epoch."""
    (tmp_path / "one.txt").write_text(TEXT[:920])
    short |= {"data__train": str(tmp_path / "one.txt"), "trainer__micro_batch": None}
    seen: dict[int, bool] = {}
    real = Carry.begin

    def begin(self: Carry, batch: Any) -> Any:
        states = real(self, batch)
        if torch.is_grad_enabled():
            seen[self.rows // 4] = any(bool(t.any()) for s in states for t in (s or {}).values())
        return states

    monkeypatch.setattr(Carry, "begin", begin)
    monkeypatch.setattr(LitLM, "run_model", LitLM.run_model)
    return seen


def test_a_step_that_is_not_finite_hands_nothing_on(
    train: Train, short: dict[str, Any], begun: dict[int, bool]
) -> None:
    spoil.loss_of_nan(2)
    assert train(**short)[0] == 0
    assert begun == {0: False, 1: True, 2: True, 3: False, 4: True, 5: True, 6: True, 7: False}


def test_a_run_that_goes_back_begins_with_nothing(
    train: Train, tmp_path: Path, short: dict[str, Any], begun: dict[int, bool]
) -> None:
    """From step 4 to the checkpoint of step 2, whose states lead to rows that are not read again."""
    short |= {"trainer__max_steps": 5, "trainer__save_every": 2, "trainer__max_nonfinite": 1}
    short |= {"trainer__spikes": {"action": "rollback"}}
    rows = open_data(page(tmp_path, **short)).train
    spoil.steep_rows(rows.samples([13]).tolist(), float("nan"))
    code, folder = train(name="whole", **short)
    assert code == 0 and [r["to"] for r in records(folder, "rollback")] == ["step-00000002"]
    assert begun == {0: False, 1: True, 2: True, 3: True, 4: False, 5: True, 6: True}
    faults.arm("after_optimizer:3:TERM")  # it is told to stop before it goes back, and stops after it
    code, again = train(name="again", **short)
    assert code == 75
    faults.arm()
    assert train(name="again", **short)[0] == 0 and ledger(again) == ledger(folder)


def test_memory_is_tried_with_the_rows_of_the_step(
    train: Train, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, given = train(name="given", **short)
    memory_for(2, monkeypatch)
    _, found = train(name="found", **{**short, "trainer__micro_batch": "auto"})
    assert ledger(found) == ledger(given)


def test_kernels_are_warmed_up_with_states(
    tmp_path: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []

    def watched(*args: Any, **more: Any) -> Any:
        seen.append((more["initial_state"] is not None, more["return_final_state"]))
        return ssd(*args, **more)

    monkeypatch.setattr(mamba2, "ssd", watched)
    config = page(tmp_path, **short)
    warm.run_blocks(config, 257, warm.batches(open_data(config), 2), torch.device("cpu"))
    assert seen and set(seen) == {(True, True)}


def test_any_number_of_ranks_carries_the_same_states(
    train: Train, tmp_path: Path, short: dict[str, Any]
) -> None:
    """One process, two that hold the model, two that hold parts of it, one: what is saved is every slot's."""
    _, whole = train(name="whole", **short)
    faults.arm("after_optimizer:1:TERM")
    assert train(name="parts", **short)[0] == 75
    faults.arm()
    two = {**short, "name": "parts", "trainer__micro_batch": 1}
    for kind in ("ddp", "fsdp"):
        code, folder, said = two_forked(tmp_path, "1", "after_optimizer:1:TERM", parallel__kind=kind, **two)
        assert code == 75, said
    assert train(name="parts", **short)[0] == 0
    assert [e["samples"] for e in ledger(folder)] == [e["samples"] for e in ledger(whole)]
    assert losses(folder) == pytest.approx(losses(whole), rel=2e-6)
    assert norms(folder) == pytest.approx(norms(whole), rel=1e-5)
    for name, tensor in weights(whole, 8, "carry").items():
        assert tensor.allclose(weights(folder, 8, "carry")[name], rtol=1e-3, atol=1e-4), name


def test_a_fork_keeps_the_states_with_its_place(train: Train, tmp_path: Path, short: dict[str, Any]) -> None:
    """With as many rows a step; with more of them it reads from the beginning."""
    _, parent = train(name="parent", **short, schedule={"kind": "constant", "warmup": 2})
    on, anew = (
        fork(f"from={parent}@step-4", f"name={name}", *words)[1]
        for name, *words in (["on"], ["anew", "trainer.max_steps=5", "trainer.global_batch=256"])
    )
    assert ledger(on) == ledger(parent)[4:]
    assert same(weights(on, 8, "carry"), weights(parent, 8, "carry"))
    assert records(on, "fork")[0]["data"] == "kept"
    assert records(anew, "fork")[0]["data"] == "from its beginning"
    assert weights(anew, 5, "carry")["0/ssm"].shape[0] == 8


def test_what_lies_a_row_back_is_learned(train: Train, tmp_path: Path) -> None:
    """A letter every third token, which many rows begin without: they have it from the row before."""
    drawn = np.random.default_rng(0).integers(0, 8, 1000)
    lines = [("".join(("abcdefgh"[n], "..")) * 11)[:31] for n in drawn]
    (tmp_path / "letters.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    text = {"kind": "text", "train": str(tmp_path / "letters.jsonl"), "cache_dir": str(tmp_path / "cache")}
    changes = {
        "model": {**SMALL, "layout": "M", "blocks": {"M": SMALL["blocks"]["M"]}},
        "trainer__max_steps": 60,
        "trainer__global_batch": 512,
        "trainer__health_every": 0,
        "trainer__save_every": 60,
        "trainer__val_every": 0,
    }
    last = []
    for carry in (False, True):
        data = {**text, "seq_len": 8, "carry_state": carry}
        last.append(np.mean(losses(train(name=f"carry-{carry}", data=data, **changes)[1])[-10:]))
    assert last[1] < 0.75 * last[0]
