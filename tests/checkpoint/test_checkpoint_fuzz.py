"""Checkpoints damaged in ways that nobody listed: an error of ours, never a crash, never taken as good."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzz import HURTFUL, replaced, tries, values
from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.runs import _tokens
from ssmtrain.checkpoint.weights import load_model
from ssmtrain.config.errors import UserError
from ssmtrain.config.schema import RunConfig
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights
from ssmtrain.train.snapshot import _counters
from ssmtrain.train.state import RunState
from train.conftest import page

STEP = 3
MODEL, STATE, MANIFEST = "model.safetensors", "state.json", "manifest.json"
BOUNDED = tries(80)

JSON = values([*HURTFUL, STEP, STATE, MODEL])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A config and its untouched checkpoint."""
    folder = tmp_path_factory.mktemp("fuzz")
    config = page(folder)
    model = HybridModel(config.model, 257)
    init_weights(model, config.model.init, 0)
    state = {"step": STEP, "tokens": 384, "run": RunState(step=STEP, tokens=384, rows=12).as_dict()}
    tensors = {"model": dict(model.state_dict()), "rng": {"rank0/torch": torch.get_rng_state()}}
    return config, store.save(folder, STEP, tensors, state)


@pytest.fixture
def copy(whole: tuple[RunConfig, Path], tmp_path: Path) -> Iterator[Path]:
    """Where a damaged copy is made, over and over."""
    yield tmp_path / whole[1].name


def again(whole: tuple[RunConfig, Path], copy: Path) -> Path:
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(whole[1], copy))


def rehash(path: Path, name: str) -> None:
    """What an attacker does after changing a file."""
    data, manifest = (path / name).read_bytes(), json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest) + "\n")


def taken(config: RunConfig, path: Path) -> HybridModel | None:
    """The model that generate would use, and the state that fit would; None where they are refused."""
    try:
        if store.verify(path):
            return None
        model = load_model(path, config, 257, torch.device("cpu"))
        assert type(_tokens(path)) is int
        run = _counters(path, store.load_state(path))
        assert run.step == STEP and type(run.rows) is int and run.rows >= 0
        return model
    except UserError as error:
        assert error.lines and all(len(line) < 2000 for line in error.lines)
        return None


def is_original(whole: tuple[RunConfig, Path], model: HybridModel) -> bool:
    saved = store.load_tensors(whole[1], "model")
    return all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


def altered(data: bytes, how: str, at: float, piece: bytes) -> bytes:
    """Bytes cut, overwritten, or with more put in at a share of their length."""
    start = int(at * len(data))
    if how == "cut":
        return data[:start]
    if how == "flip" and data:
        start = min(start, len(data) - 1)
        return data[:start] + bytes([data[start] ^ (1 << (piece[0] % 8 if piece else 0))]) + data[start + 1 :]
    return data[:start] + piece + data[start + (len(piece) if how == "over" else 0) :]


@BOUNDED
@given(
    name=st.sampled_from([MODEL, STATE, MANIFEST, "rng.safetensors"]),
    how=st.sampled_from(["cut", "flip", "over", "into"]),
    at=st.floats(0, 1),
    piece=st.binary(min_size=1, max_size=32),
)
def test_damage_is_never_taken(
    whole: tuple[RunConfig, Path], copy: Path, name: str, how: str, at: float, piece: bytes
) -> None:
    """Any change of any file, its hash as it was."""
    path = again(whole, copy)
    before = (path / name).read_bytes()
    after = altered(before, how, at, piece)
    (path / name).write_bytes(after)
    if after == before:
        assert taken(whole[0], path) is not None
    elif name != MANIFEST:
        assert store.verify(path) and taken(whole[0], path) is None
    else:
        model = taken(whole[0], path)  # white space between the words of a manifest means nothing
        assert model is None or json.loads(after) == json.loads(before)


@BOUNDED
@given(draw=st.data())
def test_a_forged_manifest(whole: tuple[RunConfig, Path], copy: Path, draw: st.DataObject) -> None:
    path = again(whole, copy)
    manifest = replaced(json.loads((path / MANIFEST).read_text()), draw, JSON)
    (path / MANIFEST).write_text(json.dumps(manifest) + "\n")
    model = taken(whole[0], path)
    assert model is None or is_original(whole, model)
    assert store.verify(path) or set(manifest["files"]) <= {path.name for path in whole[1].iterdir()}


@BOUNDED
@given(draw=st.data())
def test_a_forged_header(whole: tuple[RunConfig, Path], copy: Path, draw: st.DataObject) -> None:
    """Whatever a true hash covers either fits the model, with finite numbers, or is refused."""
    path = again(whole, copy)
    data = (path / MODEL).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(replaced(json.loads(data[8 : 8 + length]), draw, JSON)).encode()
    said = draw.draw(st.sampled_from([len(text)] * 8 + [0, 7, len(text) + 1, 2**31, 2**63, 2**64 - 1]))
    (path / MODEL).write_bytes(said.to_bytes(8, "little") + text + data[8 + length :])
    rehash(path, MODEL)
    model = taken(whole[0], path)
    assert model is None or all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


@BOUNDED
@given(
    how=st.sampled_from(["cut", "flip", "over", "into"]),
    at=st.floats(0, 0.2),
    piece=st.binary(min_size=1, max_size=32),
)
def test_a_forged_shard(whole: tuple[RunConfig, Path], copy: Path, how: str, at: float, piece: bytes) -> None:
    path = again(whole, copy)
    (path / MODEL).write_bytes(altered((path / MODEL).read_bytes(), how, at, piece))
    rehash(path, MODEL)
    model = taken(whole[0], path)
    assert model is None or all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


@BOUNDED
@given(draw=st.data())
def test_a_forged_state(whole: tuple[RunConfig, Path], copy: Path, draw: st.DataObject) -> None:
    path = again(whole, copy)
    state = replaced(json.loads((path / STATE).read_text()), draw, JSON)
    (path / STATE).write_text(json.dumps(state) + "\n")
    rehash(path, STATE)
    model = taken(whole[0], path)
    assert model is None or is_original(whole, model)
