"""The rows of a run whose data is a task, or a mixture of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ssmtrain.config.data import source_page
from ssmtrain.config.mixing import phases
from ssmtrain.data.mixture import ROW_BITS, Joined, Mixture, Ordered
from ssmtrain.data.module import Data, summed
from ssmtrain.data.order import key_of
from ssmtrain.data.tasks.rows import TaskRows, at_length, fingerprint

if TYPE_CHECKING:
    from ssmtrain.config.schema import RunConfig
    from ssmtrain.config.tasks import AnyTaskCheck, AnyTaskData

FIXED = 0
"""Seed of the rows that score: the same for every run, so that runs of different seeds compare."""


def open_task(config: RunConfig) -> Data:
    """Training, validation and further validation rows of the run's task, or of each of its mixture's."""
    if config.data.kind == "mix":
        return _open_mix(config)
    task = cast("AnyTaskData", config.data)
    train = TaskRows(task, "train", config.seed, task.train_rows, shuffle=True)
    val = TaskRows(task, "val", FIXED, task.val_rows)
    meta = {"train": _figures(train, task.train_rows), "val": _figures(val, task.val_rows)}
    return Data(train, val, meta, None, lengths=_lengths(task))


def _open_mix(config: RunConfig) -> Data:
    """Each task in an order of its own."""
    meta: dict[str, dict[str, Any]] = {}
    sources: dict[str, TaskRows] = {}
    sets: dict[str, Ordered] = {}
    lengths: dict[str, Ordered] = {}
    for name, task in _pages(config).items():
        # Where no row comes twice they are as many as a sample id can tell apart.
        count = task.train_rows or 1 << ROW_BITS
        seed = key_of("ssmtrain source", config.seed, name)
        sources[name] = TaskRows(task, "train", seed, count, shuffle=task.train_rows is not None)
        sets[name] = val = TaskRows(task, "val", FIXED, task.val_rows)
        meta[f"train/{name}"] = _figures(sources[name], task.train_rows)
        meta[f"val/{name}"] = _figures(val, task.val_rows)
        lengths |= {f"{name}/{n}": rows for n, rows in _lengths(task).items()}
    for split in ("train", "val"):
        meta[split] = summed(meta, [f"{split}/{name}" for name in sources])
    train = Mixture(sources, phases(config), config.seed)
    return Data(train, Joined(list(sets.values())), meta, None, sets=sets, lengths=lengths)


def _pages(config: RunConfig) -> dict[str, AnyTaskData]:
    """The page of each task by name; of one alone under no name."""
    data = config.data
    if data.kind != "mix":
        return {"": cast("AnyTaskData", data)}
    return {name: cast("AnyTaskData", source_page(data, one)) for name, one in data.sources.items()}


def _figures(rows: TaskRows, count: int | None) -> dict[str, Any]:
    return {
        "tokens": rows.per_epoch * rows.seq_len,
        "bytes": 0,
        "documents": rows.per_epoch,
        "rows": rows.per_epoch,
        "sha256": fingerprint(rows.task, count),
    }


def _lengths(task: AnyTaskData) -> dict[str, Ordered]:
    return {str(n): TaskRows(at_length(task, n), "val", FIXED, task.val_rows) for n in task.val_lengths}


def training_rows(config: RunConfig) -> dict[str, TaskRows]:
    """Some rows that the run trains on, as many as it validates on, of each task by name."""
    found = {}
    for name, task in _pages(config).items():
        seed = key_of("ssmtrain source", config.seed, name) if name else config.seed
        found[name] = TaskRows(task, "train", seed, min(task.val_rows, task.train_rows or task.val_rows))
    return found


def check_rows(check: AnyTaskCheck) -> TaskRows:
    """The rows of a check, apart from those of training and validation."""
    return TaskRows(check, "check", FIXED, check.rows)
