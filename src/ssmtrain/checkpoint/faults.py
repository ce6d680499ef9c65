"""Named places where a test may end this process, so that crashes happen exactly where they hurt."""

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


def point(name: str) -> None:
    """Do nothing, unless SSMTRAIN_FAULT is "name:n" (SIGKILL itself at the n-th passing) or "name:n:TERM"."""
    plan = os.environ.get(VARIABLE)
    if not plan:
        return
    wanted, count, *how = plan.split(":")
    if wanted != name:
        return
    _passed[name] += 1
    if _passed[name] == int(count):
        os.kill(os.getpid(), signal.Signals[f"SIG{how[0] if how else 'KILL'}"])
