"""One process at a time in a run folder: a lock that names its owner and does not outlive it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class Held(Exception):
    """Another living process holds the lock; the text says which."""


@dataclass
class Lock:
    """A held lock; `taken_over` describes the dead owner whose place was taken, if any."""

    path: Path
    descriptor: int
    taken_over: str | None = None

    def release(self) -> None:
        """Give the lock back; the file stays, empty."""
        if self.descriptor >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, 0)
            os.close(self.descriptor)
            self.descriptor = -1


def acquire(path: Path) -> Lock:
    """Take the lock in the file `path`, or raise Held naming the host, process and start of its owner."""
    # Whoever looks at the lock or changes it holds its folder's lock for that moment, so that no one sees
    # the record of a dead owner in a file that a living one has just locked.
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _flock(folder, wait=True)
        descriptor, owner = _open(path)
        locked = _flock(descriptor)
        if locked is False and _is_dead(owner):
            # A process that the dead owner forked still holds the old file: start a new one.
            os.close(descriptor)
            path.unlink()
            descriptor, _ = _open(path)
            locked = _flock(descriptor)
        if locked is False or (locked is None and owner and not _is_dead(owner)):
            os.close(descriptor)
            raise Held(_describe(owner))
        _write(descriptor)
        return Lock(path, descriptor, _describe(owner) if owner else None)
    finally:
        os.close(folder)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, or died while it did."""

    lives: bool
    text: str
    """Process, host and since when."""


def look(path: Path) -> Owner | None:
    """The owner of the lock in the file `path`; None where it was given back or there is none.

    Nothing is taken and nothing changed. On a file system without locks an owner on another host counts as
    living.
    """
    with contextlib.ExitStack() as opened:
        try:
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, folder)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            opened.callback(os.close, descriptor)
            # A start holds the folder's lock while it takes its own: looking must not make it fail.
            with contextlib.suppress(OSError):
                _flock(folder, wait=True)
            owner = _read(descriptor)
            if owner and _is_dead(owner):
                return Owner(False, _describe(owner))
            free = _is_free(descriptor)
        except OSError:
            return None
        lives = free is False or (free is None and bool(owner))
        return Owner(lives, _describe(owner)) if owner or lives else None


def _is_free(descriptor: int) -> bool | None:
    """Whether nobody holds the lock; None: this file system does not say."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _open(path: Path) -> tuple[int, dict[str, Any]]:
    """The lock's file, made where it is absent, and the record in it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    return descriptor, _read(descriptor)


def _flock(descriptor: int, wait: bool = False) -> bool | None:
    """True: ours. False: someone holds it. None: this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise


def _write(descriptor: int) -> None:
    owner = {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(owner) + "\n").encode(), 0)
    os.fsync(descriptor)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Proof that the owner is gone: same host, and rebooted since, or no such process, or a younger one."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or type(pid) is not int or pid <= 0:
        return False
    if owner.get("boot") != _boot():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return owner.get("started") != _started(pid)


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"


def _boot() -> str | None:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _started(pid: int) -> int | None:
    """Clock ticks after boot at which the process started; None where /proc is not, -1 for a zombie."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # The second field, the command, may hold spaces and parentheses: count after its last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return -1 if fields[0] == "Z" else int(fields[19])
    return None
