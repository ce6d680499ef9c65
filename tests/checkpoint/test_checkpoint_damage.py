"""Damage is always seen, named by file, and passed over; hostile folders are refused."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssmtrain.checkpoint import store

FLIPS = 500


@pytest.fixture
def good(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = {"w": torch.randn(50, 20), "b": torch.randn(20).bfloat16()}
    return store.save(tmp_path, 100, {"model": model, "rng": {"cpu": torch.get_rng_state()}}, {"step": 100})


def test_no_flipped_bit_is_loaded(good: Path) -> None:
    draw = random.Random(0)
    for name in sorted(os.listdir(good)):
        data = (good / name).read_bytes()
        for _ in range(FLIPS):
            at = draw.randrange(len(data) * 8)
            (good / name).write_bytes(_flipped(data, at))
            problems = store.verify(good)
            assert problems, f"bit {at} of {name}"
            if name != "manifest.json":
                assert name in problems[0]
        (good / name).write_bytes(data)
    assert store.verify(good) == []


def test_no_bit_of_the_manifest_is_free(good: Path) -> None:
    data = (good / "manifest.json").read_bytes()
    free = []
    for at in range(len(data) * 8):
        (good / "manifest.json").write_bytes(_flipped(data, at))
        if not (store.verify(good, hashes=False) or store.verify(good)):
            free.append(at)
    assert free == []


def test_every_truncation_is_seen(good: Path) -> None:
    for name in sorted(os.listdir(good)):
        data = (good / name).read_bytes()
        for part in range(20):
            (good / name).write_bytes(data[: len(data) * part // 20])
            assert store.verify(good) and store.verify(good, hashes=False), f"{name} at {part}/20"
        (good / name).write_bytes(data[:-1])
        assert store.verify(good)
        (good / name).write_bytes(data)


def test_falls_back_and_says_why_by_file(good: Path) -> None:
    newer = good.with_name("step-00000200")
    shutil.copytree(good, newer)
    _edit(newer, lambda m: m | {"step": 200})
    (newer / "model.safetensors").unlink()
    newest = good.with_name("step-00000300")
    shutil.copytree(good, newest)
    _edit(newest, lambda m: m | {"step": 300})
    (newest / "rng.safetensors").write_bytes(_flipped((newest / "rng.safetensors").read_bytes(), 4000))
    said: list[str] = []
    assert store.newest_good(good.parent, said.append) == good
    assert said[0].startswith("step-00000300 is damaged: rng.safetensors has sha256")
    assert said[1:] == ["step-00000200 is damaged: model.safetensors is missing"]


def test_extra_files_are_named_and_ignored(good: Path) -> None:
    (good / "payload.pt").write_bytes(b"cos\nsystem\n")
    said: list[str] = []
    assert store.newest_good(good.parent, said.append) == good
    assert said == ["step-00000100: payload.pt is not in its manifest and is ignored"]
    with pytest.raises(store.Damaged, match=r"lists no payload\.safetensors"):
        store.load_tensors(good, "payload")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format": 2}, "format 2"),
        (lambda m: m | {"format": None}, "format None"),
        (lambda m: m | {"step": 101}, "it is of step 101, but the folder is step-00000100"),
        (lambda m: m | {"step": True}, "step True"),
        (lambda m: m | {"files": {}}, "does not list state.json"),
        (lambda m: m | {"files": ["state.json"]}, "does not list state.json"),
        (lambda m: m | {"files": _with(m, "../../evil.safetensors")}, "evil.safetensors' is not a file name"),
        (lambda m: m | {"files": _with(m, "/etc/passwd")}, "'/etc/passwd' is not a file name"),
        (lambda m: m | {"files": _with(m, "model.pt")}, "'model.pt' is not a file name"),
        (lambda m: m | {"files": _with(m, "manifest.json")}, "'manifest.json' is not a file name"),
        (lambda m: m | {"files": m["files"] | {"state.json": {"size": "3"}}}, "state.json has no size"),
        (lambda m: m | {"files": m["files"] | {"state.json": None}}, "state.json has no size"),
        (lambda m: [m], "it is not a JSON object"),
    ],
)
def test_a_manifest_that_lies_is_refused(good: Path, change: Callable, message: str) -> None:
    _edit(good, change)
    (problem,) = store.verify(good)
    assert problem.startswith("manifest.json cannot be used") and message in problem


def test_links_pipes_and_endless_json_are_refused(good: Path, tmp_path: Path) -> None:
    shard = good / "model.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert "model.safetensors cannot be used" in store.verify(good)[0]
    shard.unlink()
    os.mkfifo(shard)
    assert store.verify(good) == ["model.safetensors cannot be used: it is not a regular file"]
    (good / "manifest.json").write_text("[" * 100_000 + "\n")
    assert store.verify(good) == ["manifest.json cannot be used: it is not JSON"]
    shutil.rmtree(good)
    good.mkdir()
    assert store.verify(good) == ["manifest.json is missing"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (200 * 2**20).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}" + b"tail",
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        (56).to_bytes(8, "little") + b'{"w":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}  ....',
    ],
)
def test_a_shard_that_is_not_safetensors_is_damaged_even_with_a_true_hash(good: Path, content: bytes) -> None:
    import hashlib

    (good / "model.safetensors").write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _edit(good, lambda m: m | {"files": m["files"] | {"model.safetensors": entry}})
    assert store.verify(good) == []
    with pytest.raises(store.Damaged, match=r"model\.safetensors"):
        store.load_tensors(good, "model")


def test_nothing_is_unpickled() -> None:
    """The room does not know how to: no module of it names a loader that runs code."""
    room = Path(store.__file__).parent
    for path in room.glob("*.py"):
        text = path.read_text()
        assert not [word for word in ("import pickle", "torch.load(", "torch.save(") if word in text]


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _with(manifest: dict, name: str) -> dict:
    return manifest["files"] | {name: manifest["files"]["state.json"]}


def _edit(path: Path, change: Callable) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(change(manifest)) + "\n")
