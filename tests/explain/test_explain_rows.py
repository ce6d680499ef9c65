"""data show: the rows of a step, their documents and masks, and the steps that read a document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from explain.conftest import config_of
from ssmtrain.cli import main
from ssmtrain.config.errors import UserError
from ssmtrain.config.load import to_yaml
from ssmtrain.data.module import open_data
from ssmtrain.data.tokenizer import ByteTokenizer, FileTokenizer
from ssmtrain.explain.documents import Documents
from ssmtrain.explain.reads import Reads
from ssmtrain.explain.rows import chosen, escaped, rows_of, shortened
from ssmtrain.explain.steps import Begin
from ssmtrain.explain.subject import Subject

Capture = pytest.CaptureFixture[str]


def shown(capsys: Capture, *line: str) -> str:
    assert main(["data", "show", *line]) == 0
    return capsys.readouterr().out


def as_json(capsys: Capture, *line: str) -> dict[str, Any]:
    return json.loads(shown(capsys, *line, "--json"))


def test_the_rows_of_a_step_are_those_that_the_run_reads(spiky: Path, capsys: Capture) -> None:
    config = config_of(spiky.parents[1])
    data = open_data(config)
    for step in (1, 7, 12):
        found = as_json(capsys, f"run={spiky}", f"step={step}", "--full")
        batch = data.train.batch(range(4 * step - 4, 4 * step))
        assert [row["row"] for row in found["rows"]] == batch.sample_ids
        for row, inputs, labels in zip(
            found["rows"], batch.inputs.tolist(), batch.labels.tolist(), strict=True
        ):
            ids = [i for part in row["parts"] for i in part["ids"]]
            assert ids + [256] * row["padding"] == inputs
            assert row["labels"] == sum(label != -100 for label in labels)
            ignored = [at for at, _ in row["ignored"]] + list(range(32 - row["padding"], 32))
            assert [at for at, label in enumerate(labels) if label == -100] == ignored
    assert found["taken"] and found["loss_of"] == [10, 12]


def test_every_part_names_the_bytes_of_its_file(spiky: Path) -> None:
    """Of every row of the split: what stands in the file at the offset is what the row has."""
    config = config_of(spiky.parents[1])
    data = open_data(config)
    tokenizer = ByteTokenizer()
    rows = rows_of(data, Reads(data, tokenizer), range(data.train.per_epoch), 32)
    parts = [part for row in rows for part in row.parts]
    for part in parts:
        assert part.place.file is not None and part.place.byte is not None
        own = bytes(i for i in part.ids if i != 256)
        there = Path(part.place.file).read_bytes()[part.place.byte :]
        assert there.startswith(own) and len(part.ids) == part.last - part.first + 1
        assert part.ends == (256 in part.ids)
        assert part.ends == (there == own) or part.place.document == 5  # the rest of this one validates
    assert sum(len(part.ids) for part in parts) == data.train.stream.tokens
    assert {part.place.document for part in parts} == set(range(len(data.train.stream.starts)))
    assert len([row for row in rows if row.padding]) <= 1


def test_what_a_terminal_would_obey_is_spelled_out(spiky: Path, capsys: Capture) -> None:
    step = as_json(capsys, f"run={spiky}", "--find", "\u202e")["steps"][0]["step"]
    told = shown(capsys, f"run={spiky}", f"step={step}", "--full")
    assert "zqxj" in told and "\\x1b[31m" in told and "\\u202e" in told and "\\x07" in told
    assert all(c.isprintable() or c == "\n" for c in told)
    assert escaped("a\nb\tc\u2028") == "a\\nb\\tc\\u2028"
    assert shortened("x" * 100, 10) == '"xxxxx … xxxxx" (100 characters)'


def test_a_step_is_found_by_file_and_by_text(spiky: Path, capsys: Capture) -> None:
    by_name, by_text = (as_json(capsys, f"run={spiky}", "--find", what) for what in ("3.txt", "zqxj"))
    assert {hit["row"] for hit in by_name["steps"]} >= {hit["row"] for hit in by_text["steps"]}
    assert by_text["steps"] and all(hit["file"].endswith("/3.txt") for hit in by_text["steps"])
    for hit in by_name["steps"][:2]:
        (row,) = as_json(capsys, f"run={spiky}", f"step={hit['step']}", f"rows={hit['index']}")["rows"]
        assert row["row"] == hit["row"] and hit["read"]
        assert any(part["place"]["file"].endswith("/3.txt") for part in row["parts"])
    for hit in by_text["steps"][:2]:
        (row,) = as_json(capsys, f"run={spiky}", f"step={hit['step']}", f"rows={hit['index']}")["rows"]
        assert "z" in "".join(part["text"] for part in row["parts"])
    told = shown(capsys, f"run={spiky}", "--find", "3.txt")
    assert "read at step" in told and "to be read" not in told


def test_a_config_shows_what_will_be_read(spiky: Path, tmp_path: Path, capsys: Capture) -> None:
    page = tmp_path / "page.yaml"
    page.write_text(to_yaml(config_of(spiky.parents[1], trainer__max_steps=24)))
    before = as_json(capsys, f"config={page}", "step=5")
    run = as_json(capsys, f"run={spiky}", "step=5")
    assert before["rows"] == run["rows"] and not before["taken"] and "loss" not in before
    longer = shown(capsys, f"run={spiky}", "trainer.max_steps=40", "--find", "3.txt", "--full")
    assert "\n  read at step 1" in longer and "to be read at step" in longer


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["step=0"], "step=0: expected a step"),
        (["step=25"], "ends at step 24"),
        (["step=2", "rows=4"], "rows 0 to 3"),
        (["step=2", "rows=a"], "rows=3, rows=0,3 or rows=2:5"),
        ([], "needs step=N"),
        (["--find", "nowhere to be found"], "no file of the training split"),
        (["step=2", "--find", "x"], "step= says nothing beside --find"),
        (["step=2", "seed=5"], "seed: with another value it would be another run"),
    ],
)
def test_what_cannot_be_shown(spiky: Path, capsys: Capture, line: list[str], said: str) -> None:
    assert main(["data", "show", f"run={spiky}", *line]) == 2
    assert said in capsys.readouterr().err


def test_rows_are_chosen() -> None:
    assert chosen(None, 3) == [0, 1, 2]
    assert chosen("0,3", 5) == [0, 3] and chosen("2:4,0", 5) == [2, 3, 0] and chosen("3:", 5) == [3, 4]
    with pytest.raises(UserError):
        chosen("5", 5)


def test_offsets_of_a_file_tokenizer_and_documents_without_tokens(tmp_path: Path) -> None:
    """Where a document gave no tokens, numbers name no files, rather than wrong ones."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = {w: i for i, w in enumerate(["<|endoftext|>", "[UNK]", "a", "bb", "ccc"])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.normalizer = normalizers.Strip()
    made.save(str(tmp_path / "tokenizer.json"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text("a bb ccc " * 40)
    changes = {
        "tokenizer": {"kind": "file", "path": str(tmp_path / "tokenizer.json")},
        "data__val": str(texts),
    }
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    config = config_of(tmp_path, **changes)
    data = open_data(config, tokenizer)
    place = Documents(data.train, tokenizer).place(0, 3)
    assert (place.document, place.byte, place.exact) == (0, len("a bb ccc"), False)
    (texts / "1.txt").write_text("    ")
    data = open_data(config, tokenizer)
    place = Documents(data.train, tokenizer).place(0, 3)
    assert (place.document, place.file, place.byte) == (0, None, None)


def test_a_tokenizer_that_is_trained_on_the_text_is_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = config_of(tmp_path, tokenizer={"kind": "bpe", "vocab_size": 280})
    (tmp_path / "page.yaml").write_text(to_yaml(config))
    found = as_json(capsys, f"config={tmp_path / 'page.yaml'}", "step=1", "--full")
    ids = [i for row in found["rows"] for part in row["parts"] for i in part["ids"]]
    assert len(ids) == 128 and max(ids) > 256


def test_steps_of_a_fork_are_counted_from_where_it_began(spiky: Path, tmp_path: Path) -> None:
    fork = Subject(config_of(spiky.parents[1], trainer__max_steps=20), None, begin=Begin(8, 0, 8 * 128))
    assert fork.numbers(9) == range(4) and fork.numbers(11) == range(8, 12)
    with pytest.raises(UserError) as caught:
        fork.numbers(8)
    assert "forked at step 8" in caught.value.lines[0]
