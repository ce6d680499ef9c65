"""What the trainer reads: batches of rows, by sample number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ssmtrain.config.errors import UserError
from ssmtrain.config.task_rules import TASKS
from ssmtrain.data.order import permute
from ssmtrain.data.pack import IGNORE, count_rows, document_starts, number_documents
from ssmtrain.data.prepare import Prepared, prepare
from ssmtrain.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ssmtrain.config.schema import RunConfig


@dataclass(frozen=True)
class Batch:
    """Some rows of tokens, what follows each token, and which document each belongs to."""

    inputs: torch.Tensor
    """(B, L) int64."""
    labels: torch.Tensor
    """(B, L) int64: the next token, or -100 where there is none to predict."""
    doc_ids: torch.Tensor | None
    """(B, L) int32, 0 … n_docs-1 row-major; None when every row is one document."""
    n_docs: int
    """Documents (or parts of them) in the batch."""
    sample_ids: list[int]
    """The row in the file order that each row of the batch is."""

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device, copied without waiting where the memory is pinned."""
        doc_ids = None if self.doc_ids is None else self.doc_ids.to(device, non_blocking=True)
        inputs = self.inputs.to(device, non_blocking=True)
        return replace(self, inputs=inputs, labels=self.labels.to(device, non_blocking=True), doc_ids=doc_ids)


class Numbered(Protocol):
    """Rows that are read by number: of a text, or of a task."""

    seq_len: int
    """Tokens in a row."""
    per_epoch: int
    """Rows, each once an epoch."""

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows of some sample numbers, which run on from epoch to epoch."""

    def batch_rows(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """Some rows by their place in file order."""


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


class Rows:
    """A split as rows of `seq_len` tokens, in a keyed order that differs by epoch, or in file order.

    Row i is tokens [i L, i L + L) of the stream; its labels are the tokens one later, -100 where a document
    starts and after the end. Every token that does not start a document is a label exactly once an epoch.
    """

    def __init__(self, stream: Stream, seq_len: int, seed: int | None, pad: int) -> None:
        self.stream, self.seq_len, self.seed, self.pad = stream, seq_len, seed, pad
        self.per_epoch = count_rows(stream.tokens, seq_len)

    def sample(self, number: int) -> int:
        """The row that a sample number stands for; sample numbers run on from epoch to epoch."""
        return int(self.samples([number])[0])

    def samples(self, numbers: Sequence[int]) -> np.ndarray:
        """Rows of some sample numbers, int64 (B,)."""
        epoch, position = np.divmod(np.asarray(numbers, np.int64), self.per_epoch)
        if self.seed is None:
            return position
        rows = np.empty_like(position)
        for e in np.unique(epoch):
            here = epoch == e
            rows[here] = permute(position[here], self.per_epoch, self.seed, int(e))
        return rows

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows of some sample numbers; a row is the same tokens in any batch."""
        return self.batch_rows(self.samples(numbers))

    def batch_rows(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """Some rows by their place in file order, 0 … per_epoch - 1."""
        rows, L = np.asarray(numbers, np.int64), self.seq_len
        tokens = np.full((len(rows), L + 1), self.pad, np.int64)  # (B, L + 1)
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

    train: Numbered
    """In a keyed order that differs by epoch."""
    val: Numbered
    """In file order."""
    meta: dict[str, dict[str, Any]]
    """By split: tokens, bytes (of text), documents, rows, sha256."""
    prepared: Prepared | None
    """The folder that the rows are read from, if they are text."""
    lengths: dict[int, Numbered] = field(default_factory=dict)
    """A task's rows of other lengths to validate on."""

    @property
    def tokenizer(self) -> str:
        """SHA-256 of the tokenizer's definition; "ids" where there is none."""
        return self.prepared.manifest.tokenizer if self.prepared is not None else "ids"


def open_data(config: RunConfig, tokenizer: Tokenizer | None = None) -> Data:
    """Prepare the run's data if need be and open it; UserError when it does not fill one row."""
    if config.data.kind in TASKS:
        from ssmtrain.data.tasks.source import open_task

        return open_task(config)
    prepared = prepare(config, tokenizer)
    L, pad = config.data.seq_len, prepared.manifest.eot
    streams = {split: prepared.stream(split) for split in ("train", "val")}
    train = Rows(streams["train"], L, config.seed, pad)
    val = Rows(streams["val"], L, None, pad)
    if train.stream.tokens <= L:
        raise UserError(
            f"data.train: {train.stream.tokens} tokens do not fill one row of data.seq_len={L}",
            "give more text, or set a smaller data.seq_len",
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
    return Data(train, val, meta, prepared)


def text_rows(texts: Sequence[str], tokenizer: Tokenizer, seq_len: int) -> Rows:
    """Rows of some documents held in memory, in order; UserError when there is nothing to predict."""
    documents = [np.append(ids, tokenizer.eot) for ids in map(tokenizer.encode, texts) if len(ids)]
    if not documents:
        raise UserError("the text is empty: nothing to score")
    lengths = np.array([len(d) for d in documents], np.int64)
    starts = np.cumsum(lengths) - lengths
    return Rows(MemoryStream(np.concatenate(documents), starts), seq_len, None, tokenizer.eot)
