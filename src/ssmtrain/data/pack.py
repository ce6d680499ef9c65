"""A stream of tokens as rows: labels, and documents numbered over a batch."""

from __future__ import annotations

import numpy as np

IGNORE = -100
"""Label of a position that predicts nothing."""


def count_rows(tokens: int, seq_len: int) -> int:
    """Rows of a stream: its last token is only ever a label, so it opens no row of its own."""
    return max(0, -(-(tokens - 1) // seq_len))


def document_starts(rows: np.ndarray, seq_len: int, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where documents start in each row's positions 1 … seq_len (seq_len: the token after the row).

    `rows` (B,) are row numbers, `starts` the ascending positions in the stream at which documents start.
    Returns the index into `rows` and the position, one pair per start: int64 (k,), int64 (k,).
    """
    begin = rows.astype(np.int64) * seq_len
    low = np.searchsorted(starts, begin, side="right")
    high = np.searchsorted(starts, begin + seq_len, side="right")
    count = high - low  # (B,)
    which = np.repeat(np.arange(len(rows)), count)  # (k,)
    within = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)  # (k,) 0 … count-1
    position = starts[low[which] + within] - begin[which]  # (k,)
    return which, position


def begins_inside(rows: np.ndarray, seq_len: int, starts: np.ndarray) -> np.ndarray:
    """Whether each row (B,) begins inside a document, not with one; bool (B,)."""
    begin = rows.astype(np.int64) * seq_len
    at = np.searchsorted(starts, begin, side="right") - 1
    return np.asarray(starts[at] != begin)


def number_documents(rows: int, seq_len: int, which: np.ndarray, position: np.ndarray) -> np.ndarray:
    """doc_ids (rows, seq_len) int32, row-major from 0: a document opens at each row and each start."""
    opens = np.zeros((rows, seq_len), np.int32)
    opens[:, 0] = 1
    inside = position < seq_len
    opens[which[inside], position[inside]] = 1
    return (np.cumsum(opens.reshape(-1), dtype=np.int32) - 1).reshape(rows, seq_len)
