"""The corpus inside the package, how it is rebuilt, and the compressors it is measured against."""

import bz2
import hashlib
import importlib.util
import io
import json
import lzma
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from ssmtrain.config.errors import UserError
from ssmtrain.data import sources
from ssmtrain.data.module import open_data
from ssmtrain.data.sources import open_source, split_text
from ssmtrain.data.yardsticks import yardsticks

FOLDER = Path(sources.__file__).parent / "corpora" / "austen"
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_corpus.py"


def test_files_are_those_listed() -> None:
    corpus = json.loads((FOLDER / "corpus.json").read_text())
    listed = {entry["file"] for entry in corpus["files"]}
    assert {p.name for p in FOLDER.glob("*.xz")} == listed and len(listed) == 6
    for entry in corpus["files"]:
        packed = (FOLDER / entry["file"]).read_bytes()
        text = lzma.decompress(packed)
        assert hashlib.sha256(packed).hexdigest() == entry["sha256_xz"]
        assert hashlib.sha256(text).hexdigest() == entry["sha256"]
        assert len(text) == entry["bytes"] and text.isascii() and b"\r" not in text and b"\0" not in text


def test_splits(page) -> None:
    train, val = (split_text(page().data, split) for split in ("train", "val"))
    assert len(train) == 3_557_747 and len(val) == 466_854
    assert val.startswith(b"Persuasion\n") and b"Anne Elliot" in val and b"Anne Elliot" not in train
    for title in (
        b"SENSE AND SENSIBILITY",
        b"PRIDE AND PREJUDICE",
        b"MANSFIELD PARK",
        b"EMMA",
        b"NORTHANGER",
    ):
        assert title in train


def test_open(page) -> None:
    data = open_data(page(seq_len=512))
    assert data.meta["train"] | {"sha256": ""} == {
        "tokens": 3_557_752,
        "bytes": 3_557_747,
        "documents": 5,
        "rows": 6949,
        "sha256": "",
    }
    assert data.val.per_epoch == 912


def test_a_damaged_package_says_so(page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "corpora" / "austen"
    copy.mkdir(parents=True)
    for path in FOLDER.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "emma.txt.xz").write_bytes(b"not xz")
    monkeypatch.setattr(sources, "files", lambda package: tmp_path)
    assert len(open_source(page().data).splits["train"]) == 5
    with pytest.raises(UserError, match=r"emma\.txt\.xz is damaged: install ssmtrain again"):
        split_text(page().data, "train")


def fake_package(texts: list[list[str]]) -> bytes:
    """A .deb as Debian makes it, around an R lazy-load database of character vectors."""
    rdb = b""
    for lines in texts:
        obj = (
            b"X\n"
            + struct.pack(">IIII", 3, 0x40201, 0x30500, 5)
            + b"UTF-8"
            + struct.pack(">II", 16, len(lines))
        )
        for line in lines:
            obj += struct.pack(">II", 0x40009, len(line.encode())) + line.encode()
        rdb += struct.pack(">I", len(obj)) + zlib.compress(obj)
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w:xz") as tar:
        info = tarfile.TarInfo("./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
        info.size = len(rdb)
        tar.addfile(info, io.BytesIO(rdb))
    out = b"!<arch>\n"
    for name, body in [("debian-binary", b"2.0"), ("data.tar.xz", tar_bytes.getvalue())]:
        out += (
            f"{name:16}{0:12}{0:6}{0:6}{100644:8}{len(body):10}`\n".encode() + body + b"\n" * (len(body) % 2)
        )
    return out


def test_the_script_reads_such_a_package() -> None:
    spec = importlib.util.spec_from_file_location("make_corpus", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    texts = [["", title, "", f"text of {title.lower()}", "", ""] for title in script.NOVELS]
    texts[2].insert(4, "her £20,000, and")
    texts[4] += ["A NOTE ON THE TEXT", "", "by an editor"]
    found = script.novels(fake_package(texts))
    assert list(found) == list(script.NOVELS.values())
    assert found["emma"] == b"EMMA\n\ntext of emma\n"
    assert found["mansfield_park"].endswith(b"her 20,000 pounds, and\n")
    assert found["northanger_abbey"].endswith(b"text of northanger abbey\n")
    with pytest.raises(SystemExit, match="ar magic"):
        script.novels(b"PK")


def test_yardsticks() -> None:
    text = b"It is a truth universally acknowledged. " * 50
    found = yardsticks(text)
    assert list(found) == ["gzip", "xz", "bz2"]
    assert found["bz2"] == 8 * len(bz2.compress(text)) / len(text)
    assert all(0 < bits < 1 for bits in found.values())
    assert yardsticks(b"") == {}


def test_yardsticks_of_the_validation_novel(page) -> None:
    found = yardsticks(split_text(page().data, "val"))
    assert {name: round(bits, 2) for name, bits in found.items()} == {"gzip": 2.93, "xz": 2.47, "bz2": 2.14}
