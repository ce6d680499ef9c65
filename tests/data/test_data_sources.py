"""Text files: found, divided, read in pieces, and refused with the key, the file and the offset."""

import os
from pathlib import Path

import pytest

from ssmtrain.config.errors import UserError
from ssmtrain.data import spans as spans_module
from ssmtrain.data.files import find, hold_out
from ssmtrain.data.sources import open_source, split_text
from ssmtrain.data.spans import Span, TextFile, pieces
from ssmtrain.data.tokenizer import FileTokenizer

INCLUDE = ["**/*.txt", "**/*.md"]


def names(files: list[TextFile]) -> list[str]:
    return [f.path.name for f in files]


@pytest.fixture
def tree(write, tmp_path: Path) -> Path:
    for name in ("b.txt", "a/z.md", "a/a.txt", "c.py", ".hidden/d.txt", "a/.e.txt", "é.txt"):
        write(f"tree/{name}", f"text of {name}\n")
    write("tree/empty.txt", "")
    return tmp_path / "tree"


def test_directory_in_sorted_order(tree: Path) -> None:
    files = find(str(tree), INCLUDE, "data.train")
    assert names(files) == ["a.txt", "z.md", "b.txt", "empty.txt", "é.txt"]
    assert names(find(str(tree), ["**/*.py"], "data.train")) == ["c.py"]


def test_paths_and_globs_in_the_order_given(tree: Path) -> None:
    given = [str(tree / "c.py"), str(tree / "a" / "*"), str(tree / "**" / "*.txt")]
    assert names(find(given, INCLUDE, "k")) == ["c.py", "a.txt", "z.md", "b.txt", "empty.txt", "é.txt"]


def test_a_name_with_glob_characters(write) -> None:
    assert names(find(str(write("[x]*.txt", "x")), INCLUDE, "k")) == ["[x]*.txt"]


def test_home_is_expanded(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("mine.txt", "x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names(find("~/mine.txt", INCLUDE, "k")) == ["mine.txt"]


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("*.txt", ["b.txt", "empty.txt", "é.txt"]),
        ("**", ["a.txt", "z.md", "b.txt", "c.py", "empty.txt", "é.txt"]),
        ("a/*", ["a.txt", "z.md"]),
        ("**/[ab].*", ["a.txt", "b.txt"]),
        ("*/**/?.md", ["z.md"]),
    ],
)
def test_include(tree: Path, include: str, expected: list[str]) -> None:
    assert names(find(str(tree), [include], "k")) == expected


def test_links(tree: Path, write) -> None:
    """A link to a file counts once, beside the file itself; a link to a folder is not followed."""
    (tree / "b2.txt").symlink_to(tree / "b.txt")
    (tree / "loop").symlink_to(tree)
    (tree / "dangling.txt").symlink_to(tree / "none")
    assert names(find(str(tree), ["**/b*.txt", "**/d*.txt"], "k")) == ["b.txt"]


def refused(page, **data) -> list[str]:
    """Lines of the error that preparing these files ends with."""
    from ssmtrain.data.prepare import prepare

    with pytest.raises(UserError) as error:
        prepare(page(**data))
    assert 1 <= len(error.value.lines) <= 5
    return error.value.lines


def test_missing(page, write, tmp_path: Path) -> None:
    write("corpus.txt", "x")
    lines = refused(page, train=str(tmp_path / "corpsu.txt"))
    assert lines == [
        f"data.train: {tmp_path}/corpsu.txt does not exist",
        f"did you mean {tmp_path}/corpus.txt?",
    ]
    assert refused(page, train=f"{tmp_path}/*.rst") == [f"data.train: no file matches {tmp_path}/*.rst"]
    assert "data.include=" in refused(page, train=str(tmp_path), include=["*.rst"])[0]
    assert refused(page, train=[]) == ["data.train: no files given"]
    val = refused(page, train=f"{tmp_path}/corpus.txt", val=f"{tmp_path}/none")
    assert val[0] == f"data.val: {tmp_path}/none does not exist"
    assert refused(page, train="a\0b") == ["data.train: a\0b does not exist"]


def test_empty(page, write, tmp_path: Path) -> None:
    first, second = (str(write(f"{n}.txt", "")) for n in "ab")
    assert refused(page, train=first) == [f"data.train: {first}: empty, no text to read"]
    assert refused(page, train=[first, second]) == ["data.train: all 2 files: empty, no text to read"]


def test_not_a_regular_file(page, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refused(page, train=f"{tmp_path}/pipe") == [f"data.train: {tmp_path}/pipe is not a regular file"]
    assert refused(page, train="/dev/zero") == ["data.train: /dev/zero is not a regular file"]


def test_permission(page, write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(write("a.txt", "x"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert refused(page, train=file) == [f"data.train: cannot read {file}: permission denied"]


@pytest.mark.parametrize(
    ("content", "offset", "why"),
    [
        (b"fine\xffnot", 4, "byte 0xff is not UTF-8"),
        (b"cut short \xe2\x82", 10, "byte 0xe2 is not UTF-8"),
        (b"lone surrogate \xed\xa0\x80", 15, "byte 0xed is not UTF-8"),
        (b"abc\0def", 3, "a NUL byte"),
        (b"abc\0d\xff", 3, "a NUL byte"),
        ("text".encode("utf-16"), 0, "byte 0xff is not UTF-8"),
        (b"x" * 300 + b"\xff", 300, "byte 0xff is not UTF-8"),
        (b"\x1f\x8b\x08\x00abc", 1, "this is gzip data, not text"),
        (b"PAR1\x00\x01", 4, "this is Parquet data, not text"),
    ],
)
def test_not_text(page, write, monkeypatch, content: bytes, offset: int, why: str) -> None:
    monkeypatch.setattr(spans_module, "PIECE", 64)
    good, bad = str(write("a.txt", "good text\n")), str(write("b.txt", content))
    lines = refused(page, train=[good, bad], val=good)
    assert lines[0].startswith(f"data.train: {bad}:{offset}: {why}")
    assert "data.include" in lines[-1]


def test_several_bad_files_are_named_at_once(page, write, tmp_path: Path) -> None:
    for i in range(6):
        write(f"t/{i}.txt", b"text \xff" if i % 2 or i == 4 else "text")
    lines = refused(page, train=str(tmp_path / "t"), val=str(write("v.txt", "v")))
    assert [line.split(":")[1].strip()[-5:] for line in lines[:-1]] == ["1.txt", "3.txt", "4.txt", "5.txt"]


def test_a_file_that_changes(page, write) -> None:
    path = write("a.txt", "some text here\n")
    span = open_source(page(train=str(path), val=str(path)).data).splits["train"][0]
    path.write_text("some text here, and more\n")
    with pytest.raises(UserError, match=r"a\.txt changed while it was read"):
        list(pieces(span))


def test_a_file_that_changes_between_two_pieces(page, write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans_module, "PIECE", 8)
    path = write("a.txt", "some text here\n")
    reading = pieces(open_source(page(train=str(path), val=str(path)).data).splits["train"][0])
    next(reading)
    path.write_text("some text HERE\n")
    with pytest.raises(UserError, match=r"a\.txt changed while it was read"):
        list(reading)


PROSE = "The quick fox, naïve;\n\n  and the lazy\tdog.\r\nIt's 日本語 and 🙂🙂 text.\nEnd of it\n" * 40


@pytest.mark.parametrize("size", [8, 50, 64, 100, 1000, 10**6])
@pytest.mark.parametrize("text", [PROSE, PROSE.replace("\n", " "), "é🙂" * 300, " " * 500, "x" * 500])
def test_pieces_are_the_text(write, monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setattr(spans_module, "PIECE", size)
    span = Span(find(str(write("a.txt", text)), [], "k")[0], 0, len(text.encode()))
    found = list(pieces(span))
    assert "".join(found) == text
    assert all(0 < len(p.encode()) <= size for p in found)


def test_pieces_give_the_tokens_of_the_whole(write, bpe, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = FileTokenizer(bpe)
    span = Span(find(str(write("a.txt", PROSE)), [], "k")[0], 0, len(PROSE.encode()))
    monkeypatch.setattr(spans_module, "PIECE", 200)
    cut = [i for ids in tokenizer.encode_all(list(pieces(span))) for i in ids.tolist()]
    assert cut == tokenizer.encode(PROSE).tolist()


def held(page, paths: list[Path], fraction: float) -> tuple[bytes, bytes]:
    data = page(train=[str(p) for p in paths], val_fraction=fraction).data
    return split_text(data, "train"), split_text(data, "val")


def test_hold_out_inside_one_document(page, write) -> None:
    path = write("a.txt", PROSE)
    train, val = held(page, [path], 0.1)
    assert train + val == PROSE.encode() and train.endswith(b"\n")
    assert abs(len(val) - 0.1 * len(PROSE.encode())) < 100
    for text in ("x" * 100, "é" * 100, "word " * 50):
        train, val = held(page, [write("b.txt", text)], 0.5)
        assert (train + val).decode() == text and train.decode() and val.decode()


def test_hold_out_between_documents(page, write) -> None:
    paths = [write(f"{i:02d}.txt", f"{i:02d} " * 20 + "\n") for i in range(40)]
    train, val = held(page, paths, 0.1)
    assert val == b"".join(p.read_bytes() for p in paths[36:])
    assert train == b"".join(p.read_bytes() for p in paths[:36])


def test_hold_out_inside_when_no_boundary_is_near(page, write) -> None:
    paths = [write(f"{i}.txt", PROSE) for i in range(3)]
    train, val = held(page, paths, 0.45)
    assert train + val == PROSE.encode() * 3 and train.endswith(b"\n")
    assert abs(len(val) - 0.45 * 3 * len(PROSE.encode())) < 100


def test_hold_out_never_empties_a_side(write) -> None:
    files = find([str(write("a.txt", "a" * 10)), str(write("b.txt", "b" * 5000))], [], "k")
    whole = [Span(f, 0, f.size) for f in files]
    for fraction in (0.001, 0.05, 0.5, 0.9, 0.9999):
        train, val = hold_out(whole, fraction)
        assert sum(s.stop - s.start for s in train + val) == 5010 and train and val


def test_too_short_to_divide(page, write) -> None:
    assert "too short" in refused(page, train=str(write("a.txt", "x")))[0]


def test_limit(page) -> None:
    text = split_text(page().data, "val", limit=2000)
    assert len(text) == 2000 and text.startswith(b"Persuasion\n")


def test_the_same_file_twice(page, write, caplog: pytest.LogCaptureFixture) -> None:
    path = str(write("a.txt", "text"))
    source = open_source(page(train=[path, path], val=path).data)
    assert len(source.splits["train"]) == 1
    assert "also in data.train" in caplog.text


def test_json_is_read_as_text_with_a_warning(page, write, caplog: pytest.LogCaptureFixture) -> None:
    path = str(write("a.json", '{"text": "x"}\n'))
    open_source(page(train=path, val=path).data)
    assert "read as plain text" in caplog.text
