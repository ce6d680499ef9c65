"""How far a long preparation is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
from itertools import accumulate
from time import monotonic
from types import TracebackType
from typing import Any

from ssmtrain.data.spans import Entry, Records, Span
from ssmtrain.data.units import Files, Lines, Unit

AFTER = 1.0
"""Seconds before anything is shown: small texts are ready by then."""
LOG_EVERY = 10.0
log = logging.getLogger(__name__)


class Progress:
    """Bytes of text done and a second, and the share of the files' bytes."""

    def __init__(self, label: str, entries: list[Entry]) -> None:
        sizes = [e.stop - e.start if isinstance(e, Span) else _size(e) for e in entries]
        self._label, self._ends = label, [0, *accumulate(sizes)]
        self._began = self._said = monotonic()
        self._bar: Any = None
        self._first: int | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, done: int, unit: Unit) -> None:
        """Say that `done` bytes of text are written, `unit` the last of them."""
        now = monotonic()
        if self._first is None:
            self._first = done  # an earlier start did these
        if now - self._began < AFTER:
            return
        ends, place = self._ends, self._ends[unit.entry]
        if isinstance(unit, Files):
            place += sum(span.stop - span.start for span in unit.spans)
        elif isinstance(unit, Lines):
            place += unit.stop
        share = min(1.0, place / ends[-1]) if ends[-1] else None
        speed = (done - self._first) / (now - self._began) / 1e6
        said = f"{done / 1e6:,.0f} MB of text, {speed:.0f} MB/s"
        if sys.stderr is not None and sys.stderr.isatty():
            self._show(share, said)
        elif now - self._said > LOG_EVERY:
            self._said = now
            part = f" ({share:.0%})" if share else ""
            log.info("preparing %s: %s%s", self._label, said, part)

    def _show(self, share: float | None, said: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("preparing {task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._label, total=None if share is None else 1.0, said=said)
            self._bar.start()
        self._bar.update(self._task, completed=share or 0.0, said=said)


def _size(entry: Entry) -> int:
    return entry.file.size if isinstance(entry, Records) else 0
