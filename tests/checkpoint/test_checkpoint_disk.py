"""A full or failing disk: the save fails cleanly, what was there stays, the next one succeeds."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
import torch

from ssmtrain.checkpoint import durable, store
from ssmtrain.checkpoint.records import cut_jsonl

TENSORS = {"model": {"w": torch.randn(2000)}, "optim": {"m": torch.randn(2000)}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store.save(tmp_path / "checkpoints", 1, TENSORS, {})
    return tmp_path / "checkpoints"


def _only_step_1_is_there(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert store.newest_good(folder, pytest.fail) == folder / "step-00000001"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("after", [0, 1, 4000, 9000, 16000, 16500])
def test_an_error_at_any_byte(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int) -> None:
    left = after
    write = os.write

    def failing(descriptor: int, data: memoryview) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(code, os.strerror(code))
        done = write(descriptor, data[:left])
        left -= done
        return done

    monkeypatch.setattr(os, "write", failing)
    with pytest.raises(store.SaveFailed, match=os.strerror(code)) as failure:
        store.save(folder, 2, TENSORS, {})
    assert failure.value.path == folder / "step-00000002"
    monkeypatch.undo()
    _only_step_1_is_there(folder)
    assert store.verify(store.save(folder, 2, TENSORS, {})) == []


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_an_error_of_any_other_call(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def failing(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(store.SaveFailed):
        store.save(folder, 2, TENSORS, {})
    monkeypatch.undo()
    _only_step_1_is_there(folder)


def test_a_limit_of_the_system(folder: Path) -> None:
    """The system itself refuses, in the middle of the first shard (RLIMIT_FSIZE)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(store.SaveFailed, match="File too large"):
            store.save(folder, 2, TENSORS, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    _only_step_1_is_there(folder)


def test_an_interrupt_leaves_nothing_half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save(folder, 2, TENSORS, {})
    monkeypatch.undo()
    _only_step_1_is_there(folder)


def test_a_failed_prune_is_not_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(folder, 2, TENSORS, {})

    def failing(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", failing)
    assert store.prune(folder, 1) == []
    assert len(store.checkpoints(folder)) == 2


def test_small_files_are_replaced_or_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            cut_jsonl(path, 1)
        with pytest.raises(OSError, match="No space"):
            durable.replace_file(tmp_path / "status.json", b"{}")
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
