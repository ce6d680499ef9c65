"""The table of bad data files: what each ends with, by its number in the catalogue; and files made at random."""

# One case a line, however long.
# ruff: noqa: E501

import gzip
import json
import lzma
import os
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fuzz import tries
from ssmtrain.config.errors import UserError
from ssmtrain.data import jsonl, unpack
from ssmtrain.data.prepare import prepare


def parquet(**columns) -> bytes:
    out = BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def tar(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type = kind
        archive.addfile(member)
    return out.getvalue()


GOOD = b'{"text": "fine"}\n'
ZIP = b"PK\x03\x04\x14\x00../evil"
CASES = [
    ("68 empty lines", "a.jsonl", b"\n\n", "data.train: the text gives no tokens"),
    ("74 broken line", "a.jsonl", GOOD + b'{"text": \n', "a.jsonl:2: this is not a line of JSON"),
    ("74 half a line at the end", "a.jsonl", GOOD * 9 + b'{"text": "fi', "a.jsonl:10: this is not a line of JSON: Unterminated string"),
    ("74 a list", "a.jsonl", b"[1]\n", 'a.jsonl:1: expected an object such as {"text": …}, not a list'),
    ("74 broken line, packed", "a.jsonl.gz", gzip.compress(GOOD * 3 + b"x\n"), "a.jsonl.gz:4: this is not a line of JSON"),
    ("74 endless nesting", "a.jsonl", b"[" * 10**6, "a.jsonl:1: this"),
    ("74 endless number", "a.jsonl", b'{"text": ' + b"9" * 10**5 + b"}\n", "a.jsonl:1: "),
    ("75 no text", "a.jsonl", GOOD + b'{"body": "x", "id": 1}\n', "a.jsonl:2: there is no 'text', only 'body', 'id'; data.text_key names"),
    ("75 null", "a.jsonl", b'{"text": null}\n', "a.jsonl:1: 'text' is null, expected a text"),
    ("75 number", "a.jsonl", b'{"text": 5}\n', "a.jsonl:1: 'text' is a number, expected a text"),
    ("76 a line without end", "a.jsonl", b'{"text": "' + b"x" * 5000, "MiB: are these JSON lines?"),
    ("76 a line without end, packed", "a.jsonl.gz", gzip.compress(b"x" * 50000), "a.jsonl.gz: a line has more than"),
    ("77 not UTF-8", "a.jsonl", GOOD + b'{"text": "\xff"}\n', "a.jsonl:2: byte 0xff is not UTF-8"),
    ("77 UTF-16", "a.jsonl", GOOD.decode().encode("utf-16"), "a.jsonl:1: byte 0xff is not UTF-8"),
    ("77 half a pair", "a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: 'text' holds half a surrogate pair"),
    ("77 not UTF-8, packed", "a.txt.gz", gzip.compress(b"fine \xff"), "a.txt.gz:5: byte 0xff is not UTF-8"),
    ("78 empty texts", "a.jsonl", b'{"text": ""}\n' * 9, "data.train: the text gives no tokens"),
    ("80 no footer", "a.parquet", parquet(text=["a"])[:-5], "a.parquet: cannot be read as Parquet"),
    ("80 cut short", "a.parquet", parquet(text=["abc"] * 9)[:-200], "a.parquet: cannot be read as Parquet"),
    ("80 damaged", "a.parquet", parquet(text=["abc"] * 9)[:20] + b"\xff" * 9 + parquet(text=["abc"] * 9)[29:], "a.parquet: cannot be read as Parquet"),
    ("80 name that is no text", "a.parquet", parquet(text=["a"] * 3).replace(b"text", b"te\xff\xff"), "a.parquet: cannot be read as Parquet"),
    ("80 other schema", "a.parquet", parquet(body=["a"]), "a.parquet: there is no column 'text', only body"),
    ("80 other type", "a.parquet", parquet(text=[1, 2]), "a.parquet: the column 'text' holds int64, expected string"),
    ("80 null", "a.parquet", parquet(text=["a", None]), "a.parquet: record 2: its text is null"),
    ("80 text by that name", "a.parquet", b"a text", "a.parquet: cannot be read as Parquet"),
    ("80 renamed", "a.txt", parquet(text=["a"]), "a.txt:"),
    ("80 packed", "a.parquet.gz", gzip.compress(parquet(text=["a"])), "unpack it: Parquet files are not read inside gz"),
    ("81 gzip bomb", "a.txt.gz", gzip.compress(b"a" * 10**6), "it unpacks to more than 200 times its size"),
    ("81 xz bomb", "a.jsonl.xz", lzma.compress(b"\n" * 10**6), "it unpacks to more than 200 times its size"),
    ("81 zstd bomb", "a.txt.zst", zstandard.compress(b"a" * 10**7), "it unpacks to more than 200 times its size"),
    ("81 gzip cut short", "a.txt.gz", gzip.compress(b"some text")[:-9], "cannot unpack gz: it is cut short"),
    ("81 xz cut short", "a.txt.xz", lzma.compress(b"some text")[:-9], "cannot unpack xz: it is cut short"),
    ("81 zstd cut short", "a.txt.zst", zstandard.compress(b"some text")[:-3], "cannot unpack zst: it is cut short"),
    ("81 gzip damaged", "a.txt.gz", gzip.compress(b"some text")[:-6] + b"xxxxxx", "cannot unpack gz: it is damaged"),
    ("81 xz damaged", "a.txt.xz", lzma.compress(b"some text" * 9)[:30] + b"x" * 50, "cannot unpack xz: it is"),
    ("81 not packed", "a.txt.zst", b"plain text", "cannot unpack zst: it is damaged"),
    ("82 zip that leaves", "a.txt", ZIP + b"\0", "a.txt:5: this is zip data, not text"),
    ("82 tar that leaves", "a.tar.gz", gzip.compress(tar("../evil")), "this is tar data, not text"),
    ("83 absolute member", "a.tar.xz", lzma.compress(tar("/evil")), "this is tar data, not text"),
    ("84 link in a tar", "a.tar", tar("evil", tarfile.SYMTYPE), "this is tar data, not text"),
    ("85 device in a tar", "a.tar", tar("evil", tarfile.CHRTYPE), "this is tar data, not text"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of kilobytes is too long, and what grows two hundredfold is soon a bomb."""
    monkeypatch.setattr(jsonl, "MAX_LINE", 2**17)
    monkeypatch.setattr(unpack, "FREE", 2**14)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nothing here waits for the disk


@pytest.mark.parametrize(("number", "name", "content", "says"), CASES, ids=[c[0] for c in CASES])
def test_a_bad_file_is_told(
    page, write, monkeypatch, number: str, name: str, content: bytes, says: str
) -> None:
    if number.startswith("76"):
        monkeypatch.setattr(jsonl, "MAX_LINE", 2**10)
        monkeypatch.setattr(unpack, "FREE", 2**26)
        monkeypatch.setattr("ssmtrain.data.units.UNIT", 2**9)
    path = write(name, content)
    with pytest.raises(UserError) as error:
        prepare(page(train=str(path), val=str(write("v.txt", "v"))))
    told = "\n".join(error.value.lines)
    assert says in told and "data.train" in told, told
    assert len(error.value.lines) <= 5 and all(len(line) < 500 for line in error.value.lines)
    assert {p.name for p in path.parent.iterdir()} <= {name, "v.txt", "cache"}


def test_settings_that_do_nothing(page, write) -> None:
    path = str(write("a.txt", "text"))
    with pytest.raises(UserError, match=r"data\.text_key = body: no effect, as no file is JSON lines"):
        prepare(page(train=path, val=path, text_key="body"))


def test_a_gigabyte_in_a_kilobyte_takes_little_memory(write, page) -> None:
    """A bomb is refused after its first blocks, whatever it holds."""
    import tracemalloc

    path = write("a.txt.zst", zstandard.ZstdCompressor(level=1).compress(bytes(2**28)))
    tracemalloc.start()
    with pytest.raises(UserError, match="200 times"):
        prepare(page(train=str(path), val=str(write("v.txt", "v"))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**28


records = st.dictionaries(
    st.sampled_from(["text", "body", ""]), st.none() | st.text() | st.integers(), max_size=2
)
fragments = st.one_of(
    records.map(json.dumps).map(str.encode),
    st.binary(max_size=30),
    st.sampled_from(
        [
            b"",
            b"{",
            b"}",
            b'"',
            b'{"text": "',
            b"\xff",
            b"\0",
            b"[[",
            b"NaN",
            b"1e999",
            b'{"text": "\\ud800"}',
        ]
    ),
)
quick = tries(25)


@quick
@given(parts=st.lists(fragments, max_size=12), ending=st.sampled_from(["", ".gz"]), skip=st.booleans())
def test_lines_made_at_random(page, write, tmp_path: Path, parts, ending: str, skip: bool) -> None:
    """They give what json reads of them, line by line, or an error that names one."""
    data = b"\n".join(parts)
    path = write(f"a.jsonl{ending}", gzip.compress(data) if ending else data)
    texts, bad = [], 0
    for line in data.split(b"\n"):
        if line.strip():
            try:
                texts.append(json.loads(line.decode())["text"].encode())
            except Exception:
                bad += 1
    config = page(train=str(path), val=str(write("v.txt", "v")), skip_bad=skip)
    if (bad and not skip) or not any(texts):
        with pytest.raises(UserError):
            prepare(config)
        return
    entry = prepare(config).manifest.splits["train"]
    assert (entry.bytes, entry.skipped) == (sum(map(len, texts)), bad)
    assert entry.documents + entry.empty == len(texts)


@quick
@given(data=st.data())
def test_prepared_folders_harmed_at_random(page, write, data) -> None:
    """They are made again, or refused, or the same: never other tokens and never a traceback."""
    config = page(train=str(write("a.txt", "some text")), val=str(write("v.txt", "v")))
    made = prepare(config)
    before = [s.sha256 for s in made.manifest.splits.values()]
    name = data.draw(st.sampled_from(sorted(p.name for p in made.folder.iterdir())))
    path = made.folder / name
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    cut = data.draw(st.integers(at, len(content)))
    path.write_bytes(content[:at] + data.draw(st.binary(max_size=9)) + content[cut:])
    try:
        after = prepare(config)
    except UserError:
        for left in made.folder.iterdir():
            left.unlink()
        made.folder.rmdir()
        return
    assert [s.sha256 for s in after.manifest.splits.values()] == before
    ids = np.empty(after.stream("train").tokens, np.int64)
    after.stream("train").read(0, ids)
    assert bytes(ids[:-1].tolist()) == b"some text" and ids[-1] == 256


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", 10**18),
        ("tokens", -5),
        ("tokens", True),
        ("shards", []),
        ("file", "../../evil"),
        ("file", "/etc/passwd"),
        ("items", 10**30),
        ("items", 0),
        ("shard_tokens", 1),
        ("dtype", "O"),
        ("vocab_size", 3),
        ("splits", {}),
    ],
)
def test_manifests_that_lie(page, write, key: str, value) -> None:
    """A count, a name or a type of a stranger's manifest reaches no file and no memory."""
    config = page(train=str(write("a.txt", "some text")), val=str(write("v.txt", "v")))
    folder = prepare(config).folder

    def replaced(tree):
        if isinstance(tree, dict):
            return {k: value if k == key else replaced(v) for k, v in tree.items()}
        return [replaced(v) for v in tree] if isinstance(tree, list) else tree

    page_ = replaced(json.loads((folder / "manifest.json").read_text()))
    (folder / "manifest.json").write_text(json.dumps(page_))
    try:
        after = prepare(config)
    except UserError:
        return
    ids = np.empty(after.stream("train").tokens, np.int64)
    after.stream("train").read(0, ids)
    assert bytes(ids[:-1].tolist()) == b"some text"


def test_pipes_in_a_folder_are_passed_over(page, write, tmp_path: Path) -> None:
    write("t/a.txt", "text")
    os.mkfifo(tmp_path / "t/b.txt")
    made = prepare(page(train=str(tmp_path / "t"), val=str(write("v.txt", "v"))))
    assert made.manifest.splits["train"].documents == 1
