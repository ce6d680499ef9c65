"""A run folder seen from outside: whether it runs, how far it is, what it scores; nothing is changed."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmtrain.checkpoint import lock, names
from ssmtrain.checkpoint.best import linked
from ssmtrain.checkpoint.records import CONFIG, read_status
from ssmtrain.config.errors import UserError
from ssmtrain.config.redact import redacted
from ssmtrain.config.yaml_reader import MAX_BYTES, read_yaml
from ssmtrain.runs.find import name_of
from ssmtrain.runs.lines import latest
from ssmtrain.train import attempts

METRICS = "metrics.jsonl"
STATES = ("running", "finished", "stopped", "failed", "stalled", "killed", "new")
"""new: it never came to its first step."""

_LIMIT = re.compile(rb"^  (max_steps|max_tokens): +([0-9]+)\s*$", re.MULTILINE)
_GROUP = re.compile(rb"^trainer:\s*$(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Seen:
    """What a look at a run's folder tells; None is what is not known."""

    name: str
    folder: Path
    state: str
    why: str
    """Who runs it, or how it ended."""
    step: int
    tokens: int
    max_steps: int | None
    max_tokens: int | None
    loss: float | None
    """Of the latest training record, nats per token."""
    val_loss: float | None
    val_bpb: float | None
    tokens_per_s: float | None
    changed: float
    """When it last wrote something, in seconds since 1970."""
    size: int
    """Bytes of all its files."""

    @property
    def progress(self) -> float | None:
        """The share of its steps, or tokens, that is done."""
        if self.max_steps:
            return min(1.0, self.step / self.max_steps)
        return min(1.0, self.tokens / self.max_tokens) if self.max_tokens else None


def look(folder: Path, runs_dir: Path) -> Seen:
    """Look at a run; whatever is missing or damaged in it is left out."""
    status = read_status(folder)
    found = latest(folder / METRICS, "train", "val")
    train, val = found.get("train", {}), found.get("val", {})
    state, why = state_of(folder)
    steps, tokens = limits(folder)
    return Seen(
        name_of(folder, runs_dir),
        folder,
        state,
        why,
        max(status["step"], whole(train.get("step"))),
        max(status["tokens"], whole(train.get("tokens"))),
        steps,
        tokens,
        figure(train.get("loss")),
        figure(val.get("loss")),
        figure(val.get("bpb")),
        figure(train.get("tokens_per_s")),
        changed(folder),
        size_of(folder),
    )


def state_of(folder: Path) -> tuple[str, str]:
    """One of STATES, and who runs it or how it ended."""
    owner = lock.look(folder / "lock")
    if owner is not None and owner.lives:
        return "running", owner.text
    if read_status(folder)["status"] == "finished":
        return "finished", ""
    starts = attempts.read(folder / attempts.FILE)
    last = starts[-1] if starts else None
    if owner is not None and not _ended(folder, last):
        return ("killed" if last else "new"), f"{owner.text} is gone and left no word"
    if last is None:
        return "new", "it never came to a step"
    if last.end is None:
        # Versions that do not note the end do not note the beginning either.
        return ("killed", "its process left no word") if last.since else ("stopped", "")
    state, _, why = last.end.partition(": ")
    return (state if state in STATES else "stopped"), why


def _ended(folder: Path, last: attempts.Attempt | None) -> bool:
    """Whether the word that was left is of the lock's owner: each start writes both files, the lock first."""
    try:
        locked, noted = ((folder / name).stat().st_mtime_ns for name in ("lock", attempts.FILE))
    except OSError:
        return False
    return last is not None and (last.end or "").startswith("stalled: ") and noted >= locked


def limits(folder: Path) -> tuple[int | None, int | None]:
    """trainer.max_steps and trainer.max_tokens of a run's page, which its run has written line by line.

    A list of hundreds of runs cannot wait for all their pages to be parsed.
    """
    try:
        with (folder / CONFIG).open("rb") as file:
            group = _GROUP.search(file.read(MAX_BYTES))
    except OSError:
        group = None
    found = {key: int(value) for key, value in _LIMIT.findall(group[1] if group else b"")}
    return found.get(b"max_steps"), found.get(b"max_tokens")


def page_of(folder: Path) -> dict[str, Any]:
    """A run's config as it is written, without secrets; empty where it cannot be read."""
    try:
        page: dict[str, Any] = redacted(read_yaml(folder / CONFIG))
    except UserError:
        return {}
    return page


def json_of(path: Path) -> dict[str, Any]:
    """A small JSON file of a run, without secrets; empty where it cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return redacted(found) if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Saved:
    """A checkpoint in a run."""

    step: int
    path: Path
    size: int
    best: bool
    val_loss: float | None


def checkpoints(folder: Path, scores: dict[int, float]) -> list[Saved]:
    """A run's checkpoints, oldest first, with the validation losses at their steps."""
    best = linked(folder)
    found = []
    for path in names.checkpoints(folder / "checkpoints"):
        step = names.step_of(path)
        is_best = best is not None and best.name == path.name
        found.append(Saved(step, path, size_of(path), is_best, scores.get(step)))
    return found


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed, what goes meanwhile is left out."""
    total = 0
    for where, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except OSError:
                continue
    return total


def changed(folder: Path) -> float:
    """When a run last wrote something."""
    times = []
    for name in (METRICS, attempts.FILE, "status.json", CONFIG, "checkpoints"):
        try:
            times.append(os.stat(folder / name).st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


def figure(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def whole(value: Any) -> int:
    """A count, 0 where there is none."""
    return value if type(value) is int and value >= 0 else 0


def goodput(folder: Path) -> dict[str, Any] | None:
    """The account of all starts; None where none came so far."""
    starts = attempts.read(folder / attempts.FILE)
    return attempts.account(starts) if starts else None
