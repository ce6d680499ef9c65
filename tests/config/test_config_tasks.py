"""Pages of tasks and checks: what loads, and what does not fit a row, a vocabulary or a tokenizer."""

# One case a line, however long.
# ruff: noqa: E501

from __future__ import annotations

from pathlib import Path

import pytest

from ssmtrain.config.errors import UserError
from ssmtrain.config.identity import default_name
from ssmtrain.config.load import load
from ssmtrain.config.tasks import FileCheck, MqarCheck, MqarData

TEXT = "config=quickstart"
TASK = "config=recall"
MIXED = [
    "config=recall",
    "data={kind: mix, seq_len: 32, sources: {recall: {kind: mqar, vocab_size: 64, n_pairs: 8, weight: 3},"
    " again: {kind: copy}}}",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, with a text in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("it is a truth")
    return tmp_path


@pytest.mark.parametrize("kind", ["mqar", "induction", "selective_copy", "copy", "parity"])
def test_any_recipe_takes_any_task(kind: str) -> None:
    words = [f"data={kind}", "tokenizer=ids", "data.seq_len=256", "generate.prompt=1 2"]
    config = load([TEXT, *words, "trainer.global_batch=2048"])
    assert config.data.kind == kind and config.data.seq_len == 256
    assert config.tokenizer.kind == "ids"


def test_checks_are_added_on_the_line_or_the_page(folder: Path) -> None:
    check = "checks={recall: {kind: mqar, seq_len: 32, vocab_size: 64}, notes: {kind: file, path: notes.txt}}"
    config = load([TEXT, check, "checks.recall.every=50"])
    assert config.checks == {
        "recall": MqarCheck(seq_len=32, vocab_size=64, every=50),
        "notes": FileCheck(path="notes.txt"),
    }
    assert default_name(config) == default_name(load([TEXT]))  # they decide nothing of what is learned
    assert isinstance(load([TASK, "checks={recall: {kind: mqar, vocab_size: 64}}"]).data, MqarData)


@pytest.mark.parametrize(
    "line, says",
    [
        ([TEXT, "data=mqar"], "tokenizer.kind = bytes: data.kind = mqar makes ids and no text"),
        ([TEXT, "data=mqar"], "take tokenizer=ids"),
        ([TEXT, "tokenizer=ids"], "tokenizer.kind = ids: data.kind = embedded is text"),
        ([TASK, "generate.prompt=It is"], "generate.prompt = 'It is': with tokenizer.kind = ids expected numbers"),
        ([TASK, "data.cache_dir=x"], "data.cache_dir"),
        ([TASK, "data.n_pair=9"], "did you mean `n_pairs`"),
        ([TASK, "data.n_pairs=17"], "data.seq_len = 32: data.n_pairs = 17 take four tokens each; expected at least 68"),
        ([TASK, "data.vocab_size=16"], "data.vocab_size = 16 has 7 keys; expected a vocabulary of at least 18"),
        ([TASK, "data.val_lengths=[128,16]"], "data.val_lengths = 16: data.n_pairs = 8 take four tokens each"),
        ([TASK, "data.val_lengths=[128,128]"], "data.val_lengths: 128 stands twice"),
        ([TASK, "model.vocab_size=49"], "model.vocab_size = 49: smaller than data.vocab_size = 64"),
        ([TASK, "data.kind=induction", "data.seq_len=3"], "expected at least 4, for a marker"),
        ([TASK, "data.kind=selective_copy", "data.seq_len=16"], "data.n_tokens = 16 are in it twice; expected at least 32"),
        ([TASK, "data.kind=copy", "data.min_len=40"], "two strings of data.min_len = 40 and two marks take 82 tokens"),
        ([TASK, "data.kind=parity", "data.min_len=99"], "data.seq_len = 32: shorter than data.min_len = 99"),
        ([TASK, "checks={Recall: {kind: mqar}}"], "checks.Recall: expected a name of small letters"),
        ([TASK, "checks={step: {kind: parity}}"], "checks.step: expected a name"),
        ([TASK, "checks={a: {kind: mqar}}"], "checks.a.vocab_size = 8192: the model has 64 ids"),
        ([TEXT, "checks={a: {kind: mqar}}"], "checks.a.vocab_size = 8192: the model has 257 ids"),
        ([TEXT, "checks={a: {kind: mqar, vocab_size: 64, seq_len: 8}}"], "checks.a.seq_len = 8: checks.a.n_pairs = 4"),
        ([TEXT, "checks={a: {kind: mqar, val_rows: 9}}"], "checks.a.val_rows"),
        ([TEXT, "checks={a: {kind: recall}}"], "checks.a.kind"),
        ([TASK, "checks={a: {kind: file, path: notes.txt}}"], "with tokenizer.kind = ids no text can be read"),
        ([TEXT, "checks={a: {kind: file, path: gone.txt}}"], "checks.a.path = 'gone.txt': there is no such file"),
        ([TEXT, "checks={a: {kind: file}}"], "checks.a.path is missing"),
        ([*MIXED, "tokenizer=bytes"], "tokenizer.kind = bytes: data.sources.recall.kind = mqar makes ids and no text"),
        ([*MIXED, "+data.sources.own={kind: text, train: notes.txt}"], "data.sources.own.kind = text: text, beside the task data.sources.recall"),
        ([*MIXED, "+data.sources.own={kind: text, train: notes.txt}"], "as in checks.recall.kind=mqar"),
        ([*MIXED, "data.sources.recall.n_pairs=17"], "data.seq_len = 32: data.sources.recall.n_pairs = 17 take four tokens each"),
        ([*MIXED, "data.sources.again.min_len=40"], "two strings of data.sources.again.min_len = 40 and two marks take 82"),
        ([*MIXED, "data.sources.recall.val_lengths=[16]"], "data.sources.recall.val_lengths = 16: data.sources.recall.n_pairs = 8"),
        ([*MIXED, "model.vocab_size=49"], "model.vocab_size = 49: smaller than data.sources.recall.vocab_size = 64"),
        ([*MIXED, "data.cache_dir=x"], "data.cache_dir = 'x': no effect, as nothing is prepared"),
        ([*MIXED, "data.seq_len_warmup=[{until_tokens: 9, seq_len: 8}]"], "data.seq_len_warmup: what a row of data.sources.recall"),
        ([*MIXED, "data.sources.again.max_epochs=2"], "data.sources.again.max_epochs = 2: no effect without data.sources.again.train_rows"),
        ([*MIXED, "data.sources.again.weight=0", "data.sources.recall.weight=0"], "no source has a weight above 0"),
        ([*MIXED, "data.sources.lengths={kind: parity}"], "data.sources.lengths: not a name for figures"),
        ([*MIXED, "data.sources.again.n_pairs=2"], "data.sources.again.n_pairs"),
        ([*MIXED, "checks={a: {kind: mqar}}"], "checks.a.vocab_size = 8192: the model has 64 ids"),
        ([*MIXED, "generate.prompt=It is"], "expected numbers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(line: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        load(line)
    assert says in "\n".join(caught.value.lines), caught.value.lines


def test_a_mixture_of_tasks_has_the_ids_of_the_largest() -> None:
    from ssmtrain.data.tokenizer import tokenizer_of, vocab_rows

    config = load([*MIXED, "data.sources.again.train_rows=9", "data.sources.again.max_epochs=3"])
    assert config.data.kind == "mix" and config.data.sources["recall"].weight == 3
    assert vocab_rows(config) == tokenizer_of(config).vocab_size == 64


def test_a_task_has_nothing_to_prepare() -> None:
    from ssmtrain.cli import main
    from ssmtrain.data.prepare import prepare

    assert main(["prepare", *MIXED]) == 2
    with pytest.raises(UserError, match="its rows are made as they are read"):
        prepare(load([TASK]))
