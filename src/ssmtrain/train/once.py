"""What one process does for all that share a folder, while the others wait for it.

They wait on a lock, not on a collective: there may be no process group yet, whose own clock would run, and a
process that dies gives its lock back, so that the next one does the work.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def once(record: Path, work: Callable[[], dict[str, Any]], waiting: Callable[[], None], lead: bool) -> None:
    """Do some work unless its record, a JSON file, says that it is done; wait where another is at it.

    `work` returns what is written there; what it raises is written too, under "error", and ends the turn of
    those who waited, so that not each of them fails in the same way: a later start tries again. `waiting` is
    called before a wait. Where files cannot be locked, the process that is `lead` works, and nobody waits.
    """
    if _done(record):
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(record.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        waited = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            waited = True
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if not lead:
                return
        if not _done(record, failed_too=waited):
            _do(record, work)
    finally:
        os.close(descriptor)  # which gives the lock back


def _do(record: Path, work: Callable[[], dict[str, Any]]) -> None:
    found: dict[str, Any] = {}
    try:
        found = work()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        raise
    finally:
        if found:  # else it was told to stop, and the next one begins anew
            other = record.with_suffix(f".{os.getpid()}")
            other.write_text(json.dumps(found) + "\n")
            other.replace(record)


def _done(record: Path, failed_too: bool = False) -> bool:
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and (failed_too or "error" not in found)
