"""The folder of prepared data: where it is, one maker at a time, published whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from ssmtrain.config.errors import UserError

log = logging.getLogger(__name__)


def roots(explicit: str | None) -> list[Path]:
    """Folders to look in, best first: `data.cache_dir` alone, or the user's cache and a temporary one."""
    if explicit is not None:
        return [Path(explicit).expanduser().absolute()]
    out = []
    xdg = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # no home
        out.append(Path(xdg) if xdg and os.path.isabs(xdg) else Path.home() / ".cache")
    out = [root / "ssmtrain" for root in out]
    spare = Path(tempfile.gettempdir()) / f"ssmtrain-{os.getuid()}"
    return [*out, spare] if _ours(spare) else out


def _ours(folder: Path) -> bool:
    """Whether a folder in a shared place is absent, or a real one of this user: nobody else's is trusted."""
    try:
        info = folder.lstat()
    except OSError:
        return True
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid()


def writable(candidates: list[Path], explicit: bool) -> Path:
    """The first folder that can be made and written; UserError naming `data.cache_dir` when none can."""
    problems = []
    for i, root in enumerate(candidates):
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            probe = root / f".probe-{uuid.uuid4().hex[:8]}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            problems.append(f"{root}: {error.strerror}")
            continue
        if i:
            log.warning("%s; prepared data goes to %s", problems[0], root)
        return root
    said = "data.cache_dir: cannot write " if explicit else "no folder for prepared data: cannot write "
    raise UserError(said + "; ".join(problems), "set data.cache_dir=<a folder you can write to>")


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Hold the lock file and yield True; False where there are no locks, and publishing settles the race."""
    with path.open("w") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process prepares this data; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("no file locks in %s (%s)", path.parent, error.strerror)
            held = False
        yield held


def sweep(root: Path, name: str) -> None:
    """Remove what dead makers of this folder left; call with the lock held."""
    for left in root.glob(f"{name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def publish(temporary: Path, folder: Path, whole: Callable[[Path], bool]) -> None:
    """Rename a folder into place, durably; a half-made one gives way, a `whole` one (a lost race) stays."""
    sync_folder(temporary)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        if whole(folder):
            return
        aside = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        folder.rename(aside)
        temporary.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def passed(folder: Path) -> bool:
    """Whether the folder's files are those that last passed verification: same sizes and times."""
    try:
        return json.loads((folder / "verified.json").read_bytes()) == _times(folder)
    except (OSError, ValueError, RecursionError):
        return False


def mark_passed(folder: Path) -> None:
    """Note that the folder passed verification; where it cannot be noted, it is verified again next time."""
    temporary = folder / f".verified-{uuid.uuid4().hex[:8]}"
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(_times(folder)))
        temporary.replace(folder / "verified.json")


def _times(folder: Path) -> dict[str, list[int]]:
    names = sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".jsonl") or p.name == "manifest.json")
    return {p.name: [(s := p.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns] for p in names}
