"""The names of checkpoints: which folders are some, and of which step; read without torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

_STEP = re.compile(r"step-([0-9]{8})")


def step_name(step: int) -> str:
    """The folder name of a step: `step-00000100`; ValueError beyond eight digits."""
    if not 0 <= step < 10**8:
        raise ValueError(f"step {step} does not fit in eight digits")
    return f"step-{step:08d}"


def is_name(name: str) -> bool:
    """Whether `name` is exactly a checkpoint's: step- and eight digits."""
    return _STEP.fullmatch(name) is not None


def step_of(path: Path) -> int:
    """The step in a checkpoint's folder name; ValueError if the name is not exactly a checkpoint's."""
    match = _STEP.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not a checkpoint's name (step- and eight digits)")
    return int(match[1])


def checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints in `folder`, good or not, oldest first; real folders, exact names only."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return []
    found = [e.name for e in entries if _STEP.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    return [folder / name for name in sorted(found)]
