"""The verb `prepare`."""

import json

import pytest

from ssmtrain.config.errors import UserError
from ssmtrain.config.request import Request
from ssmtrain.data.report import command


def test_table(page, capsys: pytest.CaptureFixture[str], own_cache) -> None:
    request = Request("prepare", config=page(seq_len=512))
    assert command(request) == 0
    said = capsys.readouterr().out
    assert "austen, tokenizer bytes (257 ids)" in said and str(own_cache) in said and "\nprepared in" in said
    (row,) = (line.split() for line in said.splitlines() if line.startswith("train"))
    assert row == ["train", "5", "3,557,747", "3,557,752", "1.00", "6,949"]
    command(request)
    assert "\nfound ready in" in capsys.readouterr().out


def test_json(page, write, bpe, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(write("a.txt", "the cat sat on the mat\n" * 40)), str(write("b.txt", ""))]
    config = page(train=paths, val=paths[0], seq_len=8, tokenizer=bpe)
    assert command(Request("prepare", config=config, flags={"json": True})) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["made"] and said["tokenizer"]["kind"] == "file" and said["seq_len"] == 8
    train = said["splits"]["train"]
    assert (train["documents"], train["empty"], train["bytes"]) == (1, 1, 920)
    assert train["rows"] == -(-(train["tokens"] - 1) // 8)
    assert train["bytes_per_token"] == pytest.approx(920 / train["tokens"], abs=1e-4)


@pytest.mark.parametrize("workers", ["0", "-1", "two", "1e3", "9999"])
def test_workers(page, workers: str) -> None:
    with pytest.raises(UserError, match=f"workers={workers}: expected a whole number of processes"):
        command(Request("prepare", config=page(), words={"workers": workers}))


def test_what_was_left_out_is_told(page, write, capsys: pytest.CaptureFixture[str]) -> None:
    train = write("a.jsonl", '{"text": "a"}\n{"text": "a"}\n{"text": ""}\n{\n')
    config = page(train=str(train), val=str(write("v.txt", "v")), skip_bad=True, drop_duplicates=True)
    assert command(Request("prepare", config=config, words={"workers": "1"})) == 0
    assert "left out: 1 empty, 1 duplicate, 1 unreadable documents" in capsys.readouterr().out


def test_without_a_config() -> None:
    with pytest.raises(UserError, match="config="):
        command(Request("prepare"))
