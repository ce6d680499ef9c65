"""Mixtures: each source by its share, each of its rows once an epoch, whatever changes; rows cut shorter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssmtrain.config.data import MixData, TextData
from ssmtrain.config.errors import UserError
from ssmtrain.config.schema import RunConfig
from ssmtrain.data.batch import Batch, cut, join
from ssmtrain.data.mixture import ROW_BITS, Joined, Mixture
from ssmtrain.data.module import MemoryStream, Rows, open_data
from ssmtrain.data.sources import split_text

Write = Callable[[str, str | bytes], Path]
L = 8


def rows(lengths: list[int], seed: int | None = 0, first: int = 1000) -> Rows:
    """Documents of these lengths; each token is its own position, counted from `first`."""
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int64)
    return Rows(MemoryStream(np.arange(first, first + sum(lengths)), starts), L, seed, 0)


def three(phases: list[tuple[int, dict[str, float]]] | None = None, seed: int = 0) -> Mixture:
    sources = {"a": rows([90, 30], 1), "b": rows([50], 2, 5000), "c": rows([9] * 20, 3, 9000)}
    return Mixture(sources, phases or [(0, {"a": 0.5, "b": 0.3, "c": 0.2})], seed)


CHANGING: list[tuple[int, dict[str, float]]] = [
    (0, {"a": 0.5, "b": 0.3, "c": 0.2}),
    (37, {"a": 0, "b": 1, "c": 1}),
    (64, {"a": 1, "b": 0, "c": 3}),
]


@pytest.mark.parametrize("phases", [None, CHANGING])
def test_each_source_goes_through_its_epochs_without_holes(phases: Any) -> None:
    mixture = three(phases)
    named = mixture.names(mixture.samples(range(400)).tolist())
    for name, source in mixture.sources.items():
        mine = [int(one.partition(":")[2]) for one in named if one.startswith(f"{name}:")]
        assert mine == source.samples(range(len(mine))).tolist()
        assert len(mine) == mixture.given(400)[name]
        whole = len(mine) // source.per_epoch
        assert whole and Counter(mine[: whole * source.per_epoch]) == dict.fromkeys(
            range(source.per_epoch), whole
        )


def test_phases_change_the_shares_where_they_say() -> None:
    names = three(CHANGING).names(three(CHANGING).samples(range(164)).tolist())
    parts = [Counter(one[0] for one in part) for part in (names[:37], names[37:64], names[64:])]
    assert parts[1].keys() == {"b", "c"} and parts[2] == {"a": 25, "c": 75}
    assert all(abs(parts[0][name] - 37 * share) < 1 for name, share in CHANGING[0][1].items())
    assert three(CHANGING).shares(100) == {"a": 0.25, "b": 0, "c": 0.75}


def test_a_later_phase_changes_nothing_before_it() -> None:
    before = three(CHANGING[:2]).samples(range(64))
    assert np.array_equal(before, three(CHANGING).samples(range(64)))
    assert not np.array_equal(three(CHANGING, seed=1).samples(range(64)), before)


def test_a_batch_is_its_rows_wherever_it_is_cut() -> None:
    mixture = three(CHANGING)
    whole = mixture.batch(range(30, 70))
    assert whole.sample_ids == mixture.samples(range(30, 70)).tolist()
    for i, one in enumerate(whole.sample_ids):
        source = list(mixture.sources.values())[one >> ROW_BITS]
        alone = source.batch_rows([one & (1 << ROW_BITS) - 1])
        assert torch.equal(whole.inputs[i], alone.inputs[0]) and torch.equal(whole.labels[i], alone.labels[0])
    for world in (2, 4, 8):
        size = 40 // world
        parts = [mixture.batch(range(30 + r * size, 30 + (r + 1) * size)) for r in range(world)]
        assert torch.equal(torch.cat([p.inputs for p in parts]), whole.inputs)
        assert sum(p.n_docs for p in parts) == whole.n_docs
        assert [i for p in parts for i in p.sample_ids] == whole.sample_ids
    shuffled = mixture.batch([69, 5, 30])
    assert torch.equal(shuffled.inputs[[0, 2]], whole.inputs[[39, 0]])


def documents(batch: Batch) -> list[list[int]]:
    """The inputs of each document, after a look at the numbering."""
    ids = batch.doc_ids if batch.doc_ids is not None else torch.arange(len(batch.inputs))[:, None]
    ids = ids.expand(batch.inputs.shape).flatten().tolist()
    assert ids == sorted(ids) and set(ids) == set(range(batch.n_docs))
    found: list[list[int]] = [[] for _ in range(batch.n_docs)]
    for document, token in zip(ids, batch.inputs.flatten().tolist(), strict=True):
        found[document].append(token)
    return found


def test_joined_batches_number_their_documents_anew() -> None:
    whole = rows([5, 11, 8, 8, 3, 29], None)
    places = [np.array([3, 0]), np.array([1, 2, 5]), np.array([4])]
    parts = [(at, whole.batch_rows(at)) for at in places]
    joined, expected = join(parts), whole.batch_rows(range(6))
    assert documents(joined) == documents(expected)
    assert torch.equal(joined.labels, expected.labels) and joined.sample_ids == expected.sample_ids
    plain = rows([65], None)
    assert (
        join([(np.array([1]), plain.batch_rows([1])), (np.array([0]), plain.batch_rows([0]))]).doc_ids is None
    )


@pytest.mark.parametrize("lengths", [[64], [5, 11, 8, 8, 3, 29], [2] * 32])
def test_cut_rows_hold_the_same_tokens_and_labels(lengths: list[int]) -> None:
    stream = rows(lengths, None)
    long = stream.batch_rows(range(stream.per_epoch))
    for length in (1, 2, 4, 8):
        short = cut(long, length)
        assert short.inputs.shape == (len(long.inputs) * L // length, length)
        assert short.inputs.flatten().tolist() == long.inputs.flatten().tolist()
        assert short.labels.flatten().tolist() == long.labels.flatten().tolist()
        assert short.sample_ids == long.sample_ids
        own = Rows(stream.stream, length, None, 0)
        expected = documents(own.batch_rows(range(own.per_epoch)))
        assert documents(short)[: len(expected)] == expected
    assert cut(long, 8) is long


def test_joined_sets_are_their_rows_one_after_the_other() -> None:
    parts = [rows([30], None), rows([9, 9, 9], None, 5000)]
    joined = Joined(parts)
    assert joined.per_epoch == 8 and joined.seq_len == L
    batch = joined.batch_rows(range(2, 7))
    assert batch.sample_ids == [2, 3, 4, 5, 6]
    assert torch.equal(batch.inputs[:2], parts[0].batch_rows([2, 3]).inputs)
    assert torch.equal(batch.labels[2:], parts[1].batch_rows([0, 1, 2]).labels)


def mix(write: Write, **more: Any) -> RunConfig:
    """Two sources, one with two validation sets."""
    prose = {"kind": "text", "train": str(write("p.txt", "some prose here\n" * 60)), "weight": 3}
    code = {"kind": "text", "train": str(write("c.txt", "x = y + 1\n" * 99))}
    code["val"] = {"old": str(write("o.txt", "a = b\n" * 9)), "new": str(write("n.txt", "let a = b\n" * 20))}
    page = MixData.model_validate({"sources": {"prose": prose, "code": code}, "seq_len": 16, **more})
    return RunConfig.model_construct(seed=3, data=page)


def test_open_a_mixture(write: Write) -> None:
    config = mix(write)
    data = open_data(config)
    assert isinstance(data.train, Mixture) and data.train.shares(0) == {"prose": 0.75, "code": 0.25}
    assert list(data.sets) == ["prose", "code/old", "code/new"]
    assert {key: data.meta[key]["bytes"] for key in ("val/code/old", "val/code/new", "train/code")} == {
        "val/code/old": 54, "val/code/new": 200, "train/code": 990,
    }  # fmt: skip
    for split in ("train", "val"):
        parts = [found for key, found in data.meta.items() if key.startswith(f"{split}/")]
        for figure in ("tokens", "bytes", "documents", "rows"):
            assert data.meta[split][figure] == sum(part[figure] for part in parts)
    assert data.val.per_epoch == data.meta["val"]["rows"]
    assert len(split_text(config.data, "val")) == data.meta["val"]["bytes"]
    ratios = [
        data.meta[f"train/{name}"]["bytes"] / data.meta[f"train/{name}"]["tokens"] for name in data.sources
    ]
    assert data.bytes_per_token(0) == pytest.approx(0.75 * ratios[0] + 0.25 * ratios[1])
    # A source's order hangs on its own name and the seed alone.
    alone = open_data(config.model_copy(update={"data": config.data.model_copy(update={
        "sources": {"code": config.data.sources["code"]}})}))  # fmt: skip
    assert np.array_equal(alone.sources["code"].samples(range(50)), data.sources["code"].samples(range(50)))


def test_several_validation_sets_of_one_text(write: Write, page: Callable[..., RunConfig]) -> None:
    train, one, two = (str(write(f"{name}.txt", f"{name} text\n" * 20)) for name in ("train", "one", "two"))
    config = page(train=train, val={"one": one, "two": [two, one]}, seq_len=16)
    data = open_data(config)
    assert list(data.sets) == ["one", "two"] and data.sources == {}
    assert [data.meta[f"val/{name}"]["documents"] for name in data.sets] == [1, 2]
    plain = open_data(page(train=train, val=one, seq_len=16))
    assert plain.sets == {} and plain.meta["train"] == data.meta["train"]
    assert torch.equal(data.sets["one"].batch_rows([0]).inputs, plain.val.batch_rows([0]).inputs)
    assert np.array_equal(data.train.samples(range(40)), plain.train.samples(range(40)))
    assert isinstance(config.data, TextData) and split_text(config.data, "val").count(b"one text") == 40


def test_errors_name_the_source(write: Write) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.prose: data\.train: .* do not fill one row"):
        open_data(mix(write, seq_len=4096))
