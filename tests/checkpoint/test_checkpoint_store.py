"""What is saved comes back, in the files and with the rights that were promised."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ssmtrain.checkpoint import store

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def _some(step: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.arange(6.0).reshape(2, 3) + step}, "optim": {"m": torch.ones(3)}}


def test_every_dtype_and_layout_round_trips_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(5, 3) * 10).to(dtype) for dtype in DTYPES}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(4, 6).t(),
        "slice": torch.randn(10, 10)[2:7:2, 1::3],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    path = store.save(tmp_path, 3, {"model": tensors}, {})
    loaded = store.load_tensors(path, "model")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        same = loaded[name].reshape(-1).view(torch.uint8)
        assert torch.equal(same, tensor.contiguous().reshape(-1).view(torch.uint8)), name


def test_a_large_tensor_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmtrain.checkpoint.durable.PIECE", 1000)
    big = torch.randn(12345)
    path = store.save(tmp_path, 1, {"model": {"big": big}}, {})
    assert torch.equal(store.load_tensors(path, "model")["big"], big)
    assert store.verify(path) == []


def test_large_pieces_are_hashed_beside_the_writing(tmp_path: Path) -> None:
    big = {str(i): torch.randn(2**18 + i) for i in range(5)}
    path = store.save(tmp_path, 1, {"model": big}, {})
    assert store.verify(path) == []
    loaded = store.load_tensors(path, "model")
    assert all(torch.equal(loaded[name], big[name]) for name in big)


def test_files_are_plain_safetensors_and_json(tmp_path: Path) -> None:
    path = store.save(tmp_path, 12, _some(), {"step": 12, "tokens": 5 * 10**12})
    assert path == tmp_path / "step-00000012"
    names = {"model.safetensors", "optim.safetensors", "state.json", "manifest.json"}
    assert {file.name for file in path.iterdir()} == names
    with safetensors.safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and torch.equal(
            file.get_tensor("w"), _some()["model"]["w"]
        )
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 12 and set(manifest["files"]) == names - {"manifest.json"}
    assert store.load_state(path) == {"step": 12, "tokens": 5 * 10**12}


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    path = store.save(tmp_path / "run" / "checkpoints", 1, _some(), {})
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints", path):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}


def test_a_good_checkpoint_of_the_step_is_kept_and_a_damaged_one_replaced(tmp_path: Path) -> None:
    path = store.save(tmp_path, 5, _some(1), {"of": 1})
    before = (path / "manifest.json").stat().st_ino
    assert store.save(tmp_path, 5, _some(2), {"of": 2}) == path
    assert (path / "manifest.json").stat().st_ino == before and store.load_state(path) == {"of": 1}
    (path / "model.safetensors").write_bytes(b"")
    store.save(tmp_path, 5, _some(2), {"of": 2})
    assert store.verify(path) == [] and store.load_state(path) == {"of": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000005"]


def test_what_cannot_be_stored_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="complex64"):
        store.save(tmp_path, 1, {"model": {"c": torch.zeros(2, dtype=torch.complex64)}}, {})
    with pytest.raises(TypeError):
        store.save(tmp_path, 1, _some(), {"object": object()})
    with pytest.raises(ValueError, match="shard"):
        store.save(tmp_path, 1, {"../model": {}}, {})
    for step in (-1, 10**8):
        with pytest.raises(ValueError, match="eight digits"):
            store.save(tmp_path, step, _some(), {})
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_found_by_exact_name(tmp_path: Path) -> None:
    good = store.save(tmp_path, 100, _some(), {})
    for name in ("step-100", "step-00000200-bak", "step-000000300", "xstep-00000400", "step--0000001"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000500").write_text("a file")
    (tmp_path / "step-00000600").symlink_to(good)
    (tmp_path / f"step-00000700.tmp-{'0' * 32}").mkdir()
    assert store.checkpoints(tmp_path) == [good]
    assert store.newest_good(tmp_path, print) == good
    assert store.newest_good(tmp_path / "absent", print) is None


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    paths = [store.save(tmp_path, step, _some(step), {}) for step in range(1, 6)]
    assert store.prune(tmp_path, 2) == paths[:3]
    assert store.checkpoints(tmp_path) == paths[3:]
    assert store.prune(tmp_path, 2) == []
    with pytest.raises(ValueError, match="at least one"):
        store.prune(tmp_path, 0)


def test_prune_never_deletes_the_last_good_one(tmp_path: Path) -> None:
    paths = [store.save(tmp_path, step, _some(step), {}) for step in range(1, 6)]
    for path in paths[2:]:
        _flip(path / "model.safetensors")
    assert store.prune(tmp_path, 1) == paths[:1]
    assert store.newest_good(tmp_path, lambda line: None) == paths[1]
    _flip(paths[1] / "optim.safetensors")
    assert store.prune(tmp_path, 1) == []


def test_prune_counts_only_whole_ones(tmp_path: Path) -> None:
    """A truncated predecessor does not push a good one out."""
    paths = [store.save(tmp_path, step, _some(step), {}) for step in range(1, 5)]
    (paths[2] / "model.safetensors").write_bytes(b"short")
    store.prune(tmp_path, 2)
    assert store.checkpoints(tmp_path) == [paths[1], paths[3]]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
