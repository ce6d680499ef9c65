"""Prepared folders: whole or absent, found again, made anew when something changed, refused when damaged."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ssmtrain.config.errors import UserError
from ssmtrain.data import cache
from ssmtrain.data import prepare as prepare_module
from ssmtrain.data.prepare import Prepared, load, prepare
from ssmtrain.data.tokenizer import ByteTokenizer

SRC = Path(prepare_module.__file__).parents[2]


@pytest.fixture
def config(page, write):
    """Three documents to train on, one to validate."""
    for i in range(3):
        folder = write(f"text/{i}.txt", f"document {i} of the training text\n" * 20).parent
    return page(train=str(folder), val=str(write("val.txt", "to validate on\n" * 9)))


def files(prepared: Prepared) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in prepared.folder.iterdir() if p.name != "verified.json"}


def test_folder_and_manifest(config, own_cache: Path) -> None:
    made = prepare(config)
    assert made.made and made.folder.parent == own_cache
    assert {p.name for p in own_cache.iterdir() if not p.name.startswith(".")} == {made.folder.name}
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["dtype"] == "<u2" and manifest["tokenizer"] == ByteTokenizer.hash
    train = manifest["splits"]["train"]
    assert (train["documents"], train["empty"], train["tokens"] - train["bytes"]) == (3, 0, 3)
    stream = made.stream("train")
    ids = np.empty(stream.tokens, np.int64)
    stream.read(0, ids)
    text = "".join(f"document {i} of the training text\n" * 20 + "\n" for i in range(3))
    assert ByteTokenizer().decode(ids) == text
    assert stream.starts.tolist() == (np.flatnonzero(ids == 256) + 1 - train["tokens"] // 3).tolist()


def test_found_again(config) -> None:
    made = prepare(config)
    stamps = {p: p.stat().st_mtime_ns for p in made.folder.iterdir()}
    again = prepare(config)
    assert not again.made and again.manifest == made.manifest
    assert {p: p.stat().st_mtime_ns for p in made.folder.iterdir()} == stamps


def test_what_makes_it_anew(config, page, bpe, tmp_path: Path) -> None:
    first = prepare(config)
    path = Path(config.data.train, "0.txt")
    inode = path.stat()
    path.write_text(path.read_text().replace("document 0", "Document 0"))  # as long as before
    os.utime(path, ns=(inode.st_atime_ns, inode.st_mtime_ns))  # and as old
    second = prepare(config)
    assert second.made and second.folder != first.folder
    assert second.manifest.splits["train"].sha256 != first.manifest.splits["train"].sha256
    assert second.manifest.splits["val"].sha256 == first.manifest.splits["val"].sha256
    third = prepare(page(train=config.data.train, val=config.data.val, tokenizer=bpe))
    assert third.made and third.manifest.tokenizer != second.manifest.tokenizer
    assert third.manifest.splits["train"].tokens < second.manifest.splits["train"].tokens


def test_shards(config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = prepare(config).stream("train")
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 100)
    monkeypatch.setattr("ssmtrain.data.units.UNIT", 100)
    monkeypatch.setattr("ssmtrain.data.units.LONG", 200)
    monkeypatch.setattr("ssmtrain.data.spans.PIECE", 33)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    cut = prepare(config).stream("train")
    assert len(cut.entry.shards) == -(-cut.tokens // 100) > 10
    assert cut.starts.tolist() == whole.starts.tolist()
    a, b = np.empty(whole.tokens, np.int64), np.empty(whole.tokens, np.int64)
    whole.read(0, a)
    cut.read(0, b)
    assert np.array_equal(a, b)
    for start, length in [(0, 1), (99, 2), (100, 100), (57, 345), (cut.tokens - 1, 1)]:
        out = np.empty(length, np.int64)
        cut.read(start, out)
        assert np.array_equal(out, a[start : start + length])


def test_wide_vocabularies_take_four_bytes(config) -> None:
    class Wide(ByteTokenizer):
        vocab_size, eot, hash = 70000, 69999, "wide"

    prepared = prepare(config, Wide())
    assert prepared.manifest.dtype == "<u4"
    out = np.empty(1, np.int64)
    prepared.stream("val").read(prepared.stream("val").tokens - 1, out)
    assert out[0] == 69999


def test_empty_documents_are_left_out(page, write, tmp_path: Path) -> None:
    for name, text in [("a", "first"), ("b", ""), ("c", "last"), ("d", "")]:
        write(f"t/{name}.txt", text)
    entry = prepare(page(train=str(tmp_path / "t"), val=str(write("v.txt", "v")))).manifest.splits["train"]
    assert (entry.documents, entry.empty, entry.tokens, entry.bytes) == (2, 2, 11, 9)


@pytest.mark.parametrize("harm", ["manifest", "json", "short", "missing", "format", "index"])
def test_half_made_folders_are_made_again(config, harm: str) -> None:
    made = prepare(config)
    before, folder = files(made), made.folder
    if harm == "manifest":
        (folder / "manifest.json").unlink()
    elif harm == "json":
        (folder / "manifest.json").write_text("{")
    elif harm == "format":
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(
            text.replace(f'"format": {prepare_module.FORMAT}', '"format": 99')
        )
    elif harm == "missing":
        (folder / "val-00000.bin").unlink()
    else:
        name = "train-00000.bin" if harm == "short" else "train-documents.bin"
        (folder / name).write_bytes((folder / name).read_bytes()[:-2])
    assert load(folder) is None
    again = prepare(config)
    assert again.made and files(again) == before
    assert not list(folder.parent.glob("*.tmp-*"))


@pytest.mark.parametrize("name", ["train-00000.bin", "val-00000.bin", "train-documents.bin"])
def test_a_flipped_bit_is_found(config, name: str) -> None:
    made = prepare(config)
    path = made.folder / name
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        prepare(config)
    assert f"delete {made.folder}" in error.value.lines[1]
    shutil.rmtree(made.folder)
    assert prepare(config).made


def test_a_token_outside_the_vocabulary_is_found_by_offset(config) -> None:
    path = prepare(config).folder / "val-00000.bin"
    data = np.fromfile(path, "<u2")
    data[77] = 999
    data.tofile(path)
    with pytest.raises(UserError, match=r"val-00000\.bin: token 77 \(byte 154\) is 999, the voc"):
        prepare(config)


def test_documents_out_of_order_are_found(config) -> None:
    path = prepare(config).folder / "train-documents.bin"
    starts = np.fromfile(path, "<i8")
    for harmed, at in [([1, *starts[1:]], 0), ([0, starts[2], starts[1]], 1), ([0, 5, 2**62], 2)]:
        np.array(harmed, "<i8").tofile(path)
        with pytest.raises(UserError, match=rf"train-documents\.bin: document {at} starts at"):
            prepare(config)


def test_verified_once(config, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(config).folder
    calls = []
    monkeypatch.setattr(Prepared, "verify", lambda self: calls.append(self.folder))
    prepare(config)
    assert calls == []
    (folder / "verified.json").unlink()
    prepare(config)
    prepare(config)
    assert calls == [folder]


MAKER = """
import os, signal, sys
from types import SimpleNamespace as Page
from ssmtrain.config.data import TextData
from ssmtrain.data import prepare as room
from ssmtrain.data.shards import SplitWriter
kill, train, val = sys.argv[1:]
config = Page(
    data=TextData(train=train, val=val, include=["**/*.txt"]),
    tokenizer=Page(kind="bytes"),
)
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if kill == "middle":
    SplitWriter.close = die
elif kill == "manifest":
    room.cache.write_file = die
elif kill == "publish":
    room.cache.publish = die
elif kill == "unlocked":
    def no_locks(file, how):
        raise OSError(37, "No locks available")
    room.cache.fcntl.flock = no_locks
elif kill == "imports":
    room.prepare(config)
    heavy = {"torch", "datasets", "pyarrow", "lightning", "pandas", "transformers"} & set(sys.modules)
    sys.exit(f"imported {heavy}" if heavy else 0)
prepared = room.prepare(config)
prepared.verify()
print(prepared.made, prepared.folder)
"""


def maker(kill: str, config, **kwargs) -> subprocess.Popen:
    """A process that prepares, and may kill itself on the way."""
    argv = [sys.executable, "-c", MAKER, kill, config.data.train, config.data.val]
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True, **kwargs)


@pytest.mark.parametrize("kill", ["middle", "manifest", "publish"])
def test_killed_while_preparing(config, own_cache: Path, kill: str) -> None:
    process = maker(kill, config)
    assert process.wait(60) == -signal.SIGKILL
    assert [p for p in own_cache.iterdir() if p.suffix == ".part"]
    after = prepare(config)
    after.verify()
    assert after.made and [p for p in own_cache.iterdir() if p.name[0] != "."] == [after.folder]
    names = {"manifest.json", "sources.jsonl", "verified.json", *(p.name for p in after.folder.glob("*.bin"))}
    assert {p.name for p in after.folder.iterdir()} == names


@pytest.mark.parametrize("locks", [True, False])
def test_several_makers_at_once(config, locks: bool) -> None:
    """With locks one makes and the others find; without, they race and one result stands."""
    makers = [maker("never" if locks else "unlocked", config) for _ in range(3)]
    said = [m.communicate(timeout=120)[0].split() for m in makers]
    assert [m.returncode for m in makers] == [0] * 3
    assert len({folder for _, folder in said}) == 1
    if locks:
        assert sorted(made for made, _ in said) == ["False", "False", "True"]
    folder = Path(said[0][1])
    assert load(folder) is not None
    assert not list(folder.parent.glob("*.tmp-*"))


def test_nothing_heavy_is_imported(config) -> None:
    assert maker("imports", config).wait(60) == 0


def test_no_space(config, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssmtrain.data.shards.SplitWriter.write", full)
    with pytest.raises(UserError, match=r"data\.cache_dir: no space left in"):
        prepare(config)
    assert not [p for p in own_cache.iterdir() if not p.name.startswith(".")]


def test_cache_dir_is_used_and_named(config, page, write, tmp_path: Path) -> None:
    data = {"train": config.data.train, "val": config.data.val}
    assert prepare(page(**data, cache_dir=str(tmp_path / "mine"))).folder.parent == tmp_path / "mine"
    blocked = str(write("a_file", "x"))
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write .*a_file"):
        prepare(page(**data, cache_dir=f"{blocked}/below"))


def test_no_home_falls_back_to_a_temporary_folder(
    config, write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(write("a_file", "x")))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "spare"))
    (tmp_path / "spare").mkdir()
    with caplog.at_level(logging.WARNING):
        made = prepare(config)
    assert made.folder.parent.parent == tmp_path / "spare" and "prepared data goes to" in caplog.text
    assert not prepare(config).made
    assert made.folder.parent.stat().st_mode & 0o77 == 0
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # someone else's folder under that name is not trusted
    made.folder.parent.rename(tmp_path / "spare" / "ssmtrain-12345")
    with pytest.raises(UserError, match="no folder for prepared data"):
        prepare(config)


def test_a_folder_that_cannot_be_written_is_still_read(config, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(config)
    monkeypatch.setattr(cache, "writable", lambda *a, **k: pytest.fail("nothing needs writing"))
    assert not prepare(config).made


def test_on_disk_before_it_has_its_name(config, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is synced, the manifest last, then its folder; only then comes the name, synced too."""
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def fsync(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def renamed(path: Path, target: Path) -> Path:
        events.append(f"rename {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    folder = prepare(config).folder
    *first, manifest, temporary, named, parent = events
    assert sorted(first) == sorted(p.name for p in [*folder.glob("*.bin"), folder / "sources.jsonl"])
    assert manifest == "manifest.json" and temporary == f"{folder.name}.part"
    assert (named, parent) == (f"rename {folder.name}", own_cache.name)
