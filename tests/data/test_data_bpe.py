"""A tokenizer that is trained on the training text: the same each time, kept, and a part of its data."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from ssmtrain.config.data import BpeTokenizer, MixData
from ssmtrain.config.errors import UserError
from ssmtrain.config.schema import RunConfig
from ssmtrain.data import bpe, units
from ssmtrain.data.module import open_data
from ssmtrain.data.prepare import prepare
from ssmtrain.data.tokenizer import FileTokenizer, load_tokenizer, vocab_rows

TEXT = "".join(f"the cat number {i} sat on the mat by door {i * i}, naïve as ever;\n" for i in range(400))


@pytest.fixture
def config(page, write):
    """Ten files to train on, one to validate that says something else."""
    for i in range(10):
        folder = write(f"t/{i}.txt", f"file {i}\n{TEXT}").parent
    val = str(write("v.txt", "zyzzyva zyzzyva zyzzyva\n" * 200))
    return page(tokenizer=BpeTokenizer(vocab_size=400), train=str(folder), val=val)


def test_trained_and_used(config, own_cache: Path) -> None:
    made = prepare(config)
    folders = {p.name.rsplit("-", 1)[0] for p in own_cache.iterdir() if p.name[0] != "."}
    assert folders == {"t", "t-bpe-400"}
    tokenizer = load_tokenizer(config.tokenizer, config.data)
    assert made.manifest.tokenizer == tokenizer.hash
    assert tokenizer.vocab_size == made.manifest.vocab_size == 400
    stream = made.stream("train")
    ids = np.empty(stream.tokens, np.int64)
    stream.read(0, ids)
    assert tokenizer.decode(ids) == "".join(f"file {i}\n{TEXT}\n" for i in range(10))
    assert stream.entry.bytes / stream.tokens > 3
    val = made.manifest.splits["val"]
    assert val.bytes / val.tokens < 2  # its words were not seen


def test_the_same_each_time(config, own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = bpe.trained(config.tokenizer, config.data)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "again"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    second = bpe.trained(config.tokenizer, config.data)
    assert first != second and first.read_bytes() == second.read_bytes()
    monkeypatch.setattr(bpe, "train", lambda *args: pytest.fail("it is there"))
    assert bpe.trained(config.tokenizer, config.data) == second


def test_a_damaged_one_is_trained_again(config) -> None:
    path = bpe.trained(config.tokenizer, config.data)
    before = path.read_bytes()
    path.write_bytes(before.replace(b"Byte", b"byte", 1))
    assert bpe.trained(config.tokenizer, config.data).read_bytes() == before


def test_the_sample_is_spread_and_bounded(config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT", 20_000)
    monkeypatch.setattr(units, "DOCUMENTS", 1)
    read: list[str] = []

    def train(texts, size):
        read.extend(texts)
        return b"{}"

    monkeypatch.setattr(bpe, "train", train)
    total = sum(p.stat().st_size for p in Path(config.data.train).iterdir())
    with pytest.raises(UserError, match="not a tokenizer"):
        bpe.trained(config.tokenizer.model_copy(update={"sample_bytes": total // 2}), config.data)
    assert [text.split("\n")[0] for text in read] == [f"file {i}" for i in (0, 2, 4, 6, 8)]
    assert "zyzzyva" not in "".join(read)


def test_a_sample_smaller_than_the_first_part_of_a_text_is_its_beginning(config, page, write) -> None:
    text = str(write("long.txt", TEXT * 20))
    small = config.tokenizer.model_copy(update={"sample_bytes": 50_000})
    path = bpe.trained(small, page(train=text, val=text).data)
    assert FileTokenizer(path).vocab_size == 400


CODE = "".join(f"xylophone_{i} = {i * i}\n" for i in range(60))


def mixed(write, **code) -> RunConfig:
    """Two sources that share no word, of twelve files and of two."""
    for i in range(12):
        prose = write(f"prose/{i}.txt", TEXT[: len(CODE)]).parent
    for i in range(2):
        folder = write(f"code/{i}.txt", CODE).parent
    sources = {"prose": {"train": str(prose)}, "code": {"train": str(folder), **code}}
    val = str(write("v.txt", CODE * 2))
    data = {"sources": {n: {"kind": "text", "val": val, **s} for n, s in sources.items()}, "seq_len": 16}
    tokenizer = BpeTokenizer(vocab_size=330, sample_bytes=7 * len(CODE))
    return RunConfig.model_construct(seed=3, data=MixData.model_validate(data), tokenizer=tokenizer)


def test_one_for_all_sources_of_a_mixture(write, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on each in proportion to its text, whatever the weights; every source is prepared with it."""
    read: list[str] = []
    real = bpe.train

    def train(texts, size):
        read.extend(texts)
        return real(iter(read), size)

    monkeypatch.setattr(bpe, "train", train)
    monkeypatch.setattr(units, "DOCUMENTS", 1)
    config = mixed(write)
    data = open_data(config)
    assert [text[:3] for text in read] == ["the"] * 6 + ["xyl"]
    tokenizer = load_tokenizer(config.tokenizer, config.data)
    assert tokenizer.vocab_size == 330 and data.tokenizer == tokenizer.hash
    assert len(tokenizer.encode("xylophone")) < 4 and len(tokenizer.encode(" number")) < 4
    made = [json.loads(p.read_text()) for p in own_cache.glob("*/manifest.json")]
    assert len(made) == 2 and {one["tokenizer"] for one in made} == {tokenizer.hash}
    assert [p.name.rsplit("-", 1)[0] for p in own_cache.glob("[!.]*bpe*")] == ["mix-of-2-bpe-330"]
    monkeypatch.setattr(bpe, "train", lambda *args: pytest.fail("it is there"))
    sources = config.data.sources | {"code": config.data.sources["code"].model_copy(update={"weight": 9.0})}
    heavier = config.data.model_copy(update={"sources": sources})
    assert bpe.trained(config.tokenizer, heavier) == bpe.trained(config.tokenizer, config.data)


def test_it_is_another_with_another_text_and_names_a_source_that_is_gone(write) -> None:
    config = mixed(write)
    first = load_tokenizer(config.tokenizer, config.data).hash
    other = mixed(write, train=str(write("more.txt", CODE.replace("xylo", "mega"))))
    assert load_tokenizer(other.tokenizer, other.data).hash != first
    gone = mixed(write, train="nowhere.txt")
    with pytest.raises(UserError, match=r"data\.sources\.code: data\.train"):
        load_tokenizer(gone.tokenizer, gone.data)


def test_too_little_text(page, write) -> None:
    path = str(write("a.txt", "abc abc abc abc"))
    with pytest.raises(
        UserError, match=r"tokenizer\.vocab_size = 300: the text gives only 2\d\d tokens"
    ) as error:
        prepare(page(tokenizer=BpeTokenizer(vocab_size=300), train=path, val=path))
    assert "set tokenizer.vocab_size=2" in error.value.lines[1]


def test_the_vocabulary_is_known_before(config) -> None:
    config = config.model_construct(**{**config.__dict__, "model": type("M", (), {"vocab_size": None})})
    assert vocab_rows(config) == 400


def test_a_run_keeps_its_own(config, write, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` and `eval` need neither the text nor the cache."""
    first = load_tokenizer(config.tokenizer, config.data)
    assert isinstance(first, FileTokenizer)
    run = write("runs/mine/tokenizer.json", first.definition).parent
    monkeypatch.setattr(bpe, "trained", lambda *args: pytest.fail("the run has it"))
    assert load_tokenizer(config.tokenizer, config.data, run).hash == first.hash


def test_special_tokens_in_the_text_are_text(config) -> None:
    tokenizer = load_tokenizer(config.tokenizer, config.data)
    assert isinstance(tokenizer, FileTokenizer)
    ids = tokenizer.encode("<|endoftext|>")
    assert tokenizer.eot not in ids and tokenizer.decode(ids) == "<|endoftext|>"


def test_the_log_says_it(config, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        prepare(config)
    assert "training a tokenizer of 400 ids on t" in caplog.text
