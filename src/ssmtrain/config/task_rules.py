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


def problems(config: Any, text_vocabulary: int | None) -> Iterator[str]:
    """What is wrong with a run's task and checks, a line each; `text_vocabulary` is its tokenizer's, if it
    has one."""
    data, vocab = config.data, config.model.vocab_size
    if data.kind in TASKS:
        yield from _task_data(config)
        vocab = vocab or data.vocab_size
        if vocab < data.vocab_size:
            yield (
                f"model.vocab_size = {vocab}: smaller than data.vocab_size = {data.vocab_size}; "
                f"expected at least {data.vocab_size}, or leave it out"
            )
    elif config.tokenizer.kind == "ids":
        yield (
            f"tokenizer.kind = ids: data.kind = {data.kind} is text, which ids cannot stand for; take "
            f"tokenizer=bytes, or a task as data: {', '.join(TASKS)}"
        )
    for name, check in config.checks.items():
        yield from _check(config, name, check, vocab or text_vocabulary)


def _task_data(config: Any) -> Iterator[str]:
    data, kind = config.data, config.tokenizer.kind
    if kind != "ids":
        yield (
            f"tokenizer.kind = {kind}: data.kind = {data.kind} makes ids and no text, so it would be "
            "ignored; take tokenizer=ids"
        )
    for length in [data.seq_len, *data.val_lengths]:
        yield from _fit("data", data, length)
    twice = sorted({n for n in data.val_lengths if data.val_lengths.count(n) > 1})
    if twice:
        yield f"data.val_lengths: {twice[0]} stands twice"
    prompt = config.generate.prompt
    if kind == "ids" and not all(word.isdecimal() for word in prompt.split()):
        yield (
            f"generate.prompt = {show_value(prompt)}: with tokenizer.kind = ids expected numbers, "
            "such as 1 5 2"
        )


def _fit(where: str, task: Any, length: int) -> Iterator[str]:
    """Why the rows of a task cannot be made at a length."""
    row = f"{where}.seq_len = {length}" if length == task.seq_len else f"{where}.val_lengths = {length}"
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
        yield from _fit(where, check, check.seq_len)
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
