"""A task as rows, each made when it is read from (stream, seed, row number) alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ssmtrain.data.batch import Batch
from ssmtrain.data.order import Order
from ssmtrain.data.tasks.copying import copying
from ssmtrain.data.tasks.draws import Draws
from ssmtrain.data.tasks.induction import induction
from ssmtrain.data.tasks.mqar import mqar
from ssmtrain.data.tasks.parity import parity
from ssmtrain.data.tasks.selective_copy import selective_copy

if TYPE_CHECKING:
    from ssmtrain.config.tasks import AnyTask

ENDLESS = 2**62
"""Rows of a stream in which none comes twice."""
VERSION = 1
"""Of what the tasks make: a change of it is a change of the data."""

_SHAPE = ("kind", "seq_len", "vocab_size", "n_pairs", "power", "filler", "n_tokens", "min_len", "asked")


class TaskRows:
    """Rows of a task, under a stream's name: those of different streams are drawn apart.

    Row i is the same tokens in any batch. With `count` rows and a shuffle, each epoch has another order.
    """

    def __init__(
        self, task: AnyTask, stream: str, seed: int, count: int | None = None, shuffle: bool = False
    ) -> None:
        self.task, self.stream, self.seed = task, stream, seed
        self.seq_len, self.per_epoch = task.seq_len, count or ENDLESS
        self._order = Order(self.per_epoch, seed if shuffle and count else None)

    def samples(self, numbers: Sequence[int] | range) -> np.ndarray:
        """Rows of some sample numbers, which run on from epoch to epoch; int64 (B,)."""
        return self._order(numbers)

    def names(self, ids: Sequence[int]) -> list[Any]:
        """Sample ids are row numbers."""
        return list(ids)

    def batch(self, numbers: Sequence[int] | range) -> Batch:
        """The rows of some sample numbers."""
        return self.batch_rows(self.samples(numbers))

    def ahead(self, numbers: Sequence[int]) -> None:
        """Nothing: a row is made when it is read."""

    def batch_rows(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """Some rows by their number, 0 … per_epoch - 1."""
        rows = np.asarray(numbers, np.int64)
        tokens, labels = make(self.task, Draws(f"{self.task.kind} {self.stream}", self.seed, rows))
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), None, len(rows), rows.tolist())


def make(task: AnyTask, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels of some rows of a task, int64 (B, L) each; -100 where nothing is asked."""
    match task.kind:
        case "mqar":
            return mqar(task, draws)
        case "induction":
            return induction(task, draws)
        case "selective_copy":
            return selective_copy(task, draws)
        case "copy":
            return copying(task, draws)
        case "parity":
            return parity(task, draws)


def at_length(task: AnyTask, length: int) -> AnyTask:
    """The task in rows of another length, its sequences as long as they allow."""
    change = {"seq_len": length}
    if task.kind == "copy":
        change["min_len"] = (length - 2) // 2
    elif task.kind == "parity":
        change["min_len"] = length
    return task.model_copy(update=change)


def fingerprint(task: AnyTask, rows: int | None) -> str:
    """Hex sha256 of what decides the rows of a task, the seed apart."""
    shape = {key: getattr(task, key) for key in _SHAPE if hasattr(task, key)}
    return hashlib.sha256(json.dumps([VERSION, shape, rows], sort_keys=True).encode()).hexdigest()
