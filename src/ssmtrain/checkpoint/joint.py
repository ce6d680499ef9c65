"""A checkpoint that several processes write together, each its own files, published by the first of them.

The processes meet in the temporary folder, not through messages, so that any thread of theirs may write: each
leaves a note of what it has written, or of why it could not. The first one, which has begun with store.begin
and given its token to the others, waits for the notes, writes state and manifest, and renames. All must see
the same file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssmtrain.checkpoint import faults
from ssmtrain.checkpoint.cut import write
from ssmtrain.checkpoint.durable import Written, json_bytes, write_file
from ssmtrain.checkpoint.parts import Part
from ssmtrain.checkpoint.store import STATE, SaveFailed, publishing, step_name, temporary_of, write_manifest

PATIENCE = 1800.0
"""Seconds that the first process waits for the others' notes, and they for the folder."""
PAUSE = 0.02

Shares = Mapping[str, Mapping[str, Part]]
"""One process's parts: kind of tensors ("model", "optim" …) -> name -> part."""


def follow(
    folder: Path, step: int, token: str, rank: int, shares: Shares, patience: float = PATIENCE
) -> None:
    """Write the files of a process other than the first; SaveFailed when the system refuses.

    That it returns says nothing of the others, nor that the checkpoint was published.
    """
    temporary = temporary_of(folder, step, token)
    limit = time.monotonic() + patience
    while not temporary.is_dir() and time.monotonic() < limit:
        time.sleep(PAUSE)  # a network's file system may show it late
    try:
        written = _write_shares(temporary, rank, shares)
        files = {name: [done.size, done.sha256] for name, done in written.items()}
        _leave(temporary, rank, {"files": files})
    except OSError as error:
        with contextlib.suppress(OSError):
            _leave(temporary, rank, {"error": error.strerror or str(error)})
        raise SaveFailed(folder / step_name(step), error) from error


def lead(
    folder: Path,
    step: int,
    token: str,
    world: int,
    shares: Shares,
    state: Mapping[str, Any],
    patience: float = PATIENCE,
) -> Path:
    """Write the first process's files, wait for the others', and publish; durable on return.

    SaveFailed when the system refuses one of them, or one leaves no note for `patience` seconds; nothing
    half-written stays then.
    """
    with publishing(folder, step, token) as temporary:
        state_text = json_bytes(dict(state))
        faults.point("before_tensors")
        written = _write_shares(temporary, 0, shares)
        for rank in range(1, world):
            written |= _wait_for(temporary, rank, patience)
        faults.point("after_tensors")
        written[STATE] = write_file(temporary / STATE, [state_text])
        write_manifest(temporary, step, written)
    return folder / step_name(step)


def _write_shares(temporary: Path, rank: int, shares: Shares) -> dict[str, Written]:
    return write(temporary, {f"{kind}_{rank:05d}": parts for kind, parts in shares.items() if parts})


def _note(temporary: Path, rank: int) -> Path:
    return temporary / f"note_{rank:05d}.json"


def _leave(temporary: Path, rank: int, note: dict[str, Any]) -> None:
    """Leave a note, which is there whole or not at all."""
    path = _note(temporary, rank)
    draft = path.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    write_file(draft, [json_bytes(note)])
    os.replace(draft, path)


def _wait_for(temporary: Path, rank: int, patience: float) -> dict[str, Written]:
    """What another process has written, from its note, which is taken away."""
    path, limit = _note(temporary, rank), time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > limit:
            raise TimeoutError(None, f"rank {rank} has not written its part for {patience:.0f} s")
        time.sleep(PAUSE)
    note = json.loads(path.read_bytes())
    if "error" in note:
        raise OSError(None, f"rank {rank}: {note['error']}")
    path.unlink()
    return {name: Written(size, sha256) for name, (size, sha256) in note["files"].items()}
