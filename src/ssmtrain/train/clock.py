"""Where the time of a run goes: start, data, step, save, val, sample, and the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by purpose since this process began, from a clock that never jumps."""

    def __init__(self, before: float = 0.0, start: float | None = None) -> None:
        self.start = time.monotonic() if start is None else start
        self.before = before
        """Seconds that earlier processes of this run have had."""
        self.startup: float | None = None
        """Seconds until the first step could begin; None until then."""
        self.spent: dict[str, float] = {"data": 0.0, "step": 0.0, "save": 0.0, "val": 0.0, "sample": 0.0}

    @contextmanager
    def __call__(self, purpose: str) -> Iterator[None]:
        """Count the body's time under a purpose."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.spent[purpose] = self.spent.get(purpose, 0.0) + time.perf_counter() - begin

    @property
    def elapsed(self) -> float:
        """Seconds of this process."""
        return time.monotonic() - self.start

    @property
    def total(self) -> float:
        """Seconds of the run, earlier processes included."""
        return self.before + self.elapsed

    def split(self) -> dict[str, float]:
        """Seconds by purpose, start-up and `other` included, rounded to milliseconds."""
        rest = max(0.0, self.elapsed - sum(self.spent.values()))
        startup = rest if self.startup is None else min(self.startup, rest)
        spent = {"start": startup, **self.spent, "other": rest - startup}
        return {key: round(value, 3) for key, value in spent.items()}
