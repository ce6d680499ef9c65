"""What is on disk made or harmed at random: lines, packed files, tokenizers, manifests, shards, notes.

Each ends in a valid load or in an error of ours, within a bound of time and memory.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data.test_data_bad_files import fragments, parquet
from fuzz import bounded, replaced, told, tries
from ssmtrain.config.errors import UserError
from ssmtrain.data import jsonl, making, units, unpack
from ssmtrain.data.files import find
from ssmtrain.data.prepare import Prepared, load, prepare
from ssmtrain.data.spans import BadText
from ssmtrain.data.tokenizer import FileTokenizer

HOW = st.sampled_from(["cut", "flip", "over", "into", "twice"])
PIECE = st.binary(min_size=1, max_size=16) | st.sampled_from([b"\0" * 16, b"\xff" * 16])


def altered(data: bytes, how: str, at: float, piece: bytes) -> bytes:
    """Bytes cut, overwritten, doubled, or with more put in at a share of their length."""
    start = min(int(at * len(data)), max(0, len(data) - 1))
    if how == "cut":
        return data[:start]
    if how == "twice":
        return data[:start] + data
    if how == "flip" and data:
        return data[:start] + bytes([data[start] ^ (1 << piece[0] % 8)]) + data[start + 1 :]
    return data[:start] + piece + data[start + (len(piece) if how == "over" else 0) :]


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk; a line of kilobytes is too long; what grows two hundredfold is a bomb."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(jsonl, "MAX_LINE", 2**13)
    monkeypatch.setattr(unpack, "FREE", 2**14)


@tries(100)
@given(parts=st.lists(fragments, max_size=12), size=st.integers(1, 200))
def test_lines_in_any_pieces(write, parts: list[bytes], size: int) -> None:
    """A line's text, or what is wrong with it, does not depend on where the file is divided."""
    data = b"\n".join(parts)
    expected: list[str | None] = []
    for line in data.split(b"\n"):
        if line.strip():
            try:
                text = json.loads(line.decode())["text"]
                expected.append(text if text.encode() is not None else None)
            except Exception:
                expected.append(None)
    if not data:
        return
    (file,) = find(str(write("a.jsonl", data)), [], "data.train")
    with bounded():
        ranges = [(at, min(at + size, len(data))) for at in range(0, len(data), size)]
        found = [d for begin, end in ranges for d in jsonl.read_range(file, "text", begin, end)]
    assert [None if isinstance(one, BadText) else one[0] for one in found] == expected
    for one in found:
        assert not isinstance(one, BadText) or "a.jsonl:" in told(one)


PACKED = {
    ".gz": gzip.compress(b'{"text": "some text"}\n' * 30, mtime=0),
    ".xz": lzma.compress(b'{"text": "some text"}\n' * 30),
    ".zst": zstandard.compress(b'{"text": "some text"}\n' * 30),
}


@tries(100)
@given(ending=st.sampled_from(sorted(PACKED)), how=HOW, at=st.floats(0, 1), piece=PIECE)
def test_packed_files_harmed_at_random(write, ending: str, how: str, at: float, piece: bytes) -> None:
    """What is unpacked of them is bounded by what is read."""
    data = altered(PACKED[ending], how, at, piece)
    (file,) = find(str(write(f"a.txt{ending}", data or b"x")), [], "data.train")
    taken = 0
    try:
        with bounded(), unpack.open_packed(file, unpack.PACKINGS[ending]) as stream:
            while block := stream.read(2**12):
                taken += len(block)
    except UserError as error:
        assert "data.train: " in told(error)
    assert taken <= max(unpack.FREE, unpack.RATIO * len(data)) + 2**21


WHOLE = parquet(text=["some text", "more", "", "text"] * 3)


@tries(60)
@given(how=HOW, at=st.floats(0, 1), piece=PIECE)
def test_parquet_harmed_at_random(write, page, tmp_path: Path, how: str, at: float, piece: bytes) -> None:
    path = write("a.parquet", altered(WHOLE, how, at, piece) or b"x")
    (file,) = find(str(path), [], "data.train")
    from ssmtrain.data.parquet import column

    try:
        texts = list(column(file, "text"))
    except UserError as error:
        assert "data.train: " in told(error)
        return
    assert all(isinstance(text, bytes | type(None)) for text in texts) and len(texts) < 10**5


@tries(60)
@given(draw=st.data())
def test_tokenizers_with_something_replaced(bpe: Path, tmp_path: Path, draw: Any) -> None:
    """One that can be read gives ids of its vocabulary for any text; the ids are those of the file."""
    definition = json.loads(bpe.read_text())
    definition["model"]["vocab"] = dict(list(definition["model"]["vocab"].items())[:270])
    definition["model"]["merges"] = definition["model"]["merges"][:3]
    definition = replaced(definition, draw)
    path = tmp_path / "t.json"
    path.write_text(json.dumps(definition))
    text = draw.draw(st.text(max_size=12) | st.just("the cat <|endoftext|> sat"))
    try:
        with bounded(2**30):
            tokenizer = FileTokenizer(path)
            ids = tokenizer.encode(text)
    except UserError as error:
        assert "tokenizer." in told(error)
        return
    assert 0 <= tokenizer.eot < tokenizer.vocab_size
    assert not len(ids) or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
    assert type(tokenizer.decode(ids)) is str
    for token in definition.get("added_tokens") or []:
        assert tokenizer._backend.token_to_id(token["content"]) in (token["id"], None)


@pytest.fixture
def made(page, write, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """Three texts in shards of 16 tokens."""
    monkeypatch.setattr("ssmtrain.data.prepare.SHARD_TOKENS", 16)
    for i in range(3):
        write(f"t/{i}.txt", f"document {i}, some text")
    return prepare(page(train=str(write("t/3.txt", "the end").parent), val=str(write("v.txt", "validate"))))


def tokens(found: Prepared) -> dict[str, list[int]]:
    out = {}
    for split in found.manifest.splits:
        stream = found.stream(split)
        ids = np.empty(stream.tokens, np.int64)
        stream.read(0, ids)
        out[split] = [*ids.tolist(), *stream.starts.tolist()]
    return out


def rehash(manifest: Any, folder: Path) -> None:
    """What an attacker does after changing a file: true hashes, wherever the manifest has a place for one."""
    for split in manifest["splits"].values():
        for shard in (*split["shards"], split["starts"]):
            shard["sha256"] = hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
        parts = [shard["sha256"] for shard in (*split["shards"], split["starts"])]
        split["sha256"] = hashlib.sha256("".join(parts).encode()).hexdigest()


def copied(made: Prepared, tmp_path: Path) -> Path:
    folder = tmp_path / "again"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made.folder, folder)
    return folder


@tries(80)
@given(draw=st.data())
def test_manifests_with_something_replaced(made: Prepared, tmp_path: Path, draw: Any) -> None:
    """They load the same tokens, or fewer whole ones of its files, or are refused."""
    folder = copied(made, tmp_path)
    manifest = replaced(json.loads((folder / "manifest.json").read_text()), draw)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    names = {path.name for path in folder.iterdir()}
    try:
        with bounded():
            found = load(folder)
            if found is None:
                return
            found.verify()
            again = tokens(found)
    except UserError as error:
        assert str(folder) in told(error)
        return
    before = tokens(made)
    assert all(again[split] == before.get(split) for split in again)
    assert {path.name for path in folder.iterdir()} == names


@tries(80)
@given(draw=st.data(), how=HOW, at=st.floats(0, 1), piece=PIECE)
def test_shards_that_are_forged(
    made: Prepared, tmp_path: Path, draw: Any, how: str, at: float, piece: bytes
) -> None:
    """Under true hashes too, ids are of the vocabulary and documents start in order inside the stream."""
    folder = copied(made, tmp_path)
    name = draw.draw(st.sampled_from(sorted(path.name for path in folder.glob("*.bin"))))
    (folder / name).write_bytes(altered((folder / name).read_bytes(), how, at, piece))
    manifest = json.loads((folder / "manifest.json").read_text())
    rehash(manifest, folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        with bounded():
            found = load(folder)
            if found is None:
                return
            found.verify()
    except UserError as error:
        assert name in told(error)
        return
    for split in found.manifest.splits:
        stream = found.stream(split)
        ids = np.empty(stream.tokens, np.int64)
        stream.read(0, ids)
        assert ids.min() >= 0 and ids.max() < found.manifest.vocab_size
        assert stream.starts[0] == 0 and all(a < b for a, b in zip(stream.starts, stream.starts[1:]))
        assert stream.starts[-1] < stream.tokens


@pytest.fixture
def stopped(page, write, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Iterator[tuple[Any, Path, Any]]:
    """A page, what a preparation of it that was killed left, and what it would have ended with."""
    monkeypatch.setattr(units, "UNIT", 40)
    for i in range(8):
        write(f"t/{i}.txt", f"document {i}, of many words")
    config = page(train=str(write("t/8.txt", "the end").parent), val=str(write("v.txt", "validate")))
    whole = prepare(config)
    expected = tokens(whole)
    shutil.rmtree(whole.folder)
    with monkeypatch.context() as patch:

        def die(self: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(making, "EVERY", -1.0)
        patch.setattr("ssmtrain.data.shards.SplitWriter.close", die)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    (left,) = own_cache.glob("*.part")
    assert (left / making.NOTE).exists()
    yield config, left, expected


@tries(25)
@given(draw=st.data())
def test_notes_of_a_killed_preparation_with_something_replaced(
    stopped: tuple[Any, Path, Any], tmp_path: Path, draw: Any
) -> None:
    """It is begun anew, or gone on with where nothing has changed: other tokens never come of it."""
    config, left, expected = stopped
    kept = tmp_path / "kept"
    if not kept.exists():
        shutil.copytree(left, kept)
    shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(kept, left)
    note = replaced(json.loads((left / making.NOTE).read_text()), draw)
    (left / making.NOTE).write_text(json.dumps(note))
    with bounded():
        found = prepare(config, workers=1)
    assert tokens(found) == expected
    shutil.rmtree(found.folder)
