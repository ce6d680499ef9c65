"""A row of a task: its tokens, what is asked, and the answers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from ssmtrain.data.batch import Batch
from ssmtrain.data.pack import IGNORE
from ssmtrain.data.tasks.rows import TaskRows

SHOWN = 16
"""Answers that are printed one by one."""
AGAIN = 4
"""A token that stands so often in a row is written once."""


@dataclass(frozen=True)
class Asked:
    """What a row of a task is made of, and asks for."""

    kind: str
    seed: int
    """With the row's number all that decides it."""
    ids: list[int]
    answers: list[tuple[int, int]]
    """(position, the id to be said there), ascending."""

    def tokens(self, limit: int | None) -> str:
        """The tokens for a reader, each with its answer as [5→8]; the middle left out beyond a limit."""
        answers = dict(self.answers)
        said = [
            f"[{token}→{answers[at]}]" if at in answers else str(token) for at, token in enumerate(self.ids)
        ]
        words = []
        for word, group in groupby(said):
            many = len(list(group))
            words += [word] * many if many < AGAIN or "→" in word else [f"{word}×{many}"]
        text = " ".join(words)
        if limit is None or len(text) <= limit:
            return text
        head, tail = text[: limit // 2].rpartition(" ")[0], text[-limit // 2 :].partition(" ")[2]
        return f"{head} … {tail} ({len(self.ids):,} tokens)"

    def said(self, limit: int | None) -> str:
        """The answers for a reader."""
        shown = self.answers if limit is None else self.answers[:SHOWN]
        each = [f"{answer} at {at:,} after {self.ids[at]}" for at, answer in shown]
        more = [f"and {len(self.answers) - len(shown):,} more"] if len(shown) < len(self.answers) else []
        return ", ".join([*each, *more])


def asked(rows: TaskRows, batch: Batch, index: int) -> Asked:
    """A row of a batch of a task."""
    labels = batch.labels[index].tolist()
    answers = [(at, label) for at, label in enumerate(labels) if label != IGNORE]
    return Asked(rows.task.kind, rows.seed, batch.inputs[index].tolist(), answers)
