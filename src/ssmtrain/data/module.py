"""What the trainer reads: batches of rows, by sample number."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ssmtrain.config.carry import slots
from ssmtrain.config.errors import UserError
from ssmtrain.config.mixing import phases
from ssmtrain.config.task_rules import tasks
from ssmtrain.data.batch import Batch, Samples
from ssmtrain.data.mixture import Joined, Mixture, Ordered
from ssmtrain.data.order import Order, key_of, walk
from ssmtrain.data.pack import IGNORE, begins_inside, count_rows, document_starts, number_documents
from ssmtrain.data.prepare import Prepared, prepare
from ssmtrain.data.sources import VAL, pages, set_name
from ssmtrain.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from ssmtrain.config.data import AnyData
    from ssmtrain.config.schema import RunConfig

__all__ = ["Batch", "Data", "MemoryStream", "Rows", "Stream", "open_data", "text_rows"]

log = logging.getLogger(__name__)


class Stream(Protocol):
    """Documents end to end as tokens, each closed by an end-of-text token."""

    @property
    def tokens(self) -> int:
        """How many tokens."""

    @property
    def starts(self) -> np.ndarray:
        """Position of each document's first token, int64, ascending from 0."""

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy tokens [start, start + len(out)) into `out`."""

    def ahead(self, starts: Iterable[int], length: int) -> None:
        """Have `length` tokens from each of some places fetched, without waiting."""


@dataclass(frozen=True)
class MemoryStream:
    """A stream that is not worth a folder: a file to score."""

    ids: np.ndarray
    """(tokens,)."""
    starts: np.ndarray
    """(documents,) int64."""

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return len(self.ids)

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy tokens [start, start + len(out)) into `out`."""
        out[:] = self.ids[start : start + len(out)]

    def ahead(self, starts: Iterable[int], length: int) -> None:
        """They are at hand."""


class Rows:
    """A split as rows of `seq_len` tokens, in a keyed order that differs by epoch, or in file order.

    Row i is tokens [i L, i L + L) of the stream; its labels are the tokens one later, -100 where a document
    starts and after the end. Every token that does not start a document is a label exactly once an epoch.
    With `slots` the order is that of `order.walk`: an epoch is whole steps, and leaves out what fills none.
    """

    def __init__(
        self, stream: Stream, seq_len: int, seed: int | None, pad: int, slots: int | None = None
    ) -> None:
        self.stream, self.seq_len, self.seed, self.pad, self.slots = stream, seq_len, seed, pad, slots
        self.total = self.per_epoch = count_rows(stream.tokens, seq_len)
        """Rows of the split, and of an epoch."""
        if slots is not None:
            self.per_epoch = self.total // slots * slots
        self._order = Order(self.per_epoch, seed)
        self._asked: set[int] = set()
        """Rows that were fetched ahead."""

    def sample(self, number: int) -> int:
        """The row that a sample number stands for; sample numbers run on from epoch to epoch."""
        return int(self.samples([number])[0])

    def samples(self, numbers: Sequence[int]) -> np.ndarray:
        """Rows of some sample numbers, int64 (B,)."""
        if self.slots is not None and self.seed is not None:
            return walk(np.asarray(numbers, np.int64), self.total, self.slots, self.seed)[0]
        return self._order(numbers)

    def names(self, ids: Sequence[int]) -> list[Any]:
        """Sample ids are row numbers."""
        return list(ids)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows of some sample numbers; a row is the same tokens in any batch."""
        if self.slots is None or self.seed is None:
            return self.batch_rows(self.samples(numbers))
        asked = np.asarray(numbers, np.int64)
        rows, first = walk(asked, self.total, self.slots, self.seed)
        goes_on = begins_inside(rows, self.seq_len, self.stream.starts) & ~first
        places = (asked % self.slots).tolist()
        return replace(self.batch_rows(rows), slots=places, goes_on=goes_on.tolist())

    def ahead(self, numbers: Sequence[int]) -> None:
        """Have the rows of some sample numbers fetched, without waiting, which are to be read next."""
        rows = self.samples(numbers).tolist()
        self._asked = set(rows)
        self._fetch(rows)

    def _fetch(self, rows: list[int]) -> None:
        self.stream.ahead([row * self.seq_len for row in rows], self.seq_len + 1)

    def in_order(self) -> Rows:
        """The same rows in file order."""
        return Rows(self.stream, self.seq_len, None, self.pad)

    def batch_rows(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """Some rows by their place in file order, 0 … per_epoch - 1."""
        rows, L = np.asarray(numbers, np.int64), self.seq_len
        tokens = np.full((len(rows), L + 1), self.pad, np.int64)  # (B, L + 1)
        self._fetch([row for row in rows.tolist() if row not in self._asked])
        for out, begin in zip(tokens, (rows * L).tolist(), strict=True):
            self.stream.read(begin, out[: self.stream.tokens - begin])
        labels = tokens[:, 1:].copy()  # (B, L)
        which, position = document_starts(rows, L, self.stream.starts)
        labels[which, position - 1] = IGNORE
        for out, begin in zip(labels, (rows * L).tolist(), strict=True):
            out[max(0, self.stream.tokens - begin - 1) :] = IGNORE
        doc_ids = number_documents(len(rows), L, which, position)  # (B, L)
        n_docs = int(doc_ids[-1, -1]) + 1
        return Batch(
            inputs=torch.from_numpy(tokens[:, :L].copy()),
            labels=torch.from_numpy(labels),
            doc_ids=None if n_docs == len(rows) else torch.from_numpy(doc_ids),
            n_docs=n_docs,
            sample_ids=rows.tolist(),
        )


@dataclass(frozen=True)
class Data:
    """The run's text or task as rows."""

    train: Samples
    """In a keyed order that differs by epoch."""
    val: Ordered
    """In file order; of several sets, all of them, one after the other."""
    meta: dict[str, dict[str, Any]]
    """By split: tokens, bytes of text, documents, rows, sha256; also by `train/<source>` and `val/<set>`."""
    prepared: Prepared | None
    """The folder that the rows are read from, if they are text; of several sources, the first one's."""
    sources: dict[str, Rows] = field(default_factory=dict)
    """The training text of each source of a mixture of texts."""
    sets: dict[str, Ordered] = field(default_factory=dict)
    """The validation sets by name, where there are several or the data is a mixture."""
    lengths: dict[str, Ordered] = field(default_factory=dict)
    """A task's rows of other lengths to validate on, as "64", or in a mixture "recall/64"."""

    @property
    def tokenizer(self) -> str:
        """SHA-256 of the tokenizer's definition; "ids" where there is none."""
        return self.prepared.manifest.tokenizer if self.prepared is not None else "ids"

    @property
    def plan(self) -> list[Any]:
        """The phases of a mixture as plain lists: [first sample number, weight by source]; else empty."""
        phases = self.train.phases if isinstance(self.train, Mixture) else []
        return [[begin, weights] for begin, weights in phases]

    def bytes_per_token(self, number: int) -> float:
        """Of the text that training reads where a sample number falls; 0 for a task, which is no text."""
        parts = {"train": 1.0}
        if isinstance(self.train, Mixture):
            parts = {f"train/{name}": share for name, share in self.train.shares(number).items()}
        return sum(share * self.meta[key]["bytes"] / self.meta[key]["tokens"] for key, share in parts.items())


def open_data(config: RunConfig, tokenizer: Tokenizer | None = None) -> Data:
    """Prepare the run's data if need be and open it; UserError when it does not fill one row."""
    if tasks(config.data):
        from ssmtrain.data.tasks.source import open_task

        return open_task(config)
    if config.data.kind == "mix":
        return _open_mix(config, tokenizer or load_tokenizer(config.tokenizer, config.data))
    prepared, rows, meta = _open(config, config.data, config.seed, tokenizer)
    train, sets = rows.pop("train"), {set_name(split): part for split, part in rows.items()}
    _warn_of_copies({"data.train": meta["train"]}, {f"data.{split}": meta[split] for split in rows})
    if "val" in rows:
        return Data(train, rows["val"], meta, prepared)
    meta = {"train": meta["train"], "val": summed(meta, list(rows)), **meta}
    return Data(train, Joined(list(sets.values())), _slashed(meta), prepared, sets={**sets})


def _open(
    config: RunConfig, page: AnyData, seed: int, tokenizer: Tokenizer | None
) -> tuple[Prepared, dict[str, Rows], dict[str, dict[str, Any]]]:
    """One source: its folder, its rows and its figures by split."""
    prepared = prepare(config.model_copy(update={"data": page}), tokenizer)
    L, pad = page.seq_len, prepared.manifest.eot
    streams = {split: prepared.stream(split) for split in prepared.manifest.splits}
    rows = {name: Rows(s, L, None, pad) for name, s in streams.items()}
    rows["train"] = Rows(streams["train"], L, seed, pad, slots(config))
    if streams["train"].tokens <= L:
        raise UserError(
            f"data.train: {streams['train'].tokens} tokens do not fill one row of data.seq_len={L}",
            "give more text, or set a smaller data.seq_len",
        )
    total, places = rows["train"].total, rows["train"].slots
    if places is not None and total < 2 * places:
        raise UserError(
            f"data.carry_state: the {total} rows of data.train are fewer than two for each of the {places} "
            "rows of a step, so nothing would be carried",
            "give more text, or set a smaller trainer.global_batch or data.seq_len",
        )
    meta = {
        name: {
            "tokens": stream.tokens,
            "bytes": stream.entry.bytes,
            "documents": stream.entry.documents,
            "rows": count_rows(stream.tokens, L),
            "sha256": stream.entry.sha256,
        }
        for name, stream in streams.items()
    }
    return prepared, rows, meta


def _open_mix(config: RunConfig, tokenizer: Tokenizer) -> Data:
    """All sources of a mixture, each in an order of its own; UserError names the source."""
    folders, sources = [], {}
    sets: dict[str, Ordered] = {}
    meta: dict[str, dict[str, Any]] = {}
    for name, page in pages(config.data).items():
        seed = key_of("ssmtrain source", config.seed, name)
        try:
            prepared, rows, found = _open(config, page, seed, tokenizer)
        except UserError as error:
            raise UserError(f"data.sources.{name}: {error.lines[0]}", *error.lines[1:]) from None
        folders.append(prepared)
        sources[name] = rows.pop("train")
        meta[f"train/{name}"] = found.pop("train")
        for split, part in rows.items():
            own = set_name(split)
            inner = f"{name}/{own}" if own else name
            sets[inner], meta[f"val/{inner}"] = part, found[split]
    _warn_of_copies(
        {f"data.sources.{name}": meta[f"train/{name}"] for name in sources},
        {f"validation set {name}": meta[f"val/{name}"] for name in sets},
    )
    meta["train"] = summed(meta, [f"train/{name}" for name in sources])
    meta["val"] = summed(meta, [f"val/{name}" for name in sets])
    train = Mixture(sources, phases(config), config.seed)
    return Data(train, Joined(list(sets.values())), meta, folders[0], sources, sets)


def _warn_of_copies(train: dict[str, dict[str, Any]], val: dict[str, dict[str, Any]]) -> None:
    """Say that a validation set is a text that is trained on, wherever its copy lies."""
    texts = {found["sha256"]: name for name, found in train.items()}
    for name, found in val.items():
        if found["sha256"] in texts:
            said = "%s is the text of %s, word for word: its loss says nothing of texts that are new"
            log.warning(said, name, texts[found["sha256"]])


def summed(meta: dict[str, dict[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """Figures of several texts together; the digest is of their names and digests."""
    digest = hashlib.sha256("".join(f"{key} {meta[key]['sha256']}\n" for key in keys).encode())
    counts = {name: sum(meta[key][name] for key in keys) for name in ("tokens", "bytes", "documents", "rows")}
    return {**counts, "sha256": digest.hexdigest()}


def _slashed(meta: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {key.replace(VAL, "val/", 1): found for key, found in meta.items()}


def text_rows(texts: Sequence[str], tokenizer: Tokenizer, seq_len: int) -> Rows:
    """Rows of some documents held in memory, in order; UserError when there is nothing to predict."""
    documents = [np.append(ids, tokenizer.eot) for ids in map(tokenizer.encode, texts) if len(ids)]
    if not documents:
        raise UserError("the text is empty: nothing to score")
    lengths = np.array([len(d) for d in documents], np.int64)
    starts = np.cumsum(lengths) - lengths
    return Rows(MemoryStream(np.concatenate(documents), starts), seq_len, None, tokenizer.eot)
