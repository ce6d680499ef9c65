"""The table of bad inputs that `prepare` and `fit` read: each is given to the command line as it is.

Those of it that are wrong text are in test_data_bad_files.py. What can only be damage of a prepared folder is
told and made anew from the sources where its sizes show it, and ends with exit 2 where only its content does.
"""

# One case a line, however long.
# ruff: noqa: E501

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssmtrain.cli import main
from ssmtrain.data import prepare as prepare_module

PAGE = """\
name: tiny
model:
  d_model: 16
  layout: M
  blocks: {M: {mixer: {kind: mamba2, d_state: 8, head_dim: 8}}}
trainer: {max_steps: 1, global_batch: 128, val_every: 0, threads: 1}
data: {kind: text, train: texts, val: val.txt, seq_len: 32, cache_dir: cache}
"""
SECONDS = 4.0
TRAIN, VAL, STARTS, MANIFEST = "train-00001.bin", "val-00000.bin", "train-documents.bin", "manifest.json"
ANEW = "it is made anew"
DELETE = "run again: it is made anew from the sources"

Spoil = Callable[[Path, Path], Any]
"""What is done to the user's folder and to the prepared one."""


@dataclass(frozen=True)
class Case:
    """One bad input: its number in the catalogue, what makes it, what is said, words, verb, exit code."""

    number: str
    spoil: Spoil
    says: tuple[str, ...]
    words: tuple[str, ...] = ()
    verb: str = "prepare"
    code: int = 2


def refused(number: str, spoil: Spoil, *says: str, words: str = "", verb: str = "prepare") -> Case:
    """It ends with exit 2."""
    return Case(number, spoil, says, tuple(words.split()), verb)


def said(number: str, spoil: Spoil, *says: str, words: str = "", verb: str = "prepare") -> Case:
    """It is told and what was asked for is done."""
    return Case(number, spoil, says, tuple(words.split()), verb, 0)


def nothing(here: Path, made: Path) -> None:
    """The words are what is wrong."""


def file(name: str, content: str | bytes) -> Spoil:
    """A file of the user's."""
    data = content.encode() if isinstance(content, str) else content
    return lambda here, made: (here / name).write_bytes(data)


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    """A prepared file with other bytes."""
    return lambda here, made: (made / name).write_bytes(change((made / name).read_bytes()))


def items(name: str, dtype: str, change: Callable[[np.ndarray], Any]) -> Spoil:
    """A prepared file with other numbers in it."""

    def spoil(here: Path, made: Path) -> None:
        found = np.fromfile(made / name, dtype)
        changed = change(found)
        (found if changed is None else np.asarray(changed, found.dtype)).tofile(made / name)

    return spoil


def manifest(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """A manifest that says something else."""

    def spoil(here: Path, made: Path) -> None:
        page = json.loads((made / MANIFEST).read_text())
        change(page)
        (made / MANIFEST).write_text(json.dumps(page))

    return spoil


def twice(page: dict[str, Any]) -> None:
    train = page["splits"]["train"]
    train["shards"] = [train["shards"][0]] * 2 + train["shards"][1:]
    train["tokens"] += page["shard_tokens"]


def starts(*wrong: int) -> Callable[[np.ndarray], Any]:
    return lambda found: [*wrong, *found[len(wrong) :]]


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """A tokenizer.json of the words of the texts, with something changed."""

    def spoil(here: Path, made: Path) -> None:
        words = {"<unk>": 0, "<|endoftext|>": 1, "some": 2, "text": 3, "to": 4, "train": 5, "validate": 6}
        added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        page = {
            "version": "1.0",
            "added_tokens": [{"id": 0, "content": "<unk>", **added}, {"id": 1, "content": "<|endoftext|>", **added}],
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
        }  # fmt: skip
        change(page)
        (here / "t.json").write_text(json.dumps(page))

    return spoil


def add(page: dict[str, Any], number: int) -> None:
    page["added_tokens"].append({**page["added_tokens"][0], "id": number, "content": "<x>"})


def swap(here: Path, made: Path) -> None:
    """Another text in place of one that was prepared: as long, and of the same time."""
    path = here / "texts" / "a.txt"
    before = path.stat()
    path.write_text(path.read_text().replace("some", "same"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def same_text(here: Path, made: Path) -> None:
    """A validation text that is a copy of what is trained on."""
    (here / "only.txt").write_text("some text to train\n" * 40)
    shutil.copy(here / "only.txt", here / "copy.txt")


TOKENIZER = "tokenizer={kind:file,path:t.json}"
MIX = "data={kind:mix,seq_len:32,cache_dir:cache,sources:{prose:{kind:text,train:%s,val:val.txt}}}"
CASES = [
    refused("66 missing file", nothing, "data.train: textz does not exist", "did you mean texts?", words="data.train=textz"),
    refused("66 missing validation file", nothing, "data.val: nowhere.txt does not exist", words="data.val=nowhere.txt"),
    refused("66 pattern of nothing", nothing, "data.train: no file matches *.rst", words="data.train='*.rst'"),
    refused("66 missing source", nothing, "data.train: nowhere does not exist", words=MIX % "nowhere"),
    refused("66 missing tokenizer", nothing, "tokenizer.path = 't.json': there is no such file", words=TOKENIZER),
    refused("67 folder without texts", lambda here, made: (here / "bare").mkdir(), "data.val: no file in bare matches data.include=", words="data.val=bare"),
    refused("67 folder as a tokenizer", lambda here, made: (here / "t.json").mkdir(), "tokenizer.path = 't.json': not a regular file", words=TOKENIZER),
    refused("67 file as a folder", nothing, "data.train: val.txt/a.txt does not exist", words="data.train=val.txt/a.txt"),
    refused("67 file as the cache", nothing, "data.cache_dir: cannot write", "val.txt", "set data.cache_dir=", words="data.cache_dir=val.txt"),
    refused("68 zero-byte text", file("val.txt", ""), "data.val:", "val.txt: empty, no text to read"),
    said("68 zero-byte shard", bytes_of(TRAIN, lambda data: b""), f"{TRAIN}: 0 bytes, the manifest says", ANEW),
    said("68 shard that is gone", lambda here, made: (made / VAL).unlink(), f"{VAL}: No such file or directory", ANEW),
    said("69 half a token", bytes_of(TRAIN, lambda data: data[:-1]), f"{TRAIN}: ", " bytes, the manifest says ", ANEW),
    said("69 half a document start", bytes_of(STARTS, lambda data: data + b"\0"), f"{STARTS}: ", ANEW),
    refused("70 token id beyond the vocabulary", items("train-00002.bin", "<u2", lambda ids: ids.put(-2, 999)), "train-00002.bin: token 34 (byte 68) is 999, the vocabulary has 257", DELETE),
    refused("71 negative token id", items(TRAIN, "<i2", lambda ids: ids.put(7, -1)), f"{TRAIN}: token 7 (byte 14) is 65535, the vocabulary has 257", DELETE),
    refused("72 other endianness", items(VAL, "<u2", lambda ids: ids.byteswap()), f"{VAL}: token 0 (byte 0) is ", DELETE),
    said("72 other type", manifest(lambda page: page.update(dtype=">u2")), "manifest.json: dtype", ANEW),
    said("72 other format", manifest(lambda page: page.update(format=99)), "manifest.json: it is of format 99", ANEW),
    refused("73 index past the end", items(STARTS, "<i8", starts(0, 10**6)), f"{STARTS}: document 1 starts at 1000000, out of order", DELETE),
    refused("73 decreasing index", items(STARTS, "<i8", lambda found: found[[0, 2, 1]]), f"{STARTS}: document 1 starts at", DELETE),
    refused("73 index that does not begin at 0", items(STARTS, "<i8", starts(1)), f"{STARTS}: document 0 starts at 1, out of order", DELETE),
    refused("73 index that wraps round", items(STARTS, "<i8", starts(0, 2**63 - 1, -2)), f"{STARTS}: document 1 starts at {2**63 - 1}, out of order", DELETE),
    said("73 count beyond 64 bits", manifest(lambda page: page["splits"]["train"].update(documents=2**70)), "manifest.json: its counts do not agree", ANEW),
    said("73 negative count", manifest(lambda page: page["splits"]["train"].update(tokens=-5)), "manifest.json: its counts do not agree", ANEW),
    refused("79 less than a row", file("few.txt", "short"), "data.train: 6 tokens do not fill one row of data.seq_len=32", "give more text, or set a smaller data.seq_len", words="data.train=few.txt", verb="fit"),
    refused("79 too short to hold some out", file("few.txt", "x"), "data.val: the text is too short", "give data.val a file of its own", words="data.train=few.txt data.val=null"),
    said("86 script beside the texts", file("texts/load.py", "open('owned', 'w')"), "1 scripts, such as texts/load.py, are neither run nor read"),
    refused("86 script that loads", lambda here, made: [(here / "set").mkdir(), (here / "set/set.py").write_text("open('owned', 'w')")], "data.path: cannot read the split train of set: Dataset scripts are no longer supported, but found set.py", words="data={kind:hub,path:set,seq_len:32,cache_dir:cache}"),
    refused("87 flipped bit", bytes_of(TRAIN, lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:]), f"{TRAIN}: its sha256 is ", "the manifest says", DELETE),
    refused("87 digest of a split", manifest(lambda page: page["splits"]["val"].update(sha256="0" * 64)), "manifest.json: its digest of a split is not that of the split's files", DELETE),
    refused("87 list of sources", bytes_of("sources.jsonl", lambda data: data.replace(b"texts", b"tezts")), "sources.jsonl: its sha256 is ", DELETE),
    refused("87 list of sources that is gone", lambda here, made: (made / "sources.jsonl").unlink(), "sources.jsonl: No such file or directory", DELETE),
    said("88 shard added", lambda here, made: shutil.copy(made / TRAIN, made / "train-00007.bin"), "train-00007.bin is not in the manifest and is ignored"),
    said("88 text added", file("texts/more.txt", "more text to train"), "prepared in"),
    said("89 shard listed twice", manifest(twice), "manifest.json: it lists train-00000.bin twice", ANEW),
    said("89 file named twice", nothing, "prepared in", words="data.train=[texts,texts/a.txt,texts/a.txt]"),
    said("91 validates on what it trains on", nothing, "data.val: 1 files are also in data.train, such as", words="data.train=[texts,val.txt]"),
    said("91 validates on a copy", same_text, "data.val is the text of data.train, word for word", words="data.train=only.txt data.val=copy.txt", verb="data show step=1"),
    refused("93 FIFO", lambda here, made: os.mkfifo(here / "pipe.txt"), "data.train:", "pipe.txt is not a regular file", words="data.train=pipe.txt"),
    refused("93 device", nothing, "data.train: /dev/zero is not a regular file", words="data.train=/dev/zero"),
    refused("93 device to validate", nothing, "data.val: /dev/zero is not a regular file", words="data.val=/dev/zero"),
    refused("93 device as a tokenizer", nothing, "tokenizer.path = '/dev/zero': not a regular file", words="tokenizer={kind:file,path:/dev/zero}"),
    refused("93 FIFO as a tokenizer", lambda here, made: os.mkfifo(here / "t.json"), "tokenizer.path = 't.json': not a regular file", words=TOKENIZER),
    refused("94 empty", file("t.json", ""), "tokenizer.path: t.json is not a tokenizer.json: ", "or tokenizer=bytes", words=TOKENIZER),
    refused("94 half of it", file("t.json", '{"version": "1.0", "model": {'), "tokenizer.path: t.json is not a tokenizer.json: ", words=TOKENIZER),
    refused("94 other JSON", file("t.json", "[1]"), "tokenizer.path: t.json is not a tokenizer.json: ", words=TOKENIZER),
    refused("94 not UTF-8", file("t.json", b"\xff\xfe{"), "tokenizer.path: t.json is not a tokenizer.json: ", words=TOKENIZER),
    refused("94 endless nesting", file("t.json", "[" * 10**5), "tokenizer.path: t.json is not a tokenizer.json: ", words=TOKENIZER),
    refused("94 unknown model", tokenizer(lambda page: page["model"].update(type="Magic")), "tokenizer.path: t.json is not a tokenizer.json: ", words=TOKENIZER),
    refused("95 no end of text", tokenizer(lambda page: [page["model"]["vocab"].pop("<|endoftext|>"), page["added_tokens"].pop()]), "tokenizer.end_of_text: t.json has no end-of-text token under a usual name", "its special tokens: <unk>", "set tokenizer.end_of_text=", words=TOKENIZER),
    refused("95 named end of text", tokenizer(lambda page: None), "tokenizer.end_of_text: t.json has no token '<eos>'", words="tokenizer={kind:file,path:t.json,end_of_text:'<eos>'}"),
    refused("96 gap before an added token", tokenizer(lambda page: add(page, 50)), "tokenizer.path: t.json: the added token '<x>' has the id 50, which follows no other", "read it as 7", "without gaps", words=TOKENIZER),
    refused("96 gap beyond the model's vocabulary", tokenizer(lambda page: page["model"]["vocab"].update(far=500)), "model.vocab_size = 300: smaller than the tokenizer's 501", words=f"{TOKENIZER} model.vocab_size=300"),
    said("96 gap in the vocabulary", tokenizer(lambda page: page["model"]["vocab"].update(far=500)), "501 ids", words=TOKENIZER),
    said("97 swapped text of the same size", swap, "prepared in"),
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three texts to train on, one to validate, a page that makes shards of 60 tokens of them."""
    (tmp_path / "texts").mkdir()
    for name in "abc":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name}: some text to train\n" * 2 + name * 7)
    (tmp_path / "val.txt").write_text("some text to validate\n" * 2)
    (tmp_path / "page.yaml").write_text(PAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 60)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setenv("GOMP_SPINCOUNT", "2000")  # or `fit` would first look whether the CPU is busy
    for variable in ("SSMTRAIN_RUN", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def prepared(here: Path) -> Path:
    """The prepared folder."""
    assert main(["prepare", "config=page.yaml"]) == 0
    return next((here / "cache").glob("*/manifest.json")).parent


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.number)
def test_a_bad_input_is_told(
    one: Case, here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    made = here if one.words else prepared(here)
    capsys.readouterr()
    caplog.set_level("INFO", "ssmtrain")
    one.spoil(here, made)
    verb, *more = one.verb.split()
    line = [*([verb, *more[:1]] if verb == "data" else [verb]), "config=page.yaml", *more[1:], *one.words]
    before = time.process_time()
    code = main(line)
    spent = time.process_time() - before
    shown = capsys.readouterr()
    told = shown.err if one.code else f"{shown.out}{caplog.text}"
    assert code == one.code, shown.out + shown.err
    assert "Traceback" not in told and ("error: " in told) == bool(one.code)
    for part in one.says:
        assert part in told, told
    assert all(len(text) < 500 for text in told.splitlines()) and spent < SECONDS
    assert not (here / "owned").exists()
    if one.code == 0 and not one.words:
        again = json.loads((made / MANIFEST).read_text())
        for split in again["splits"].values():
            for shard in (*split["shards"], split["starts"]):
                assert hashlib.sha256((made / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


def raising(error: OSError) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("92 text", "data.train: cannot read"),
        ("92 text when it is opened", "texts/a.txt: Permission denied"),
        ("92 tokenizer", "tokenizer.path: cannot read t.json: Permission denied"),
        ("92 folder of the tokenizer", "tokenizer.path = 't.json': cannot be read: Permission denied"),
        ("92 page", "page.yaml: cannot be read: Permission denied"),
        ("92 folder of the page", "config=page.yaml: cannot be read: Permission denied"),
        ("92 cache", "data.cache_dir: cannot write"),
        ("92 shard", "train-00001.bin: Permission denied"),
    ],
)  # fmt: skip
def test_92_permission_denied(
    what: str, says: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may read everything, so the refusal of the system is played."""
    name = {"text when it is opened": "a.txt", "tokenizer": "t.json", "page": "page.yaml"}.get(what[3:], "")
    tokenizer(lambda page: None)(here, here)
    words = [TOKENIZER] if "tokenizer" in what else []
    denied = PermissionError(13, "Permission denied", name or str(here / "cache"))

    def guard(where: Any, method: str, names: tuple[str, ...]) -> None:
        real = getattr(where, method)

        def call(path: Any, *args: Any, **options: Any) -> Any:
            if str(path).endswith(names):
                raise denied
            return real(path, *args, **options)

        monkeypatch.setattr(where, method, call)

    if what == "92 text":
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        words = ["data.train=val.txt"]
    elif what in ("92 folder of the tokenizer", "92 folder of the page"):
        guard(Path, "stat", ("t.json",) if "tokenizer" in what else ("page.yaml",))
    elif what == "92 cache":
        monkeypatch.setattr(Path, "touch", raising(denied))
        words = ["data.train=val.txt"]
    elif what == "92 shard":
        denied.filename = "train-00001.bin"
        monkeypatch.setattr(np, "memmap", raising(denied))
        (prepared(here) / "verified.json").unlink()
        capsys.readouterr()
    else:
        guard(Path, "open", (name,))
        guard(os, "open", (name,))
        guard(Path, "read_bytes", (name,))
    assert main(["prepare", "config=page.yaml", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and says in told and "Traceback" not in told, told
