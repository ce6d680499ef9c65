"""Kinds of tensors cut into several files, written and verified side by side."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from pathlib import Path

import pytest
import torch

from ssmtrain.checkpoint import cut, faults, joint, store
from ssmtrain.checkpoint.durable import Written
from ssmtrain.checkpoint.parts import Part

ROWS = 40


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a kilobyte, and threads for them."""
    monkeypatch.setattr(cut, "LIMIT", 1024)
    monkeypatch.setattr(cut, "WORTH", 1)


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    found = {f"blocks.{i}.weight": torch.randn(10, 9, generator=draw) for i in range(7)}  # 360 bytes
    found["wide"] = torch.randn(ROWS, 100, generator=draw)  # 16,000 bytes
    found["narrow"] = torch.randn(5, generator=draw).to(torch.bfloat16)
    return found


def files(path: Path, kind: str) -> list[str]:
    return sorted(one.name for one in path.glob(f"{kind}*.safetensors"))


def test_several_files_give_the_same_tensors(tmp_path: Path) -> None:
    named = tensors()
    path = store.save(tmp_path, 3, {"model": named, "rng": {"cpu": torch.zeros(4)}}, {"step": 3})
    assert files(path, "rng") == ["rng.safetensors"]
    # Two of the first seven fit a file; the wide one has its own.
    assert files(path, "model") == [f"model_{i:05d}.safetensors" for i in range(6)]
    found = store.load_tensors(path, "model")
    assert found.keys() == named.keys()
    assert all(torch.equal(found[name], named[name]) for name in named)
    assert store.verify(path) == [] and store.extras(path) == []


def test_ranks_cut_their_parts_too(tmp_path: Path) -> None:
    named = tensors()
    wide = named["wide"]
    shares = [
        {"model": {**{name: Part(one) for name, one in named.items()}, "wide": Part(wide[:20], 0, ROWS)}},
        {"model": {"wide": Part(wide[20:], 20, ROWS)}},
    ]
    token = store.begin(tmp_path, 3)
    assert token is not None
    other = threading.Thread(target=joint.follow, args=(tmp_path, 3, token, 1, shares[1]))
    other.start()
    path = joint.lead(tmp_path, 3, token, 2, shares[0], {"step": 3})
    other.join()
    assert {"model_00000_00000.safetensors", "model_00001.safetensors"} <= set(files(path, "model"))
    found = store.load_tensors(path, "model")
    assert found.keys() == named.keys()
    assert all(torch.equal(found[name], named[name]) for name in named)


def test_a_flipped_bit_in_any_of_them_is_found(tmp_path: Path) -> None:
    path = store.save(tmp_path, 3, {"model": tensors()}, {"step": 3})
    for name in files(path, "model"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert [problem.split()[0] for problem in store.verify(path)] == [name]
        (path / name).write_bytes(whole)
    (path / files(path, "model")[2]).unlink()
    assert store.verify(path) == ["model_00002.safetensors is missing"]


def test_a_thread_that_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cut.write_parts

    def full(path: Path, parts: dict[str, Part]) -> Written:
        if path.name == "model_00003.safetensors":
            raise OSError(28, "No space left on device")
        return real(path, parts)

    store.save(tmp_path, 2, {"model": tensors()}, {"step": 2})
    monkeypatch.setattr(cut, "write_parts", full)
    with pytest.raises(store.SaveFailed, match="No space left on device"):
        store.save(tmp_path, 3, {"model": tensors()}, {"step": 3})
    assert [one.name for one in tmp_path.iterdir()] == ["step-00000002"]


def test_a_kill_in_a_thread_leaves_no_checkpoint(tmp_path: Path) -> None:
    def die() -> None:
        faults.arm("mid_file:4")
        store.save(tmp_path, 3, {"model": tensors()}, {"step": 3})

    child = multiprocessing.get_context("fork").Process(target=die)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert store.newest_good(tmp_path, print) is None
    assert len(store.clean(tmp_path)) == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_results_and_errors_keep_their_places(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "MOST", threads)
    assert cut.side_by_side(lambda item: item * 2, {3: 10, 1: 30, 2: 20}) == {3: 6, 1: 2, 2: 4}
    assert list(cut.side_by_side(lambda item: item, {3: 10, 1: 30, 2: 20})) == [3, 1, 2]
    with pytest.raises(ZeroDivisionError):
        cut.side_by_side(lambda item: 1 // item, {1: 5, 0: 5})


def test_they_are_written_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files wait for each other: one after the other, neither would be written."""
    monkeypatch.setattr(cut.os, "sched_getaffinity", lambda pid: {0, 1})
    meet = threading.Barrier(2, timeout=20)
    real = cut.write_parts

    def slow(path: Path, parts: dict[str, Part]) -> Written:
        if path.name in ("model.safetensors", "optim.safetensors"):
            meet.wait()
        return real(path, parts)

    monkeypatch.setattr(cut, "write_parts", slow)
    pair = {kind: {"weight": torch.zeros(8)} for kind in ("model", "optim")}
    assert store.verify(store.save(tmp_path, 3, pair, {"step": 3})) == []
