"""A power cut after any operation of a save leaves a good checkpoint, and never loses a completed one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from checkpoint.crash_model import Op, crashes, record
from ssmtrain.checkpoint import durable, store

STEPS = (1, 2, 3)


def _tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((4,), float(step))}, "rng": {"cpu": torch.tensor([step])}}


def _history(folder: Path, keep: int) -> list[Op]:
    folder.mkdir()

    def work(ops: list[Op]) -> None:
        for step in STEPS:
            store.save(folder / "checkpoints", step, _tensors(step), {"step": step})
            ops.append(("mark", str(step)))
            store.prune(folder / "checkpoints", keep)

    return record(folder, work)


def _losses(ops: list[Op], scratch: Path) -> list[str]:
    """What a crash would break, in words; stops at the first moment at which one breaks something."""
    found = []
    marks = [int(op[1]) if op[0] == "mark" else 0 for op in ops]
    states = 0
    for done, disk in crashes(ops, scratch, lambda name: ".tmp-" in name):
        states += 1
        if found:
            return found
        completed = max(marks[:done], default=0)
        newest = store.newest_good(disk / "checkpoints", lambda line: None)
        step = store.step_of(newest) if newest else 0
        if step < completed:
            found.append(f"after {done} operations step {completed} was complete, found {step}")
        if newest:
            loaded = store.load_tensors(newest, "model")["w"]
            expected = _tensors(step)["model"]["w"]
            if not torch.equal(loaded, expected) or store.load_state(newest)["step"] != step:
                found.append(f"after {done} operations step {step} holds something else")
    assert states > len(ops)
    return found


@pytest.mark.parametrize("keep", [1, 2])
def test_every_crash_state_has_the_last_complete_checkpoint(tmp_path: Path, keep: int) -> None:
    ops = _history(tmp_path / "run", keep)
    assert _losses(ops, tmp_path / "disk") == []


def test_a_killed_process_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    """Without a power cut everything done is there: each prefix of the record, and what it leaves behind."""
    ops = _history(tmp_path / "run", keep=2)
    synced = [entry for op in ops for entry in (op, *_sync_after(op))]
    assert _losses(synced, tmp_path / "disk") == []


def _sync_after(op: Op) -> list[Op]:
    """Make an operation durable at once, which turns the power cut into a kill."""
    if op[0] == "write":
        return [("fsync", op[1])]
    if op[0] in ("create", "mkdir", "unlink", "rmdir", "replace"):
        return [("fsync", os.path.dirname(op[1]) or ".")]
    return []


@pytest.mark.parametrize("missing", ["file", "folder", "parent"])
def test_the_model_notices_each_missing_fsync(tmp_path: Path, missing: str) -> None:
    """The proof can fail: without any one of the three fsyncs a completed checkpoint can be lost."""
    ops = _history(tmp_path / "run", keep=1)
    kept = [op for op in ops if op[0] != "fsync" or _kind(op[1]) != missing]
    assert len(kept) < len(ops)
    assert _losses(kept, tmp_path / "disk")


def _kind(name: str) -> str:
    if name.endswith((".safetensors", ".json")):
        return "file"
    return "folder" if ".tmp-" in name else "parent"


def test_order_of_the_calls(tmp_path: Path) -> None:
    """Files durable before the manifest, the folder before the rename, the parent last."""
    folder = tmp_path / "checkpoints"
    durable.make_folder(folder)
    ops = record(tmp_path, lambda ops: store.save(folder, 7, _tensors(7), {}) and None)
    names = [os.path.basename(op[1]) for op in ops]
    short = [(op[0], "temporary" if ".tmp-" in name else name) for op, name in zip(ops, names)]
    expected = [("mkdir", "temporary")]
    for name in ("model.safetensors", "rng.safetensors", "state.json", "manifest.json"):
        expected += [("create", name), ("write", name), ("fsync", name)]
    expected += [("fsync", "temporary"), ("replace", "temporary"), ("fsync", "checkpoints")]
    assert _merged(short) == expected


def _merged(ops: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Several writes to one file in a row count as one."""
    return [op for index, op in enumerate(ops) if index == 0 or ops[index - 1] != op]
