"""JSON lines, Parquet, packed files and streamed data sets: the same documents give the same tokens."""

import gzip
import json
import logging
import lzma
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ssmtrain.config.errors import UserError
from ssmtrain.data import encode, units
from ssmtrain.data.prepare import Prepared, prepare
from ssmtrain.data.seen import Seen
from ssmtrain.data.sources import split_text
from ssmtrain.data.tokenizer import ByteTokenizer

TEXTS = [
    f'Text {i}: naïve 日本語 🙂, with a "quote"\nand a second line.{" and so on" * (i % 7)}\n'
    for i in range(60)
]
VAL = TEXTS[:3]


def lines(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, key: t}).encode() + b"\n" for i, t in enumerate(texts))


def table(path: Path, texts: list, key: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), key: texts}), path, row_group_size=17)
    return path


def tokens(prepared: Prepared, split: str = "train") -> tuple[list[int], list[int]]:
    stream = prepared.stream(split)
    ids = np.empty(stream.tokens, np.int64)
    stream.read(0, ids)
    return ids.tolist(), stream.starts.tolist()


@pytest.fixture
def plain(page, write, tmp_path: Path) -> tuple[list[int], list[int]]:
    """The tokens of the texts as plain files."""
    for i, text in enumerate(TEXTS):
        write(f"plain/{i:02d}.txt", text)
    return tokens(prepare(page(train=str(tmp_path / "plain"), val=str(write("v.txt", "v")))))


PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("ending", PACK)
def test_json_lines_are_the_texts(page, write, plain, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT", 300)  # many units, cut inside lines
    pack = PACK[ending]
    first, second = pack(lines(TEXTS[:25])), pack(b"\n" + lines(TEXTS[25:]).rstrip(b"\n"))
    path = write(f"a.jsonl{ending}", first + second)  # two members, an empty line, no end of the last line
    assert tokens(prepare(page(train=str(path), val=str(write("v.txt", "v"))))) == plain


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_a_packed_text_is_one_document(page, write, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmtrain.data.spans.PIECE", 100)
    text = "".join(TEXTS)
    value = str(write("v.txt", "v"))
    packed = prepare(page(train=str(write(f"a.txt{ending}", PACK[ending](text.encode()))), val=value))
    whole = prepare(page(train=str(write("a.txt", text)), val=value))
    assert tokens(packed) == tokens(whole) and len(tokens(packed)[1]) == 1


def test_parquet_is_the_texts(page, write, plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT", 500)
    monkeypatch.setattr("ssmtrain.data.parquet.ROWS", 7)
    path = table(tmp_path / "a.parquet", TEXTS)
    assert tokens(prepare(page(train=str(path), val=str(write("v.txt", "v"))))) == plain
    large = pyarrow.table({"body": pyarrow.array(TEXTS, pyarrow.large_string())})
    pyarrow.parquet.write_table(large, tmp_path / "large.bin")
    data = {"train": f"{tmp_path}/large.bin", "val": f"{tmp_path}/large.bin"}
    assert tokens(prepare(page(**data, format="parquet", text_key="body"))) == plain


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_a_data_set_is_streamed(page, write, plain, tmp_path: Path, form: str) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    if form == "parquet":
        table(tmp_path / "set/train.parquet", TEXTS, "body")
        table(tmp_path / "set/test.parquet", VAL, "body")
    else:
        write("set/train.jsonl", lines(TEXTS, "body"))
        write("set/test.jsonl", lines(VAL, "body"))
    made = prepare(page(path=str(tmp_path / "set"), val="test", text_key="body"))
    assert tokens(made) == plain and made.manifest.splits["val"].documents == 3
    held = prepare(page(path=str(tmp_path / "set"), text_key="body", val_fraction=0.1)).manifest.splits
    assert (held["train"].documents, held["val"].documents) == (54, 6)


def test_a_data_set_that_is_not_there(page, write, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write("set/train.jsonl", lines(TEXTS))
    with pytest.raises(UserError, match=r"data\.path: cannot read the split nowhere of .*set"):
        prepare(page(path=str(tmp_path / "set"), train="nowhere"))
    with pytest.raises(UserError, match=r"data\.text_key: .*set has no field 'body', only id, text"):
        prepare(page(path=str(tmp_path / "set"), text_key="body"))
    (tmp_path / "code").mkdir()
    script = write("code/code.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=r"data\.path: cannot read"):
        prepare(page(path=str(script.parent)))
    assert not (tmp_path / "ran").exists()


def test_records_are_held_out_evenly(page, write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT", 400)
    path = str(write("a.jsonl", lines(TEXTS)))
    made = prepare(page(train=path, val_fraction=0.1))
    val = [t for i, t in enumerate(TEXTS) if i % 10 == 9]
    assert split_text(page(train=path, val_fraction=0.1).data, "val").decode() == "".join(val)
    ids, _ = tokens(made, "val")
    assert ByteTokenizer().decode(ids) == "".join(t + "\n" for t in val)
    train, _ = tokens(made, "train")
    assert len(train) + len(ids) == sum(len(t.encode()) + 1 for t in TEXTS)
    with pytest.raises(UserError, match=r"data\.val: too few documents to hold 0.05 of them out"):
        prepare(page(train=str(write("few.jsonl", lines(TEXTS[:5])))))


def test_text_and_records_side_by_side(page, write, tmp_path: Path) -> None:
    write("both/README.md", "x")  # too short to divide
    write("both/a.jsonl", lines(TEXTS))
    made = prepare(page(train=str(tmp_path / "both"), val_fraction=0.1)).manifest
    assert (made.splits["train"].documents, made.splits["val"].documents) == (55, 6)


def test_the_list_of_sources(page, write, tmp_path: Path) -> None:
    write("s/a.txt", "first")
    write("s/b.jsonl", lines(["one", "two", ""]))
    made = prepare(page(train=str(tmp_path / "s"), val=str(write("v.txt", "to validate"))))
    found = [json.loads(line) for line in (made.folder / "sources.jsonl").read_text().splitlines()]
    told = [(Path(f["path"]).name, f["split"], f["documents"], f["bytes"]) for f in found]
    assert told == [("a.txt", "train", 1, 5), ("b.jsonl", "train", 3, 6), ("v.txt", "val", 1, 11)]
    assert found[1]["size"] == (tmp_path / "s/b.jsonl").stat().st_size
    assert made.manifest.sources.entries == 3 and made.manifest.splits["train"].empty == 1


@pytest.mark.parametrize("form", ["files", "lines", "packed"])
def test_duplicates_are_left_out(
    page, write, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT", 200)
    texts = [TEXTS[i % 20] for i in range(50)] + ["", ""]
    if form == "lines":
        train, val = str(write("t.jsonl", lines(texts))), str(write("v.jsonl", lines([TEXTS[3], "new"])))
    else:
        ending = ".gz" if form == "packed" else ""
        pack = PACK[ending]
        for i, text in enumerate(texts):
            write(f"t/{i:02d}.txt{ending}", pack(text.encode()))
        write(f"v/0.txt{ending}", pack(TEXTS[3].encode()))
        write(f"v/1.txt{ending}", pack(b"new"))
        train, val = str(tmp_path / "t"), str(tmp_path / "v")
    made = prepare(page(train=train, val=val, drop_duplicates=True)).manifest.splits
    assert (made["train"].documents, made["train"].duplicates, made["train"].empty) == (20, 30, 2)
    assert (made["val"].documents, made["val"].duplicates) == (1, 1)  # what was trained on does not validate
    kept = prepare(page(train=train, val=val)).manifest.splits
    assert (kept["train"].documents, kept["train"].duplicates) == (50, 0)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_long_documents_are_cut_and_still_one(
    page, write, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document of many units keeps its tokens, counts once, and is left out whole."""
    texts = ["".join(TEXTS), "".join(TEXTS[::-1]), "".join(TEXTS), "short", "bad \xff" * 900]
    coded = [t.encode("latin-1" if i == 4 else "utf-8") for i, t in enumerate(texts)]
    paths = [str(write(f"{i}.txt{ending}", PACK[ending](t))) for i, t in enumerate(coded)]
    data = {"train": paths, "val": str(write("v.txt", "v")), "skip_bad": True}
    whole = prepare(page(**data))
    monkeypatch.setattr(units, "UNIT", 700)
    monkeypatch.setattr(units, "LONG", 900)
    monkeypatch.setattr("ssmtrain.data.spans.PIECE", 90)
    cut = prepare(page(**data, cache_dir=str(Path(paths[0]).parent / "other")))
    assert tokens(cut) == tokens(whole) and cut.manifest.splits == whole.manifest.splits
    assert (cut.manifest.splits["train"].documents, cut.manifest.splits["train"].skipped) == (4, 1)
    dropped = prepare(page(**data, drop_duplicates=True)).manifest.splits["train"]
    assert (dropped.documents, dropped.duplicates, dropped.skipped) == (3, 1, 1)
    ids, _ = tokens(cut)
    assert ByteTokenizer().decode(ids) == "".join(t + "\n" for t in texts[:4])


def test_bad_documents_are_left_out_and_named(page, write, caplog: pytest.LogCaptureFixture) -> None:
    bad = b'{"text": null}\n{"text": "half \\ud800"}\n{"text": 5}\n[]\n{"body": "x"}\n{\n\xff\n'
    path = str(write("a.jsonl", lines(["one"]) + bad + lines(["two"])))
    with caplog.at_level(logging.WARNING):
        made = prepare(page(train=path, val=str(write("v.txt", "v")), skip_bad=True)).manifest.splits["train"]
    assert (made.documents, made.skipped, made.bytes) == (2, 7, 6)
    assert caplog.text.count("left out:") == 3 and f"{path}:2:" in caplog.text


def test_seen_is_a_set() -> None:
    draw, seen, known = np.random.default_rng(0), Seen(), set()
    for _ in range(40):
        few = np.zeros((draw.integers(0, 300), 16), np.uint8)
        few[:, [0, 1, 9]] = draw.integers(0, (256, 16, 2), (len(few), 3))  # many equal, many in one place
        digests = few.view("V16")[:, 0]
        expected = []
        for one in digests.tolist():
            expected.append(one not in known)
            known.add(one)
        assert seen.add(digests).tolist() == expected
    assert len(seen) == len(known) > 0.75 * 4096  # it grew


def test_workers_change_nothing(page, write, bpe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, threads, and processes give the same bytes."""
    monkeypatch.setattr(units, "UNIT", 500)
    monkeypatch.setattr(encode, "ALONE", 1)
    for i, text in enumerate(TEXTS):
        write(f"t/{i:02d}.txt", text)
    value = str(write("v.jsonl", lines(VAL)))
    for tokenizer, val in ((None, str(write("v.txt", "v"))), (bpe, value)):
        made = []
        for workers in (1, 2, 3):
            data = {"train": str(tmp_path / "t"), "val": val, "cache_dir": str(tmp_path / f"cache{workers}")}
            folder = prepare(page(**data, tokenizer=tokenizer), workers=workers).folder
            made.append({p.name: p.read_bytes() for p in folder.iterdir() if p.name != "verified.json"})
        assert made[0] == made[1] == made[2]
