"""A batch of rows, what can give batches, and how batches are joined and cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


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
    """What each row is: its number in the file order, or what the samples' `names` can tell; one of a row
    that was cut into several."""
    slots: list[int] | None = None
    """Where states are carried: the place in the step whose rows each row follows."""
    goes_on: list[bool] | None = None
    """Where states are carried: whether each row begins inside the document that the row before it in its
    slot ended with."""

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device, copied without waiting where the memory is pinned."""
        doc_ids = None if self.doc_ids is None else self.doc_ids.to(device, non_blocking=True)
        inputs = self.inputs.to(device, non_blocking=True)
        return replace(self, inputs=inputs, labels=self.labels.to(device, non_blocking=True), doc_ids=doc_ids)


class Samples(Protocol):
    """What training reads: rows by sample number, which runs on from epoch to epoch, from 0 without end."""

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""

    @property
    def per_epoch(self) -> int:
        """Rows of all its text."""

    def samples(self, numbers: Sequence[int]) -> np.ndarray:
        """What some sample numbers stand for, int64 (B,), as in `Batch.sample_ids`."""

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows of some sample numbers; a row is the same tokens in any batch."""

    def ahead(self, numbers: Sequence[int]) -> None:
        """Have the rows of some sample numbers fetched, without waiting, which are to be read next."""

    def names(self, ids: Sequence[int]) -> list[Any]:
        """Sample ids for people: row numbers, or "source:row"."""


def join(parts: Sequence[tuple[np.ndarray, Batch]]) -> Batch:
    """One batch of several, each with the places (B_i,) of its rows in the whole."""
    total, first = sum(len(places) for places, _ in parts), parts[0][1]
    inputs = first.inputs.new_empty((total, first.inputs.shape[1]))  # (B, L)
    labels, opens = torch.empty_like(inputs), torch.empty_like(inputs, dtype=torch.bool)
    ids = np.empty(total, np.int64)
    for places, batch in parts:
        at = torch.from_numpy(places)
        inputs[at], labels[at], opens[at] = batch.inputs, batch.labels, _opens(batch)
        ids[places] = batch.sample_ids
    return replace(first, inputs=inputs, labels=labels, sample_ids=ids.tolist(), **_numbered(opens))


def cut(batch: Batch, length: int) -> Batch:
    """The same tokens and labels in rows of `length`, which divides L: a document ends where its row does."""
    rows, L = batch.inputs.shape
    if length == L:
        return batch
    shape = (rows * (L // length), length)
    opens = _opens(batch).view(shape)
    opens[:, 0] = True
    inputs, labels = batch.inputs.view(shape), batch.labels.view(shape)
    return replace(batch, inputs=inputs, labels=labels, **_numbered(opens))


def apart(batch: Batch) -> Iterator[Batch]:
    """Each row as a batch of its own; those that were cut from one share its sample id."""
    rows, opens = len(batch.inputs), _opens(batch)
    if rows == 1:
        yield batch
        return
    for i in range(rows):
        at = slice(i, i + 1)
        sample = batch.sample_ids[i * len(batch.sample_ids) // rows]
        yield Batch(batch.inputs[at], batch.labels[at], sample_ids=[sample], **_numbered(opens[at]))


def _opens(batch: Batch) -> Tensor:
    """Where a document begins, (B, L) bool."""
    opens = torch.zeros(batch.inputs.shape, dtype=torch.bool)
    opens[:, 0] = True
    if batch.doc_ids is not None:
        flat = batch.doc_ids.flatten()
        opens.view(-1)[1:] |= flat[1:] != flat[:-1]
    return opens


def _numbered(opens: Tensor) -> dict[str, Any]:
    """doc_ids and n_docs of a batch whose documents begin there."""
    ids = opens.flatten().cumsum(0, dtype=torch.int32) - 1
    n_docs = int(ids[-1]) + 1
    return {"doc_ids": None if n_docs == len(opens) else ids.view(opens.shape), "n_docs": n_docs}
