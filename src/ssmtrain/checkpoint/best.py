"""Which checkpoint of a run has the lowest validation loss: a link beside the checkpoints' folder.

Nothing is remembered for it: it follows from the validation records in metrics.jsonl and the checkpoints
that are there, so a run that was killed, cut back or copied finds it again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import uuid
from pathlib import Path
from typing import Any

from ssmtrain.checkpoint import names
from ssmtrain.checkpoint.durable import sync_folder
from ssmtrain.config.reference import BEST

KINDS = ("val", BEST)
"""Records with a validation loss: of a step, and, where the last one is of more text, of the same text."""


class Best:
    """Takes records as a sink and keeps `<run>/best` on the checkpoint with the lowest validation loss."""

    def __init__(self, folder: Path, checkpoints: Path, metrics: Path) -> None:
        self.folder, self.checkpoints = folder, checkpoints
        self.losses: dict[int, dict[int, float]] = {}
        """By number of labels, loss by step: losses over different texts cannot be compared."""
        self.labels = 0
        """Labels of the latest record."""
        self.latest = -1
        self.lock = threading.RLock()
        """A thread that saves asks while the run validates."""
        with contextlib.suppress(OSError):
            for line in metrics.read_bytes().splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    self._note(json.loads(line))

    @property
    def step(self) -> int | None:
        """The step of the best checkpoint that is there."""
        with self.lock:
            losses = self.losses.get(self.labels, {})
            for step in [s for s in losses if not self._path(s).is_dir() and s != self.latest]:
                del losses[step]
            there = [step for step in losses if self._path(step).is_dir()]
            return min(there, key=lambda step: (losses[step], step), default=None)

    def write(self, record: dict[str, Any]) -> None:
        """Take a record; one of a step that is saved already may move the link."""
        with self.lock:
            if self._note(record):
                self.link()

    def close(self) -> None:
        """Nothing is open."""

    def link(self) -> None:
        """Point `<run>/best` at the best checkpoint, in one rename; OSError when the disk refuses."""
        with self.lock:
            self._link()

    def _link(self) -> None:
        step, link = self.step, self.folder / BEST
        if step is None:
            if link.is_symlink():
                link.unlink()
            return
        target = os.path.join(self.checkpoints.name, names.step_name(step))
        if link.is_symlink() and os.readlink(link) == target:
            return
        temporary = self.folder / f".{BEST}.{uuid.uuid4().hex}"
        os.symlink(target, temporary)
        try:
            os.replace(temporary, link)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)

    def _note(self, record: Any) -> bool:
        if not isinstance(record, dict) or record.get("kind") not in KINDS:
            return False
        step, loss, labels = (record.get(key) for key in ("step", "loss", "labels"))
        if type(step) is not int or type(labels) is not int:
            return False
        if not isinstance(loss, float) or not math.isfinite(loss):
            return False
        self.losses.setdefault(labels, {})[step] = loss
        self.labels, self.latest = labels, step
        return True

    def _path(self, step: int) -> Path:
        return self.checkpoints / names.step_name(step)


def linked(folder: Path) -> Path | None:
    """The checkpoint that a run's link names; None when there is no link or it leads nowhere.

    Only the name is taken from the link: it never leads out of the run's own checkpoints.
    """
    try:
        name = os.path.basename(os.readlink(folder / BEST))
    except OSError:
        return None
    path = folder / "checkpoints" / name
    return path if names.is_name(name) and path.is_dir() else None
