"""Rows: every token of an epoch counted, documents numbered, the same rows however they are sliced."""

import mmap
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ssmtrain.config.errors import UserError
from ssmtrain.config.trainer import TrainerConfig
from ssmtrain.data import prepare as prepare_module
from ssmtrain.data.module import MemoryStream, Rows, open_data, text_rows
from ssmtrain.data.tokenizer import ByteTokenizer

EOT = 256


def stream_of(lengths: list[int]) -> MemoryStream:
    """Documents of these lengths (end of text included); the token at t is t, except each last one."""
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int64)
    ids = np.arange(1000, 1000 + sum(lengths))
    ids[np.cumsum(lengths) - 1] = EOT
    return MemoryStream(ids, starts)


def expected(stream: MemoryStream, row: int, L: int) -> tuple[list[int], list[int], list[int]]:
    """One row the slow way: inputs, labels, and 1 where a document opens."""
    inputs, labels, opens = [], [], []
    starts = set(stream.starts.tolist())
    for p in range(row * L, row * L + L):
        inputs.append(int(stream.ids[p]) if p < stream.tokens else EOT)
        follows = p + 1 < stream.tokens and p + 1 not in starts
        labels.append(int(stream.ids[p + 1]) if follows else -100)
        opens.append(int(p == row * L or (p in starts and p < stream.tokens)))
    return inputs, labels, opens


@pytest.mark.parametrize("L", [2, 3, 7, 8, 64])
@pytest.mark.parametrize("lengths", [[64], [65], [2, 2, 2, 2], [5, 3, 8, 16, 2, 40], [129, 2, 31], [7] * 20])
def test_rows_against_the_slow_way(lengths: list[int], L: int) -> None:
    stream = stream_of(lengths)
    rows = Rows(stream, L, None, EOT)
    assert rows.per_epoch == -(-(sum(lengths) - 1) // L)
    batch = rows.batch(range(rows.per_epoch))
    want = [expected(stream, i, L) for i in range(rows.per_epoch)]
    assert batch.inputs.tolist() == [w[0] for w in want]
    assert batch.labels.tolist() == [w[1] for w in want]
    ids = (np.cumsum(np.array([w[2] for w in want]).reshape(-1)) - 1).reshape(-1, L)
    assert batch.n_docs == ids[-1, -1] + 1
    if batch.doc_ids is None:
        assert batch.n_docs == rows.per_epoch
    else:
        assert batch.doc_ids.dtype == torch.int32 and batch.doc_ids.tolist() == ids.tolist()


@pytest.mark.parametrize("seed", [None, 0, 9])
@pytest.mark.parametrize("L", [5, 32])
def test_an_epoch_counts_every_token(seed: int | None, L: int) -> None:
    """Every token that does not start a document is a label exactly once; nothing else is."""
    draw = random.Random(1)
    stream = stream_of([draw.randint(2, 90) for _ in range(40)])
    stream.ids[:] = np.arange(len(stream.ids))  # the token is its own position
    rows = Rows(stream, L, seed, EOT)
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for first in range(0, rows.per_epoch, 4):
            numbers = range(first, min(first + 4, rows.per_epoch))
            batch = rows.batch([epoch * rows.per_epoch + n for n in numbers])
            assert (batch.labels == -100).all(dim=1).sum() == 0
            seen.update(batch.labels[batch.labels != -100].tolist())
        assert seen == Counter(set(range(stream.tokens)) - set(stream.starts.tolist()))


def test_slices_of_ranks_are_the_batch() -> None:
    stream = stream_of([9, 30, 4, 17, 50, 2, 3, 61])
    rows = Rows(stream, 8, 3, EOT)
    whole = rows.batch(range(100, 112))
    for world in (1, 2, 3, 4, 6, 12):
        parts = [rows.batch(range(100 + r * 12 // world, 100 + (r + 1) * 12 // world)) for r in range(world)]
        assert torch.equal(torch.cat([p.inputs for p in parts]), whole.inputs)
        assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)
        assert [i for p in parts for i in p.sample_ids] == whole.sample_ids
        assert sum(p.n_docs for p in parts) == whole.n_docs


def test_order_changes_by_epoch_and_seed() -> None:
    stream = stream_of([1000])
    rows = Rows(stream, 4, 0, EOT)
    n = rows.per_epoch
    first, second = (rows.samples(range(e * n, e * n + n)).tolist() for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(n)) and first != second
    assert first != Rows(stream, 4, 1, EOT).samples(range(n)).tolist()
    across = rows.batch(range(n - 2, n + 2))  # one batch over the seam of two epochs
    assert across.sample_ids == first[-2:] + second[:2]
    assert [rows.sample(i) for i in range(n - 2, n + 2)] == across.sample_ids
    assert Rows(stream, 4, None, EOT).samples(range(n)).tolist() == list(range(n))
    assert rows.batch_rows([3]).inputs.tolist() == [list(range(1012, 1016))]


def test_open_data(page, write, monkeypatch: pytest.MonkeyPatch) -> None:
    """From files on disk, across shards, the rows spell the text."""
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 100)
    texts = ["first document, about £5\n" * 9, "second\n", "third " * 50]
    for i, text in enumerate(texts):
        write(f"text/{i}.txt", text)
    folder = str(write("text/0.txt", texts[0]).parent)
    config = page(train=folder, val=str(write("v.txt", "to validate")), seq_len=16)
    data = open_data(config)
    stream = b"".join(t.encode() + b"\xff" for t in texts)
    assert data.meta["train"]["tokens"] == len(stream)
    assert data.meta["train"]["bytes"] == len(stream) - 3
    assert data.meta["train"]["documents"] == 3
    assert data.meta["train"]["rows"] == data.train.per_epoch == -(-(len(stream) - 1) // 16)
    assert len(data.meta["val"]["sha256"]) == 64
    tokens = data.train.batch_rows(range(data.train.per_epoch)).inputs.reshape(-1).tolist()
    assert bytes(255 if t == EOT else t for t in tokens)[: len(stream)] == stream
    val = data.val.batch(range(data.val.per_epoch))
    assert ByteTokenizer().decode(val.inputs[0, :11].tolist()) == "to validate"
    assert val.labels[0].tolist() == [*b"o validate", EOT] + [-100] * 5
    assert val.doc_ids is None and val.n_docs == 1


def test_less_than_a_row(page, write) -> None:
    file = str(write("a.txt", "short"))
    with pytest.raises(UserError, match=r"data\.train: 6 tokens do not fill one row of data\.seq_len=16"):
        open_data(page(train=file, val=file, seq_len=16))


def test_rows_of_texts() -> None:
    rows = text_rows(["abc", "", "defg"], ByteTokenizer(), 4)
    batch = rows.batch(range(rows.per_epoch))
    assert batch.inputs.tolist() == [[97, 98, 99, EOT], [100, 101, 102, 103]]
    assert batch.labels.tolist() == [[98, 99, EOT, -100], [101, 102, 103, EOT]]
    with pytest.raises(UserError, match="empty"):
        text_rows([""], ByteTokenizer(), 4)


def test_batch_to() -> None:
    batch = Rows(stream_of([3, 9]), 4, None, EOT).batch([0, 1]).to("cpu")
    assert batch.doc_ids is not None and batch.n_docs == 3
    bare = Rows(stream_of([12]), 4, None, EOT).batch([0]).to(torch.device("meta"))
    assert bare.doc_ids is None and bare.inputs.device.type == bare.labels.device.type == "meta"


@pytest.mark.parametrize("lengths", [[129], [2, 2, 2, 2, 40, 8, 8, 16, 3, 37]])
def test_rows_in_slots_say_which_go_on(lengths: list[int]) -> None:
    """A row goes on where its first token is the one after the last of its slot's row before, and of the same
    document."""
    stream, L, slots = stream_of(lengths), 8, 3
    rows = Rows(stream, L, 5, EOT, slots)
    before: dict[int, int] = {}
    for step in range(2 * rows.per_epoch // slots):
        batch = rows.batch(range(step * slots, (step + 1) * slots))
        assert batch.slots == list(range(slots)) and batch.goes_on is not None
        for slot, (row, on) in enumerate(zip(batch.sample_ids, batch.goes_on, strict=True)):
            follows = step % (rows.per_epoch // slots) > 0
            assert not follows or row == (before[slot] + 1) % rows.total
            assert on == (follows and row * L not in stream.starts.tolist())
            before[slot] = row
    plain = Rows(stream, L, None, EOT)
    one = rows.batch([slots + 1])
    assert one.inputs.equal(plain.batch_rows(one.sample_ids).inputs) and one.slots == [1]
    assert plain.batch([0]).slots is None and rows.in_order().per_epoch == plain.per_epoch == rows.total


def test_too_little_text_to_carry_a_state(page, write) -> None:
    file = str(write("a.txt", "x" * 16 * 7))
    config = page(train=file, val=file, seq_len=16, carry_state=True)
    config = config.model_copy(update={"trainer": TrainerConfig(global_batch=64)})
    with pytest.raises(
        UserError, match=r"the 7 rows of data\.train are fewer than two for each of the 4 rows"
    ):
        open_data(config)


def test_what_is_asked_for_ahead_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page of every token of the rows, across shards and up to the end, and none outside of a file."""
    from ssmtrain.data import shards

    page, cap = mmap.PAGESIZE // 2, 3 * mmap.PAGESIZE // 2  # tokens of a page, and of a shard of three
    writer = shards.SplitWriter(tmp_path, "train", "<u2", 0, cap)
    ids = np.arange(4 * cap - 700, dtype=np.uint16)
    writer.append(ids, np.array([len(ids)]))
    entry = writer.close()
    assert entry is not None
    stream = shards.TokenStream(tmp_path, entry, "<u2", cap)
    asked: list[tuple[int, int]] = []

    def advise(tokens: np.ndarray, how: str, first: int = 0, last: int | None = None) -> None:
        shard = next(i for i, one in enumerate(stream._shards) if one is tokens)
        assert how == "MADV_WILLNEED" and last is not None and 0 <= first < last <= len(tokens)
        asked.append((shard * cap + first, shard * cap + last))
        real(tokens, how, first, last)

    real = shards._advise
    monkeypatch.setattr(shards, "_advise", advise)
    stream.ahead([5, cap - 9, len(ids) - 100], 2 * page)
    assert asked[0] == (5, 5 + 2 * page)
    assert asked[1:3] == [(cap - 9, cap), (cap, cap - 9 + 2 * page)]
    assert asked[3:] == [(len(ids) - 100, len(ids))]
    out = np.zeros(2 * page, np.int64)
    stream.read(cap - 9, out)
    assert np.array_equal(out, ids[cap - 9 : cap - 9 + 2 * page])


def test_what_was_asked_for_is_not_asked_for_twice(page, write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(write("a.txt", "abc " * 200))
    rows = open_data(page(train=file, val=file, seq_len=16)).train
    fetched: list[list[int]] = []
    monkeypatch.setattr(rows.stream, "ahead", lambda starts, length: fetched.append(list(starts)))
    rows.ahead(range(4))
    rows.batch(range(2))
    rows.batch(range(2, 6))
    expected = (rows.samples(range(6)) * 16).tolist()
    assert fetched == [expected[:4], [], expected[4:]]
