"""What no single field can know of tasks and checks: what does not fit a row, a vocabulary or a tokenizer.

Like `config.checks` it reads plain attributes, so that it runs before torch is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssmtrain.config.expect import show_value

TASKS = ("mqar", "induction", "selective_copy", "copy", "parity")
"""Kinds of data that are tasks: no text, and no tokenizer."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_TAKEN = ("kind", "step")


def tasks(data: Any) -> dict[str, Any]:
    """The tasks of a data page, or its namespace, by key: the page itself, or sources of a mixture."""
    if data.kind == "mix":
        sources = {f"data.sources.{name}": source for name, source in data.sources.items()}
        return {key: source for key, source in sources.items() if source.kind in TASKS}
    return {"data": data} if data.kind in TASKS else {}


def vocabulary(data: Any) -> int | None:
    """Ids of a page's tasks, which share them; None where it has none."""
    return max((task.vocab_size for task in tasks(data).values()), default=None)


def problems(config: Any, text_vocabulary: int | None) -> Iterator[str]:
    """What is wrong with a run's task and checks, a line each; `text_vocabulary` is its tokenizer's, if it
    has one."""
    data, vocab = config.data, config.model.vocab_size
    found = tasks(data)
    if found:
        yield from _task_data(config, found)
        for key, task in found.items():
            if vocab is not None and vocab < task.vocab_size:
                yield (
                    f"model.vocab_size = {vocab}: smaller than {key}.vocab_size = {task.vocab_size}; "
                    f"expected at least {vocabulary(data)}, or leave it out"
                )
        vocab = vocab or vocabulary(data)
    elif config.tokenizer.kind == "ids":
        yield (
            f"tokenizer.kind = ids: data.kind = {data.kind} is text, which ids cannot stand for; take "
            f"tokenizer=bytes, or a task as data: {', '.join(TASKS)}"
        )
    for name, check in config.checks.items():
        yield from _check(config, name, check, vocab or text_vocabulary)


def _task_data(config: Any, found: dict[str, Any]) -> Iterator[str]:
    data, kind = config.data, config.tokenizer.kind
    first, task = next(iter(found.items()))
    if data.kind == "mix":
        texts = [name for name, source in data.sources.items() if source.kind not in TASKS]
        for name in texts:
            yield (
                f"data.sources.{name}.kind = {data.sources[name].kind}: text, beside the task {first}; no "
                "tokenizer is for both. A mixture is of texts or of tasks; a task is scored beside texts as "
                f"one of checks, as in checks.{first.removeprefix('data.sources.')}.kind={task.kind}"
            )
        if texts:
            return
        yield from _mixed(data, found)
    if kind != "ids":
        yield (
            f"tokenizer.kind = {kind}: {first}.kind = {task.kind} makes ids and no text, so it would be "
            "ignored; take tokenizer=ids"
        )
    for key, task in found.items():
        yield from _fit(key, task, data.seq_len, "data.seq_len")
        for length in task.val_lengths:
            yield from _fit(key, task, length, f"{key}.val_lengths")
        twice = sorted({n for n in task.val_lengths if task.val_lengths.count(n) > 1})
        if twice:
            yield f"{key}.val_lengths: {twice[0]} stands twice"
    prompt = config.generate.prompt
    if kind == "ids" and not all(word.isdecimal() for word in prompt.split()):
        yield (
            f"generate.prompt = {show_value(prompt)}: with tokenizer.kind = ids expected numbers, "
            "such as 1 5 2"
        )


def _mixed(data: Any, found: dict[str, Any]) -> Iterator[str]:
    """What is said of a mixture of tasks that only texts have."""
    if data.cache_dir is not None:
        yield f"data.cache_dir = {show_value(data.cache_dir)}: no effect, as nothing is prepared; delete it"
    if data.seq_len_warmup:
        yield (
            f"data.seq_len_warmup: what a row of {next(iter(found))} asks for would be cut off from where it "
            "stood; leave it out"
        )
    for key, task in found.items():
        if task.max_epochs is not None and task.train_rows is None:
            yield (
                f"{key}.max_epochs = {task.max_epochs}: no effect without {key}.train_rows, as no row comes "
                "twice; leave one out"
            )


def _fit(where: str, task: Any, length: int, key: str) -> Iterator[str]:
    """Why the rows of a task cannot be made at the length that a key has."""
    row = f"{key} = {length}"
    if task.kind == "mqar":
        if 4 * task.n_pairs > length:
            yield (
                f"{row}: {where}.n_pairs = {task.n_pairs} take four tokens each; expected at least "
                f"{4 * task.n_pairs}"
            )
        if task.n_pairs > (least := task.vocab_size // 2 - 1):
            yield (
                f"{where}.n_pairs = {task.n_pairs}: {where}.vocab_size = {task.vocab_size} has {least} keys; "
                f"expected a vocabulary of at least {2 * task.n_pairs + 2}"
            )
    elif task.kind == "induction" and length < 4:
        yield f"{row}: expected at least 4, for a marker, a token, one more and the marker again"
    elif task.kind == "selective_copy" and 2 * task.n_tokens > length:
        yield (
            f"{row}: {where}.n_tokens = {task.n_tokens} are in it twice; expected at least "
            f"{2 * task.n_tokens}"
        )
    elif task.kind == "copy" and 2 * task.min_len + 2 > length:
        yield (
            f"{row}: two strings of {where}.min_len = {task.min_len} and two marks take "
            f"{2 * task.min_len + 2} tokens; expected at least as many"
        )
    elif task.kind == "parity" and task.min_len > length:
        yield f"{row}: shorter than {where}.min_len = {task.min_len}; expected at least as long"


def _check(config: Any, name: str, check: Any, vocab: int | None) -> Iterator[str]:
    where = f"checks.{name}"
    if not _NAME.fullmatch(name) or name in _TAKEN:
        yield (
            f"{where}: expected a name of small letters, digits and '_', at most 40, beginning with a "
            f"letter, and neither {' nor '.join(_TAKEN)}"
        )
    if check.kind != "file":
        yield from _fit(where, check, check.seq_len, f"{where}.seq_len")
        if vocab is not None and check.vocab_size > vocab:
            yield (
                f"{where}.vocab_size = {check.vocab_size}: the model has {vocab} ids; expected at most as "
                "many, or a larger model.vocab_size"
            )
        return
    if config.tokenizer.kind == "ids":
        yield f"{where}.kind = file: with tokenizer.kind = ids no text can be read; take a task as check"
    elif "\0" in check.path:
        yield f"{where}.path = {show_value(check.path)}: a path cannot hold a NUL character; delete it"
    elif not Path(os.path.expanduser(check.path)).is_file():
        yield f"{where}.path = {show_value(check.path)}: there is no such file"
