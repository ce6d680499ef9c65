"""How a batch is cut for the chunked scan: blocks of a few rows by one chunk, walked in order.

No block holds two documents in one row, so nothing is masked at document boundaries; a document's last
chunk is as short as it is. On a CPU a block is small enough that what passes between its ops stays in the
core's cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Some rows, some tokens; its place among documents and among kept states."""

    rows: slice
    time: slice
    docs: slice
    """The documents of the rows, one each."""
    kept: slice
    """Where the states that enter the block are kept."""
    first: bool
    """Whether the documents begin here."""
    last: bool
    """Whether they end here."""


def kept_states(batch: int, length: int, chunk: int, n_docs: int) -> int:
    """Return for how many states to keep room: known without reading doc_ids, and never too few."""
    if n_docs == batch:
        return batch * -(-length // chunk)
    return batch * length // chunk + n_docs


def plan(batch: int, length: int, chunk: int, doc_ids: Tensor | None, rows_at_once: int) -> list[Block]:
    """Cut B rows of L tokens into blocks of up to `chunk` tokens, each document's in order of time."""
    blocks: list[Block] = []
    kept = 0
    for docs, rows, start, end in _runs(batch, length, doc_ids, rows_at_once):
        for begin in range(start, end, chunk):
            size = rows.stop - rows.start
            time = slice(begin, min(begin + chunk, end))
            blocks.append(Block(rows, time, docs, slice(kept, kept + size), begin == start, time.stop == end))
            kept += size
    return blocks


def _runs(
    batch: int, length: int, doc_ids: Tensor | None, rows_at_once: int
) -> list[tuple[slice, slice, int, int]]:
    """List (documents, rows, start, end): rows together if each is one document, else one document each."""
    if doc_ids is None:
        spans = [slice(row, min(row + rows_at_once, batch)) for row in range(0, batch, rows_at_once)]
        return [(span, span, 0, length) for span in spans]
    first = torch.ones_like(doc_ids, dtype=torch.bool)
    first[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    # Documents are row-major: one after another when flat.
    starts = first.flatten().nonzero().flatten().tolist()
    runs: list[tuple[slice, slice, int, int]] = []
    for start, end in zip(starts, [*starts[1:], batch * length], strict=True):
        row, time = divmod(start, length)
        document = len(runs)
        runs.append((slice(document, document + 1), slice(row, row + 1), time, time + end - start))
    return runs
