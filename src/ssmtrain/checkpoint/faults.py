"""Named places where a test may end this process, so that crashes happen exactly where they hurt.

SSMTRAIN_FAULT is read once, when the program starts.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "SSMTRAIN_FAULT"

SAVE_POINTS = (
    "before_tensors",
    "mid_file",
    "after_tensors",
    "before_manifest",
    "after_manifest",
    "before_rename",
    "after_rename",
    "before_prune",
    "mid_prune",
)
"""The points inside a save, in the order in which it passes them."""

STEP_POINTS = ("step_start", "after_forward", "before_optimizer", "after_optimizer", "step_end")
"""The points inside a training step, in order."""

EXPORT_POINTS = ("mid_file", "before_note")
"""The points inside an export, in order."""

_passed: Counter[str] = Counter()
_plan: list[str] = []


def arm(plan: str | None = None) -> None:
    """From now on end this process where `plan` says: "name:n" is SIGKILL at the n-th passing of a point,
    "name:n:TERM" another signal. Nothing or "" disarms: a point is then an empty call."""
    global point
    _passed.clear()
    _plan[:] = (plan or "").split(":")
    point = _nothing if len(_plan) == 1 else _armed


def _nothing(name: str) -> None:
    """A point that is passed."""


def _armed(name: str) -> None:
    wanted, count, *how = _plan
    if wanted != name:
        return
    _passed[name] += 1
    if _passed[name] == int(count):
        os.kill(os.getpid(), signal.Signals[f"SIG{how[0] if how else 'KILL'}"])


point = _nothing
"""What the program calls at a named place, as `faults.point(name)`."""

arm(os.environ.get(VARIABLE))
