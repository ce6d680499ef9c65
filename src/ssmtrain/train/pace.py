"""How long a rank works by itself in a step: what it waits for the others is not in it, so a slow one shows.

That is reading its rows and its passes up to the last backward pass, during which gradients are summed. Of a
model that is cut over the ranks (fsdp) every forward pass waits for the others too, so that only a rank slow
in reading shows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

TIMES = 1.3
"""A rank is slow that works so many times as long as the median of the others …"""
STEPS = 50
"""… for so many steps without a break …"""
COST = 0.05
"""… and makes a step longer by this share at least."""


class Pace:
    """Adds up a rank's own seconds; on a GPU by its events, read when the step has waited for it anyway."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds, self.steps = 0.0, 0
        self.begun: float | torch.cuda.Event = 0.0
        self.ended: float | torch.cuda.Event | None = None
        """When the latest pass had come to its backward."""
        self.since = time.perf_counter()

    def add(self, seconds: float) -> None:
        """Count seconds of the host's, spent before the step's first message."""
        self.seconds += seconds

    def begin(self) -> None:
        """The first message has come: from here on the rank works alone."""
        self.begun, self.ended = self._now(), None

    def mark(self) -> None:
        """A backward pass begins; if it is the last one, gradients are summed during it."""
        self.ended = self._now()

    def end(self) -> None:
        """The device has done the step."""
        self.steps += 1
        if isinstance(self.begun, float) and isinstance(self.ended, float):
            self.seconds += self.ended - self.begun
        elif isinstance(self.begun, torch.cuda.Event) and isinstance(self.ended, torch.cuda.Event):
            self.seconds += self.begun.elapsed_time(self.ended) / 1000

    def take(self) -> tuple[float, float]:
        """(own seconds, all seconds) of a step, in the mean since the last call."""
        steps, now = max(self.steps, 1), time.perf_counter()
        found = self.seconds / steps, (now - self.since) / steps
        self.seconds, self.steps, self.since = 0.0, 0, now
        return found

    def _now(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Judge:
    """Says of a rank that it is slow, once, when it has been so for long enough."""

    def __init__(self) -> None:
        self.slow: dict[int, int] = {}
        """By rank: for how many steps."""

    def look(self, own: Sequence[float], whole: float, steps: int) -> list[tuple[int, float, float, int]]:
        """(rank, its seconds, the median of the others', for how many steps) of each that is now called slow.

        `own` are the ranks' seconds in the mean of the latest `steps`, `whole` is how long such a step took.
        """
        found = []
        for rank, seconds in enumerate(own):
            others = statistics.median([*own[:rank], *own[rank + 1 :]])
            if seconds <= TIMES * others or seconds - others < COST * whole:
                self.slow.pop(rank, None)
                continue
            before = self.slow.get(rank, 0)
            self.slow[rank] = before + steps
            if before < STEPS <= before + steps:
                found.append((rank, seconds, others, before + steps))
        return found
