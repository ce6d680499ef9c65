"""Bytes and tokenizer.json."""

import json

import numpy as np
import pytest

from ssmtrain.config.data import BytesTokenizer
from ssmtrain.config.data import FileTokenizer as Page
from ssmtrain.config.errors import UserError
from ssmtrain.data.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer

TEXT = "A naïve café, £5 — 日本語 🙂\n"


def test_bytes() -> None:
    t = load_tokenizer(BytesTokenizer())
    assert (t.vocab_size, t.eot) == (257, 256) and isinstance(t, ByteTokenizer)
    ids = t.encode(TEXT)
    assert ids.dtype == np.int64 and ids.tolist() == list(TEXT.encode())
    assert t.decode(ids) == TEXT
    assert [a.tolist() for a in t.encode_all(["a", "é"])] == [[97], [195, 169]]
    assert t.hash == "ba39ba0773f2faac2d4d3d21e50e89469857c6e410a4ac8e4bd222105a6d2389"


def test_bytes_decode_anything() -> None:
    t = ByteTokenizer()
    assert t.decode([0xE2, 0x82]) == "\ufffd"  # a character cut short
    assert t.decode([65, 256, 66]) == "A\nB"  # end of text
    assert t.decode([65, 257, 50279, -1, 66]) == "AB"  # rows of a padded embedding that mean nothing
    assert t.decode([]) == ""


def test_file(bpe) -> None:
    t = load_tokenizer(Page(path=str(bpe)))
    vocab = json.loads(bpe.read_text())["model"]["vocab"]
    assert t.vocab_size == 1 + max(vocab.values()) and t.eot == vocab["<|endoftext|>"]
    for text in (TEXT, "the cat sat on the mat"):
        assert t.decode(t.encode(text)) == text
        assert t.encode_all([text, text])[1].tolist() == t.encode(text).tolist()
    assert len(t.encode("the cat sat on the mat")) < 12
    assert t.decode([*t.encode("a"), t.eot, *t.encode("b"), 10**6]) == "a\nb"
    assert FileTokenizer(bpe.parent).hash == t.hash  # a folder that holds a tokenizer.json will do


def test_special_tokens_in_a_text_are_text(bpe) -> None:
    t = FileTokenizer(bpe)
    ids = t.encode("one<|endoftext|>two")
    assert t.eot not in ids and t.decode(ids) == "one<|endoftext|>two"


def test_truncation_and_padding_are_ignored(bpe, tmp_path) -> None:
    page = json.loads(bpe.read_text())
    page["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    page["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    (tmp_path / "t.json").write_text(json.dumps(page))
    assert (
        FileTokenizer(tmp_path / "t.json").encode(TEXT).tolist() == FileTokenizer(bpe).encode(TEXT).tolist()
    )


def test_gaps_in_ids_are_inside_the_vocabulary(bpe, tmp_path) -> None:
    page = json.loads(bpe.read_text())
    page["model"]["vocab"]["zzzz"] = 900
    (tmp_path / "t.json").write_text(json.dumps(page))
    assert FileTokenizer(tmp_path / "t.json").vocab_size == 901


def test_end_of_text_by_name(bpe) -> None:
    t = FileTokenizer(bpe, "<pad>")
    assert t.eot == 0 and t.hash != FileTokenizer(bpe).hash
    with pytest.raises(UserError, match=r"tokenizer\.end_of_text: .* has no token '<stop>'") as error:
        FileTokenizer(bpe, "<stop>")
    assert "<pad>, <|endoftext|>" in error.value.lines[1]


def test_no_end_of_text(bpe, tmp_path) -> None:
    (tmp_path / "t.json").write_text(bpe.read_text().replace("<|endoftext|>", "<|stop|>"))
    with pytest.raises(UserError, match="no end-of-text token under a usual name") as error:
        FileTokenizer(tmp_path / "t.json")
    assert "<|stop|>" in error.value.lines[1]


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": "1.0"}', b"\xff\xfe", None])
def test_not_a_tokenizer(tmp_path, content: bytes | None) -> None:
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.path: .*t\.json"):
        FileTokenizer(path)
