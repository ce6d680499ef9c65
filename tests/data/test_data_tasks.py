"""Tasks: every row is replayed step by step, and its numbers are as evenly spread as they are said to be."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from ssmtrain.config.errors import UserError
from ssmtrain.config.schema import RunConfig
from ssmtrain.config.tasks import (
    AnyTask,
    Copy,
    CopyData,
    Induction,
    Mqar,
    MqarData,
    Parity,
    ParityData,
    SelectiveCopy,
)
from ssmtrain.data.module import open_data
from ssmtrain.data.tasks import TaskRows, at_length
from ssmtrain.data.tasks.draws import Draws
from ssmtrain.data.tasks.source import training_rows
from ssmtrain.data.tokenizer import tokenizer_of

Row = tuple[list[int], dict[int, int]]
"""Tokens, and the labels by place."""

TASKS: list[AnyTask] = [
    Mqar(),
    Mqar(seq_len=32, vocab_size=18, n_pairs=8),
    Mqar(seq_len=33, vocab_size=64, n_pairs=5, filler="random", power=0.5),
    Induction(seq_len=4, vocab_size=3),
    Induction(seq_len=32),
    SelectiveCopy(seq_len=40, n_tokens=6, vocab_size=5),
    SelectiveCopy(seq_len=12, n_tokens=6, vocab_size=3),
    Copy(seq_len=21),
    Copy(seq_len=20, vocab_size=4, min_len=9),
    Parity(),
    Parity(seq_len=9, vocab_size=5, min_len=9, asked="every"),
]


def rows_of(task: AnyTask, count: int, seed: int = 3) -> list[Row]:
    batch = TaskRows(task, "train", seed).batch(range(count))
    found = []
    for tokens, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        assert len(tokens) == len(labels) == task.seq_len
        assert all(0 <= t < task.vocab_size for t in tokens)
        found.append((tokens, {i: label for i, label in enumerate(labels) if label != -100}))
    return found


def replay_mqar(task: Mqar, row: Row) -> None:
    tokens, labels = row
    known: dict[int, int] = {}
    for i in range(0, 2 * task.n_pairs, 2):
        key, value = tokens[i], tokens[i + 1]
        assert 0 < key < task.vocab_size // 2 <= value < task.vocab_size
        assert key not in known and value not in known.values()
        known[key] = value
    assert min(labels) >= 2 * task.n_pairs and len(labels) == task.n_pairs
    assert {tokens[at]: label for at, label in labels.items()} == known
    rest = [t for i, t in enumerate(tokens[2 * task.n_pairs :], 2 * task.n_pairs) if i not in labels]
    assert task.filler == "random" or set(rest) <= {0}


def replay_induction(task: Induction, row: Row) -> None:
    tokens, labels = row
    first = tokens.index(0)
    assert tokens.count(0) == 2 and tokens[-1] == 0 and first < task.seq_len - 2
    assert labels == {task.seq_len - 1: tokens[first + 1]}


def replay_selective_copy(task: SelectiveCopy, row: Row) -> None:
    tokens, labels = row
    seen, said = [], []
    for i, token in enumerate(tokens):
        if token == task.vocab_size - 1:
            said.append(labels[i])
        elif token:
            assert not said, "a token to copy after the marks"
            seen.append(token)
    assert seen == said and len(said) == len(labels) == task.n_tokens


def replay_copy(task: Copy, row: Row) -> None:
    """What a model would write, letter after letter, is the string and its end."""
    tokens, labels = row
    assert tokens[0] == 1
    sign = tokens.index(2)
    string = tokens[1:sign]
    assert task.min_len <= len(string) <= (task.seq_len - 2) // 2 and min(string) >= 3
    assert tokens[sign + 1 : 2 * sign] == string and set(tokens[2 * sign :]) <= {0}
    assert labels == dict(enumerate([*string, 0], sign))


def replay_parity(task: Parity, row: Row) -> None:
    tokens, labels = row
    total, sums = 0, []
    for token in tokens:
        total = (total + token) % task.vocab_size
        sums.append(total)
    n = max(labels) + 1
    assert task.min_len <= n <= task.seq_len and not any(tokens[n:])
    asked = range(n) if task.asked == "every" else [n - 1]
    assert labels == {i: sums[i] for i in asked}


REPLAYS: dict[str, Any] = {
    "mqar": replay_mqar,
    "induction": replay_induction,
    "selective_copy": replay_selective_copy,
    "copy": replay_copy,
    "parity": replay_parity,
}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.kind}-{task.seq_len}")
def test_every_label_is_what_a_replay_of_the_row_says(task: AnyTask) -> None:
    for row in rows_of(task, 200):
        REPLAYS[task.kind](task, row)


def test_the_published_parameters_are_the_defaults() -> None:
    """Arora et al. 2023, figure 2; Gu & Dao 2023, tables 1 and 11; Jelassi et al.; Grazzi et al."""
    zoology = MqarData()
    assert (zoology.seq_len, zoology.n_pairs, zoology.vocab_size, zoology.power) == (64, 4, 8192, 0.01)
    assert (zoology.train_rows, zoology.val_rows) == (100_000, 3000)
    assert (Induction().seq_len, Induction().vocab_size) == (2**8, 16)
    selective = SelectiveCopy()
    assert selective.seq_len - selective.n_tokens == 4096
    assert (selective.n_tokens, selective.vocab_size) == (16, 16)
    assert (CopyData().vocab_size - 3, (CopyData().seq_len - 2) // 2) == (26, 50)
    assert (ParityData().min_len, ParityData().seq_len, ParityData().vocab_size) == (3, 40, 2)


def evenly(counts: list[int], shares: np.ndarray | None = None) -> bool:
    """Whether counts are within five standard deviations of what chi-squared would be for these shares."""
    shares = np.full(len(counts), 1 / len(counts)) if shares is None else shares / shares.sum()
    expected = sum(counts) * shares
    free = len(counts) - 1
    return bool(((np.array(counts) - expected) ** 2 / expected).sum() < free + 5 * (2 * free) ** 0.5)


def tally(values: Any, of: range) -> list[int]:
    counts = Counter(values)
    assert set(counts) <= set(of)
    return [counts[i] for i in of]


def test_what_should_be_even_is_even() -> None:
    mqar = rows_of(Mqar(seq_len=16, vocab_size=20, n_pairs=3), 8000)
    assert evenly(tally([tokens[2] for tokens, _ in mqar], range(1, 10)))
    assert evenly(tally([tokens[5] for tokens, _ in mqar], range(10, 20)))
    induction = rows_of(Induction(seq_len=12), 8000)
    assert evenly(tally([tokens.index(0) for tokens, _ in induction], range(10)))
    assert evenly(tally([labels[11] for _, labels in induction], range(1, 16)))
    selective = rows_of(SelectiveCopy(seq_len=14, n_tokens=4, vocab_size=6), 8000)
    assert evenly(tally([next(i for i, t in enumerate(tokens) if t) for tokens, _ in selective], range(7)),
                  np.array([84, 56, 35, 20, 10, 4, 1.0]))  # fmt: skip
    assert evenly(tally([labels[12] for _, labels in selective], range(1, 5)))
    copy = rows_of(Copy(seq_len=22, min_len=3), 8000)
    assert evenly(tally([tokens.index(2) - 1 for tokens, _ in copy], range(3, 11)))
    assert evenly(tally([tokens[1] for tokens, _ in copy], range(3, 29)))
    parity = rows_of(Parity(), 8000)
    assert evenly(tally([max(labels) + 1 for _, labels in parity], range(3, 41)))
    assert evenly(tally([label for _, labels in parity for label in labels.values()], range(2)))


def test_keys_come_back_by_the_power_law() -> None:
    """Of one pair, at slot g of 15 with probability g^(power - 1); of several, one after another without
    replacement, as numpy's choice has it."""
    one = Mqar(seq_len=32, vocab_size=64, n_pairs=1, power=0.25)
    slots = [(next(iter(labels)) - 2) // 2 for _, labels in rows_of(one, 8000)]
    assert evenly(tally(slots, range(15)), np.arange(1.0, 16) ** -0.75)
    weights = np.array([4.0, 2.0, 1.0, 1.0])
    drawn = Draws("places", 0, np.arange(20_000)).places(weights, 2)
    pairs = list(permutations(range(4), 2))
    p = weights / weights.sum()
    shares = np.array([p[a] * p[b] / (1 - p[a]) for a, b in pairs])
    counts = Counter(map(tuple, drawn.tolist()))
    assert evenly([counts[pair] for pair in pairs], shares)


@pytest.mark.parametrize("n, count", [(2, 2), (3, 2), (16, 2), (17, 3), (4095, 4)])
def test_different_numbers_are_different_and_in_random_order(n: int, count: int) -> None:
    drawn = Draws("distinct", 1, np.arange(12_000)).distinct(n, count)
    assert drawn.min() >= 0 and drawn.max() < n
    assert all(len(set(row)) == count for row in drawn.tolist())
    if n <= 17:
        pairs = Counter((row[0], row[1]) for row in drawn.tolist())
        assert evenly([pairs[pair] for pair in permutations(range(n), 2)])
    else:
        assert evenly(tally((drawn[:, -1] * 16 // n).tolist(), range(16)))


@pytest.mark.parametrize("task", TASKS[:3] + TASKS[4:6] + TASKS[7:8], ids=lambda task: task.kind)
def test_a_row_is_the_same_in_any_company_and_process(task: AnyTask) -> None:
    rows = TaskRows(task, "train", 7)
    together = rows.batch(range(1000, 1064))
    for i in (0, 1, 17, 63):
        alone = TaskRows(task, "train", 7).batch([1000 + i])
        assert alone.inputs[0].tolist() == together.inputs[i].tolist()
        assert alone.labels[0].tolist() == together.labels[i].tolist()
    turned = rows.batch(list(range(1063, 999, -1)))
    assert turned.inputs.flip(0).equal(together.inputs)
    assert together.doc_ids is None and together.n_docs == 64


def test_streams_seeds_and_rows_are_apart() -> None:
    task = Mqar(n_pairs=8)
    seen: set[tuple[int, ...]] = set()
    for stream, seed in (("train", 0), ("train", 1), ("val", 0), ("check", 0)):
        batch = TaskRows(task, stream, seed).batch(range(500))
        seen |= {tuple(row) for row in batch.inputs.tolist()}
    assert len(seen) == 2000


def test_the_bits_of_a_row_are_written_down() -> None:
    """A resumed run reads the rows of another version of this file: they may never change unnoticed."""
    tokens, labels = rows_of(Mqar(seq_len=16, vocab_size=16, n_pairs=3), 1, seed=0)[0]
    assert tokens == [5, 8, 1, 14, 6, 9, 6, 0, 5, 0, 0, 0, 0, 0, 1, 0]
    assert labels == {6: 9, 8: 8, 14: 14}


def page(**data: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "seed": 5,
        "model": {
            "d_model": 8,
            "layout": "A",
            "blocks": {"A": {"mixer": {"kind": "attention", "n_heads": 1}}},
        },
        "data": data,
        "tokenizer": {"kind": "ids"},
    }
    return RunConfig.model_validate(tree)


def test_rows_repeat_by_epochs_in_another_order_where_they_are_counted() -> None:
    data = open_data(page(kind="mqar", train_rows=20))
    epochs = [data.train.batch(range(20 * e, 20 * e + 20)).sample_ids for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20)) and epochs[0] != epochs[1]
    assert open_data(page(kind="mqar", train_rows=None)).train.batch([10**12]).sample_ids == [10**12]
    assert training_rows(page(kind="mqar", train_rows=20, val_rows=7))[""].per_epoch == 7


def test_validation_is_the_same_for_every_seed_and_training_is_not() -> None:
    one, other = page(kind="induction"), page(kind="induction").model_copy(update={"seed": 6})
    a, b = open_data(one), open_data(other)
    assert a.val.batch([0]).inputs.equal(b.val.batch([0]).inputs)
    assert not a.train.batch([0]).inputs.equal(b.train.batch([0]).inputs)


def test_other_lengths_have_sequences_as_long_as_they_allow() -> None:
    data = open_data(page(kind="parity", val_lengths=[64, 256], val_rows=9))
    assert {n: rows.per_epoch for n, rows in data.lengths.items()} == {"64": 9, "256": 9}
    batch = data.lengths["256"].batch_rows(range(9))
    assert (batch.labels[:, :-1] == -100).all() and (batch.labels[:, -1] >= 0).all()
    strings = TaskRows(at_length(Copy(), 402), "val", 0).batch(range(5)).inputs
    assert (strings[:, 201] == 2).all()
    assert at_length(Mqar(n_pairs=8), 512) == Mqar(n_pairs=8, seq_len=512)


def test_a_change_of_the_task_is_a_change_of_the_data() -> None:
    before = open_data(page(kind="mqar")).meta["train"]["sha256"]
    assert before != open_data(page(kind="mqar", n_pairs=5)).meta["train"]["sha256"]
    assert before != open_data(page(kind="mqar", train_rows=99)).meta["train"]["sha256"]
    assert before == open_data(page(kind="mqar", val_rows=9, val_lengths=[128])).meta["train"]["sha256"]


def test_ids_are_typed_and_shown_as_numbers() -> None:
    tokenizer = tokenizer_of(page(kind="induction"))
    assert tokenizer.vocab_size == 16
    assert tokenizer.encode("3 15 0").tolist() == [3, 15, 0]
    assert tokenizer.decode([3, 15, 0]) == " 3 15 0"
    for text in ("16", "a", "-1"):
        with pytest.raises(UserError, match="is no id of this run's task"):
            tokenizer.encode(text)
