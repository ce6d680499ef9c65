"""Which sample numbers the steps of a run take, however its batch grows and whatever it left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssmtrain.config.growth import Staged


@dataclass(frozen=True)
class Begin:
    """Where the steps of a run are counted from: 0, or what a fork kept."""

    step: int = 0
    rows: int = 0
    """Rows consumed before the step that follows."""
    tokens: int = 0
    """Tokens seen before it."""


ZERO = Begin()


@dataclass(frozen=True)
class Stretch:
    """Steps of one size, one after the other, whose rows follow each other."""

    before: int
    """Steps before its first."""
    steps: int
    tokens: int
    """Tokens seen before its first step."""
    first: int
    """First sample number of its first step."""
    rows: int
    """Rows of a step."""

    def numbers(self, step: int) -> range:
        """The sample numbers of one of its steps."""
        first = self.first + (step - 1 - self.before) * self.rows
        return range(first, first + self.rows)


def stretches(
    batches: Staged, row: int, begin: Begin, known: Sequence[tuple[int, int]], last: int, left_out: int = 0
) -> list[Stretch]:
    """All steps up to `last` of a run whose rows have `row` tokens.

    `known` are steps, ascending, and the rows consumed after each: those of the run's checkpoints, which know
    of rows that it left out when it went back. `left_out` are those since the last of them.
    """
    found: list[Stretch] = []
    step, rows, tokens = begin.step, begin.rows, begin.tokens
    while step < last:
        size = batches.at(tokens)
        grows = next((until for until, _ in batches.stages if tokens < until), None)
        end = last if grows is None else min(last, step + -(-(grows - tokens) // size))
        if known and step == known[-1][0]:
            rows += left_out
        mark = next((mark for mark in known if mark[0] > step), None)
        if mark is not None:
            end = min(end, mark[0])
            rows = mark[1] - (batches.tokens_after(mark[0] - step, tokens) - tokens) // row
        found.append(Stretch(step, end - step, tokens, rows, size // row))
        tokens, rows = tokens + (end - step) * size, rows + (end - step) * (size // row)
        step = end
    return found
