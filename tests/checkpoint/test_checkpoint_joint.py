"""A checkpoint that several processes write: whole again for any reader, or not there at all."""

from __future__ import annotations

import multiprocessing
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ssmtrain.checkpoint import cut, durable, faults, joint, store
from ssmtrain.checkpoint.parts import Part

FORK = multiprocessing.get_context("fork")
WHOLE = {
    "cut": torch.arange(35.0).reshape(7, 5),
    "short": torch.arange(2, dtype=torch.int64),
    "scalar": torch.tensor(3.0, dtype=torch.bfloat16),
    "other": torch.randn(4, 4, generator=torch.Generator().manual_seed(0)),
}
STATE = {"step": 4}


def shares(rank: int, world: int) -> joint.Shares:
    """Rows of two tensors; the others whole, one on the first rank and one on the last."""
    parts = {}
    for name in ("cut", "short"):
        rows = torch.chunk(WHOLE[name], world)
        if rank < len(rows):
            start = sum(len(part) for part in rows[:rank])
            parts[name] = Part(rows[rank], start, len(WHOLE[name]))
    if rank == 0:
        parts["scalar"] = Part(WHOLE["scalar"])
    if rank == world - 1:
        parts["other"] = Part(WHOLE["other"])
    return {"model": parts, "rng": {f"rank{rank}/torch": Part(torch.tensor([rank]))}}


def save(folder: Path, world: int, step: int = 4, patience: float = 20.0) -> list[BaseException | None]:
    """Save by as many threads; what each raised."""
    token = store.begin(folder, step)
    assert token is not None

    def run(rank: int) -> None:
        if rank:
            joint.follow(folder, step, token, rank, shares(rank, world), patience)
        else:
            joint.lead(folder, step, token, world, shares(0, world), STATE, patience)

    with ThreadPoolExecutor(world) as pool:
        return [done.exception() for done in [pool.submit(run, rank) for rank in range(world)]]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_tensors_are_whole_again(world: int, tmp_path: Path) -> None:
    assert save(tmp_path, world) == [None] * world
    (path,) = store.checkpoints(tmp_path)
    assert store.verify(path) == [] and store.extras(path) == []
    found = store.load_tensors(path, "model")
    assert found.keys() == WHOLE.keys()
    for name, tensor in WHOLE.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert len(store.load_tensors(path, "rng")) == world
    assert store.load_state(path) == STATE
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert store.begin(tmp_path, 4) is None  # a good one is there


def test_a_rank_that_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cut.write_parts

    def full(path: Path, parts: dict) -> durable.Written:
        if path.name == "model_00001.safetensors":
            raise OSError(28, "No space left on device")
        return real(path, parts)

    monkeypatch.setattr(cut, "write_parts", full)
    first, second, third = save(tmp_path, 3)
    assert isinstance(first, store.SaveFailed) and "rank 1: No space left" in str(first)
    assert isinstance(second, store.SaveFailed) and "No space left" in str(second)
    assert third is None or isinstance(third, store.SaveFailed)
    assert list(tmp_path.iterdir()) == []


def test_a_first_rank_that_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "write_manifest", lambda *args: (_ for _ in ()).throw(OSError(5, "I/O error")))
    assert isinstance(save(tmp_path, 2)[0], store.SaveFailed)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_never_writes(tmp_path: Path) -> None:
    token = store.begin(tmp_path, 4)
    assert token is not None
    with pytest.raises(store.SaveFailed, match="rank 1 has not written its part for 0 s"):
        joint.lead(tmp_path, 4, token, 2, shares(0, 2), STATE, patience=0.1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(store.SaveFailed):  # it comes too late
        joint.follow(tmp_path, 4, token, 1, shares(1, 2), patience=0.1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "rank, name",
    [
        (1, "mid_file"),
        *((0, name) for name in ("mid_file", "after_tensors", "before_rename", "after_rename")),
    ],
)
def test_killed_at_a_named_point(rank: int, name: str, tmp_path: Path) -> None:
    """What a dead process leaves is no checkpoint, unless it was whole."""
    assert save(tmp_path, 2, step=3) == [None, None]
    token = store.begin(tmp_path, 4)
    assert token is not None

    def child(mine: int) -> None:
        if mine == rank:
            faults.arm(f"{name}:1")
        if mine:
            joint.follow(tmp_path, 4, token, 1, shares(1, 2))
        else:
            joint.lead(tmp_path, 4, token, 2, shares(0, 2), STATE, patience=0.5)

    children = [FORK.Process(target=child, args=(mine,)) for mine in (0, 1)]
    for one in children:
        one.start()
    for one in children:
        one.join(30)
    assert children[rank].exitcode == -signal.SIGKILL
    store.clean(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000003", "step-00000004"][: 2 if name == "after_rename" else 1]
    assert store.newest_good(tmp_path, pytest.fail) is not None


DAMAGES = {
    "a hole": {"cut": Part(WHOLE["cut"][:3], 0, 7)},
    "twice": {"cut": Part(WHOLE["cut"], 0, 7), "other": Part(WHOLE["other"])},
    "shifted": {"cut": Part(WHOLE["cut"][:4], 1, 7)},
    "another total": {"cut": Part(WHOLE["cut"][:4], 0, 8)},
    "a huge total": {"cut": Part(WHOLE["cut"][:4], 0, 2**62)},
    "another type": {"cut": Part(WHOLE["cut"][:4].double(), 0, 7)},
    "another width": {"cut": Part(WHOLE["cut"][:4, :2].contiguous(), 0, 7)},
    "whole and in parts": {"cut": Part(WHOLE["cut"])},
    "rows of a scalar": {"cut": Part(WHOLE["cut"][:4], 0, 7), "scalar": Part(WHOLE["scalar"], 0, 1)},
    "a negative row": {"cut": Part(WHOLE["cut"][:4], -1, 7)},
}


@pytest.mark.parametrize("first", DAMAGES.values(), ids=DAMAGES.keys())
def test_parts_that_do_not_make_one_tensor(first: dict[str, Part], tmp_path: Path) -> None:
    token = store.begin(tmp_path, 4)
    assert token is not None
    joint.follow(tmp_path, 4, token, 1, {"model": shares(1, 2)["model"]})
    path = joint.lead(tmp_path, 4, token, 2, {"model": first}, STATE)
    assert store.verify(path) == []  # its hashes are right
    with pytest.raises(store.Damaged):
        store.load_tensors(path, "model")
