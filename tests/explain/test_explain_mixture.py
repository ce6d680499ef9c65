"""data show and replay of runs whose rows come from several sources, grow, or are a task's."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from explain.conftest import trained
from ssmtrain.checkpoint.records import read_config
from ssmtrain.cli import main
from ssmtrain.config.growth import Staged
from ssmtrain.config.tasks import Copy
from ssmtrain.data.batch import apart, cut
from ssmtrain.data.mixture import Mixture
from ssmtrain.data.module import open_data
from ssmtrain.data.tasks import TaskRows
from ssmtrain.explain.asked import Asked, asked
from ssmtrain.explain.steps import Begin, stretches
from ssmtrain.explain.subject import Subject
from ssmtrain.train.module import LitLM
from ssmtrain.train.schedule import horizon
from train.conftest import ledger, page
from train.test_train_mixture import LENGTHS, TOKENS, mixed

Capture = pytest.CaptureFixture[str]
QUIET = {"trainer__val_every": 0, "trainer__health_every": 0, "trainer__keep_last": 9}


def trained_in(folder: Path, **changes: Any) -> Path:
    return trained(page(folder, **changes, **QUIET), ledger=True)


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources in three phases, batches and rows that grow; fourteen steps, a checkpoint every fourth."""
    folder = tmp_path_factory.mktemp("grown")
    return trained_in(folder, **mixed(folder))


@pytest.fixture(scope="session")
def recall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty rows of associative recall, in another order each epoch."""
    data = {"kind": "mqar", "seq_len": 32, "vocab_size": 32, "n_pairs": 3, "train_rows": 20, "val_rows": 8}
    folder = tmp_path_factory.mktemp("recall")
    grows = [{"until_tokens": 128, "global_batch": 64}]
    return trained_in(
        folder, data=data, tokenizer={"kind": "ids"}, generate={}, trainer__global_batch_warmup=grows
    )


def told(capsys: Capture, *line: str) -> str:
    capsys.readouterr()
    assert main([*line]) == 0
    return capsys.readouterr().out


def as_json(capsys: Capture, *line: str) -> dict[str, Any]:
    return json.loads(told(capsys, *line, "--json"))


def refused(capsys: Capture, *line: str) -> str:
    assert main([*line]) == 2
    return capsys.readouterr().err


def test_steps_are_counted_through_growth_forks_and_rows_left_out() -> None:
    """Against a loop that takes them one by one."""
    dice = random.Random(3)
    for _ in range(60):
        stages = tuple((until, 8 * (i + 1)) for i, until in enumerate(sorted(dice.sample(range(1, 400), 2))))
        batches = Staged(32, stages)
        begin = Begin(dice.choice([0, 5]), dice.choice([0, 11]), dice.choice([0, 40, 900]))
        rows, tokens, firsts, known = begin.rows, begin.tokens, {}, []
        for step in range(begin.step + 1, begin.step + 40):
            firsts[step] = (rows, batches.at(tokens) // 8, tokens)
            rows, tokens = rows + batches.at(tokens) // 8, tokens + batches.at(tokens)
            if step % 7 == 0:
                known.append((step, rows))
                left_out = dice.choice([0, 0, 9])  # read and not trained on before the steps that follow
                rows += left_out
        found = stretches(batches, 8, begin, known, step, left_out)
        assert [one.before for one in found] == sorted({one.before for one in found})
        for stretch in found:
            for step in range(stretch.before + 1, stretch.before + stretch.steps + 1):
                first, count, seen = firsts[step]
                assert stretch.numbers(step) == range(first, first + count)
                assert stretch.tokens + (step - 1 - stretch.before) * stretch.rows * 8 == seen
        assert found[-1].before + found[-1].steps == begin.step + 39


def test_the_last_step_is_that_of_the_horizon(tmp_path: Path) -> None:
    grows = {"trainer__global_batch_warmup": [{"until_tokens": 512, "global_batch": 64}]}
    for steps, tokens in [(None, 1000), (None, 400), (9, 1000), (30, 1000), (7, None)]:
        config = page(tmp_path, **grows, trainer__max_steps=steps, trainer__max_tokens=tokens)
        assert Subject(config, None).last == horizon(config.trainer).last_step
    forked = Subject(config, None, begin=Begin(4, 0, 512))
    assert forked.numbers(5) == range(4) and forked.numbers(6) == range(4, 8)


def test_rows_that_are_cut_from_one_stand_apart() -> None:
    import numpy as np

    from ssmtrain.data.module import MemoryStream, Rows

    rows = Rows(MemoryStream(np.arange(64), np.array([0, 5, 16, 24])), 16, None, 0)
    batch = cut(rows.batch_rows([0, 1, 2]), 8)
    alone = list(apart(batch))
    assert [one.sample_ids for one in alone] == [[0], [0], [1], [1], [2], [2]]
    assert [one.inputs[0].tolist() for one in alone] == batch.inputs.tolist()
    assert [one.labels[0].tolist() for one in alone] == batch.labels.tolist()
    assert [one.n_docs for one in alone] == [2, 1, 1, 1, 1, 1]
    assert alone[0].doc_ids is not None and alone[0].doc_ids[0].tolist() == [0] * 5 + [1] * 3


def test_a_step_of_a_mixture_shows_what_the_run_read(grown: Path, capsys: Capture) -> None:
    config = read_config(grown)
    mixture = open_data(config).train
    first = 0
    for step, line in enumerate(ledger(grown), 1):
        count = TOKENS[step - 1] // 32
        numbers, first = range(first, first + count), first + count
        if step not in (3, 8, 12, 13):
            continue
        found = as_json(capsys, "data", "show", f"run={grown}", f"step={step}", "--full")
        rows, length = found["rows"], LENGTHS[step - 1]
        assert found["samples"] == [numbers.start, numbers.stop] and found["seq_len"] == length
        assert [f"{row['source']}:{row['row']}" for row in rows if row["begin"] == 0] == line["samples"]
        given = Counter(one.partition(":")[0] for one in line["samples"])
        assert {name: one["rows"] for name, one in found["sources"].items() if one["rows"]} == given
        batch = cut(mixture.batch(numbers), length)
        assert len(rows) == len(batch.inputs) == TOKENS[step - 1] // length
        for row, inputs, labels in zip(rows, batch.inputs.tolist(), batch.labels.tolist(), strict=True):
            ids = [i for part in row["parts"] for i in part["ids"]]
            assert ids + [256] * row["padding"] == inputs
            ignored = [at for at, _ in row["ignored"]] + list(range(length - row["padding"], length))
            assert [at for at, label in enumerate(labels) if label == -100] == ignored
            for part in row["parts"]:
                place = part["place"]
                assert Path(place["file"]).stem == row["source"]
                there = Path(place["file"]).read_bytes()[place["byte"] :]
                assert there.startswith(bytes(i for i in part["ids"] if i != 256))
    page = told(capsys, "data", "show", f"run={grown}", "step=13", "source=code", "--full")
    assert "prose: 1 row in its epoch 1, 25.0% by weight" in page and "of code): " in page
    assert " of prose): " not in page
    page = told(capsys, "data", "show", f"run={grown}", "step=3")
    assert (
        "\n1 row of 32 tokens, cut into 4 of 8: samples 2 to 2" in page and "row 1 (from token 8 of" in page
    )
    page = told(capsys, "data", "show", f"run={grown}", "step=3", "source=code")
    assert "none of them is of code" in page and "code: 0 rows, 0.0% by weight" in page


def test_a_document_of_a_source_is_found_in_every_phase_and_epoch(grown: Path, capsys: Capture) -> None:
    """The file of one source, in a run that is to go on until that has been read several times."""
    line = [f"run={grown}", "trainer.max_steps=300", "--find", "code.txt"]
    found = as_json(capsys, "data", "show", *line)
    mixture = open_data(read_config(grown)).train
    assert isinstance(mixture, Mixture)
    expected, first = [], 0
    for step in range(1, 301):
        count = (TOKENS[step - 1] if step <= 14 else 128) // 32
        pieces = 32 // (LENGTHS[step - 1] if step <= 14 else 32)
        names = mixture.names(mixture.samples(range(first, first + count)).tolist())
        first += count
        expected += [
            (step, i * pieces + piece, name)
            for i, name in enumerate(names)
            for piece in range(pieces)
            if name.startswith("code:")
        ]
    assert [(hit["step"], hit["index"], f"code:{hit['row']}") for hit in found["steps"]] == expected
    assert mixture.given(first)["code"] / mixture.sources["code"].per_epoch > 3
    assert all(Path(hit["file"]).name == "code.txt" for hit in found["steps"])
    assert [hit["read"] for hit in found["steps"]] == [step <= 14 for step, _, _ in expected]
    assert found["rows"] == [f"code:{row}" for row in range(mixture.sources["code"].per_epoch)]
    assert as_json(capsys, "data", "show", *line, "source=code") == found
    assert "to be read at step 1" in told(capsys, "data", "show", *line, "--full")
    assert "no file of the training split of prose" in refused(capsys, "data", "show", *line, "source=prose")
    assert "expected prose, code" in refused(capsys, "data", "show", *line, "source=other")


def test_a_text_in_a_cut_row_is_found_where_it_begins(grown: Path, capsys: Capture) -> None:
    row = next(
        row
        for row in as_json(capsys, "data", "show", f"run={grown}", "step=8", "--full")["rows"]
        if row["begin"] == 16 and not row["padding"]
    )
    text = row["parts"][0]["text"]
    hits = as_json(capsys, "data", "show", f"run={grown}", "--find", text)["steps"]
    assert (8, row["index"], row["source"], row["row"]) in [
        (hit["step"], hit["index"], hit["source"], hit["row"]) for hit in hits
    ]


@pytest.mark.parametrize(("step", "compared", "rows"), [(7, [5, 6, 7], 4), (13, [13], 4)])
def test_a_step_of_a_growing_mixture_is_replayed_to_the_bit(
    step: int, compared: list[int], rows: int, grown: Path, capsys: Capture
) -> None:
    """Steps 5 to 7 go from one row of 8 to two of 16; 13 is the first with whole rows."""
    found = as_json(capsys, "replay", f"run={grown}", f"step={step}")
    verdict = found["verdict"]
    assert (verdict["steps"], verdict["equal"], verdict["differ"]) == (compared, 2 * len(compared), [])
    mine = found["rows"]
    assert [row["index"] for row in mine] == list(range(rows)) and found["length"] == LENGTHS[step - 1]
    samples = [f"{row['source']}:{row['row']}" for row in mine if row["begin"] == 0]
    assert samples == found["taken"]["samples"] == ledger(grown)[step - 1]["samples"]
    labels = sum(row["labels"] for row in mine)
    loss = sum(row["loss"] * row["labels"] for row in mine) / labels
    assert loss == pytest.approx(found["taken"]["loss"], rel=1e-5)
    shown = as_json(capsys, "data", "show", f"run={grown}", f"step={step}")["rows"]
    assert all(row in shown for row in found["worst"]) and len(found["worst"]) == 3


def test_steps_of_two_ranks_are_taken_in_the_parts_that_each_had(
    grown: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows at step 11, four at steps 12 and 13: a rank had one of them, then two."""
    copy = Path(shutil.copytree(grown, tmp_path / "copy"))
    lines = ledger(copy)
    for line in lines:
        line["params"] *= 2
    (copy / "ledger.jsonl").write_text("\n".join(map(json.dumps, lines)))
    real, parts = LitLM.accumulate, []

    def accumulate(self: LitLM, micro: Any, scale: Any) -> Any:
        parts.append([batch.sample_ids for batch in micro])
        return real(self, micro, scale)

    monkeypatch.setattr(LitLM, "accumulate", accumulate)
    found = as_json(capsys, "replay", f"run={copy}", "step=13")["verdict"]
    assert not found["exact"] and found["differ"] == [] and found["steps"] == [13]
    found = as_json(capsys, "replay", f"run={copy}@step-8", "step=12")["verdict"]
    assert found["differ"] == [] and found["steps"] == [9, 10, 11, 12]
    assert [[len(part) for part in step] for step in parts] == [[2, 2], *[[1, 1]] * 3, [2, 2]]


def test_rows_of_a_task_show_what_is_asked(recall: Path, capsys: Capture) -> None:
    config = read_config(recall)
    batch = open_data(config).train.batch(range(4, 8))
    found = as_json(capsys, "data", "show", f"run={recall}", "step=3")
    assert found["samples"] == [4, 8] and found["epochs"] == [1]
    assert [row["row"] for row in found["rows"]] == batch.sample_ids == ledger(recall)[2]["samples"]
    for row, inputs, labels in zip(found["rows"], batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        assert row["task"]["ids"] == inputs and row["labels"] == 3 and row["task"]["seed"] == 0
        assert row["task"]["answers"] == [[at, one] for at, one in enumerate(labels) if one != -100]
    page = told(capsys, "data", "show", f"run={recall}", "step=3", "rows=1")
    at, answer = found["rows"][1]["task"]["answers"][0]
    token = batch.inputs[1][at].item()
    assert f"row 1 (row {batch.sample_ids[1]} of the task, mqar with seed 0): 3 labels" in page
    assert f"[{token}→{answer}]" in page and f"{answer} at {at} after {token}" in page and "0×" in page


def test_every_answer_is_marked_zeros_too() -> None:
    rows = TaskRows(Copy(seq_len=24, min_len=8, vocab_size=8), "train", 5)
    batch = rows.batch(range(40))
    for index, (inputs, labels) in enumerate(zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True)):
        found = asked(rows, batch, index)
        assert (found.kind, found.seed, found.ids) == ("copy", 5, inputs)
        assert found.answers == [(at, one) for at, one in enumerate(labels) if one != -100]
        assert found.answers[-1][1] == 0 and f"[{inputs[found.answers[-1][0]]}→0]" in found.tokens(None)
        words = found.tokens(None).replace("[", " ").split()
        many = sum(int(word.partition("×")[2] or 1) for word in words)
        assert many == 24 and found.tokens(None).count("→") == len(found.answers)
        assert " … " in found.tokens(20) and found.tokens(20).endswith(" (24 tokens)")
    long = Asked("parity", 0, [1] * 40, [(at, at % 2) for at in range(40)])
    assert long.said(None).count(" at ") == 40 and long.said(240).endswith("1 at 15 after 1, and 24 more")


def test_the_steps_of_a_tasks_row_are_found_through_epochs(recall: Path, capsys: Capture) -> None:
    hits = as_json(capsys, "data", "show", f"run={recall}", "trainer.max_steps=40", "--find", "7")["steps"]
    samples = open_data(read_config(recall)).train.samples(range(4 + 38 * 4)).tolist()
    at = [i for i, row in enumerate(samples) if row == 7]
    assert len(at) == 7 or len(at) == 8
    assert [(hit["step"], hit["index"]) for hit in hits] == [
        (i // 2 + 1, i % 2) if i < 4 else ((i - 4) // 4 + 3, i % 4) for i in at
    ]
    assert "to be read at step" in told(
        capsys, "data", "show", f"run={recall}", "trainer.max_steps=40", "--find", "7"
    )
    for text in ("20", "the king"):
        assert "give the number of a row" in refused(capsys, "data", "show", f"run={recall}", "--find", text)
    said = refused(capsys, "data", "show", f"run={recall}", "--find", "7", "source=code")
    assert "the run's data is no mixture" in said


def test_a_step_of_a_task_is_replayed_to_the_bit(recall: Path, capsys: Capture) -> None:
    found = as_json(capsys, "replay", f"run={recall}", "step=6")
    assert (found["verdict"]["steps"], found["verdict"]["differ"]) == ([5, 6], [])
    assert found["verdict"]["equal"] == 4 and found["verdict"]["exact"]
    assert [row["row"] for row in found["rows"]] == found["taken"]["samples"]
    page = told(capsys, "replay", f"run={recall}", "step=2")
    assert "equal to the bit" in page and "of the task, mqar with seed 0" in page and "→" in page
