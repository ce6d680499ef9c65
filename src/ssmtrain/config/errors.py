"""What can end a run on purpose, and the exit code that says so."""

from __future__ import annotations

from collections.abc import Sequence

FINISHED = 0
BUG = 1
WRONG_INPUT = 2
NON_FINITE = 3
LOST = 4
OUT_OF_MEMORY = 5
UNFINISHED = 75
INTERRUPTED = 130

SHOWN = 5
"""Lines of one error that are printed; the rest are counted."""


class Stop(Exception):
    """Ends the program with `code` after printing `lines`; never with a traceback unless SSMTRAIN_DEBUG=1.

    Of `lines` the first five are printed and the rest counted; `details` (a list to choose from) is printed
    whole.
    """

    code = BUG

    def __init__(self, *lines: str, details: Sequence[str] = ()) -> None:
        self.lines = list(lines)
        self.details = list(details)
        super().__init__("\n".join(lines))


class UserError(Stop):
    """Wrong input (exit 2): each line names what is wrong, what was expected and what to type next."""

    code = WRONG_INPUT


class NonFinite(Stop):
    """Too many steps in a row had a loss or gradient that is not finite (exit 3)."""

    code = NON_FINITE


class Lost(Stop):
    """A rank died or hangs (exit 4)."""

    code = LOST


class OutOfMemory(Stop):
    """A device or the host ran out of memory (exit 5)."""

    code = OUT_OF_MEMORY
