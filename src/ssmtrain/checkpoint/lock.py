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
    succeeded: dict[str, Any] = {}
    for _ in range(100):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            locked = _flock(descriptor)
            owner = _read(descriptor)
            if locked is not True and not (owner and _is_dead(owner)):
                # Without a verdict of the file system (None) an empty record is a free lock.
                if locked is False or owner:
                    raise Held(_describe(owner))
            elif locked is False:
                # Its owner is dead, but a process forked by it keeps the file open: start a new file.
                succeeded = owner
                _discard(path, descriptor)
                os.close(descriptor)
                continue
            if not _is_at(path, descriptor):
                os.close(descriptor)
                continue
            _write(descriptor)
            owner = owner or succeeded
            return Lock(path, descriptor, _describe(owner) if owner else None)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
    raise Held("a process that keeps replacing the lock")


def _flock(descriptor: int) -> bool | None:
    """True: ours. False: someone holds it. None: this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise


def _discard(path: Path, descriptor: int) -> None:
    """Unlink the file we looked at, and only that one: the folder's lock keeps two takers apart."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if _is_at(path, descriptor):
            path.unlink()
    finally:
        os.close(folder)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the path still names the file we locked (another may have replaced it meanwhile)."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


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
    except ValueError:
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
