"""The rows of a run whose data is a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ssmtrain.data.mixture import Ordered
from ssmtrain.data.module import Data
from ssmtrain.data.tasks.rows import TaskRows, at_length, fingerprint

if TYPE_CHECKING:
    from ssmtrain.config.schema import RunConfig
    from ssmtrain.config.tasks import AnyTaskCheck, AnyTaskData

FIXED = 0
"""Seed of the rows that score: the same for every run, so that runs of different seeds compare."""


def open_task(config: RunConfig) -> Data:
    """Training, validation and further validation rows of the run's task."""
    task = cast("AnyTaskData", config.data)
    train = TaskRows(task, "train", config.seed, task.train_rows, shuffle=True)
    val = TaskRows(task, "val", FIXED, task.val_rows)
    lengths: dict[int, Ordered] = {
        n: TaskRows(at_length(task, n), "val", FIXED, task.val_rows) for n in task.val_lengths
    }
    meta: dict[str, dict[str, Any]] = {
        name: {
            "tokens": rows.per_epoch * rows.seq_len,
            "bytes": 0,
            "documents": rows.per_epoch,
            "rows": rows.per_epoch,
            "sha256": fingerprint(task, count),
        }
        for name, rows, count in (("train", train, task.train_rows), ("val", val, task.val_rows))
    }
    return Data(train, val, meta, None, lengths=lengths)


def training_rows(config: RunConfig) -> TaskRows:
    """Some rows that the run trains on, as many as it validates on."""
    task = cast("AnyTaskData", config.data)
    return TaskRows(task, "train", config.seed, min(task.val_rows, task.train_rows or task.val_rows))


def check_rows(check: AnyTaskCheck) -> TaskRows:
    """The rows of a check, apart from those of training and validation."""
    return TaskRows(check, "check", FIXED, check.rows)
