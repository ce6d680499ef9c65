"""Checkpoints on disk: written aside, made durable, published by one rename, found again by their manifest.

A checkpoint is a folder `step-00000100` of safetensors shards, `state.json`, and `manifest.json`, which
lists every file with its size and sha256 and is written last. There is no pickle anywhere. A kind of tensors
is one file, or several that are written side by side, by threads (cut.py) and by processes (joint.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmtrain.checkpoint import faults
from ssmtrain.checkpoint.cut import side_by_side, write
from ssmtrain.checkpoint.durable import Written, json_bytes, make_folder, sync_folder, write_file
from ssmtrain.checkpoint.names import checkpoints, step_name, step_of
from ssmtrain.checkpoint.names import is_name as is_name
from ssmtrain.checkpoint.parts import Part, read_parts
from ssmtrain.checkpoint.shard import read_shard
from ssmtrain.config.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"

_TEMPORARY = re.compile(r"step-[0-9]{8}\.tmp-[0-9a-f]{32}")
_STEM = re.compile(r"[a-z][a-z0-9_]{0,63}")
_FILE = re.compile(r"[a-z][a-z0-9_]{0,63}\.(safetensors|json)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_JSON_LIMIT = 64 * 2**20


class SaveFailed(Exception):
    """A checkpoint could not be written (disk full, I/O error); what was there before is untouched."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"could not save {path}: {error.strerror or error}")
        self.path = path


class Damaged(UserError):
    """A checkpoint is not what its manifest says; `problems` has one line per file."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        super().__init__(
            f"{path} is damaged:", *problems[:3], "use another one: resume=auto takes the newest good"
        )
        self.path = path
        self.problems = problems


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Publish `folder/step-<8 digits>`, durable on return, from {stem: {name: tensor}} and a JSON state.

    A good checkpoint of that step is kept as it is (the same run gives the same state); a damaged one is
    replaced. Raises SaveFailed when the system refuses (nothing half-written stays), TypeError or
    ValueError for what cannot be stored.
    """
    final = folder / step_name(step)
    for stem in tensors:
        if not _STEM.fullmatch(stem):
            raise ValueError(f"{stem!r} is not a shard's name")
    state_text = json_bytes(dict(state))
    token = begin(folder, step)
    if token is not None:
        with publishing(folder, step, token) as temporary:
            _write(temporary, step, tensors, state_text)
    return final


def begin(folder: Path, step: int) -> str | None:
    """Make the temporary folder and return its token; None where there is a good checkpoint of the step.

    SaveFailed when the system refuses.
    """
    final = folder / step_name(step)
    try:
        if final.exists() and not verify(final):
            return None
        make_folder(folder)
        token = uuid.uuid4().hex
        os.mkdir(temporary_of(folder, step, token), 0o700)
        return token
    except OSError as error:
        raise SaveFailed(final, error) from error


def temporary_of(folder: Path, step: int, token: str) -> Path:
    """The folder that `begin` has made."""
    return folder / f"{step_name(step)}.tmp-{token}"


@contextlib.contextmanager
def publishing(folder: Path, step: int, token: str) -> Iterator[Path]:
    """The temporary folder, to be filled up to its manifest; published, durable, at the end of the body.

    SaveFailed when the system refuses; nothing half-written stays.
    """
    final, temporary = folder / step_name(step), temporary_of(folder, step, token)
    try:
        with writing(temporary) as descriptor:
            yield temporary
            os.fsync(descriptor)
            faults.point("before_rename")
            _publish(temporary, final)
        faults.point("after_rename")
        sync_folder(folder)
    except OSError as error:
        raise SaveFailed(final, error) from error
    finally:
        _discard(temporary)


def verify(path: Path, hashes: bool = True) -> list[str]:
    """What is wrong with the checkpoint, a line per file; empty: good. `hashes=False` compares sizes only."""
    try:
        files = _manifest(path)
    except (OSError, ValueError) as error:
        return [_reason(MANIFEST, error)]
    sizes = {name: entry["size"] if hashes else 0 for name, entry in files.items()}
    found = side_by_side(lambda name: _check_file(path / name, files[name], hashes), sizes)
    return [problem for problem in found.values() if problem]


def extras(path: Path) -> list[str]:
    """Names in the checkpoint's folder that its manifest does not list; they are never read."""
    try:
        known = {*_manifest(path), MANIFEST}
    except (OSError, ValueError):
        known = {MANIFEST}
    return sorted(entry.name for entry in os.scandir(path) if entry.name not in known)


def newest_good(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose manifest verifies; what was passed over goes to `report`, line by line."""
    for path in reversed(checkpoints(folder)):
        problems = verify(path)
        for problem in problems:
            report(f"{path.name} is damaged: {problem}")
        if not problems:
            for name in extras(path):
                report(f"{path.name}: {name} is not in its manifest and is ignored")
            return path
    return None


def load_tensors(path: Path, stem: str) -> dict[str, Tensor]:
    """The whole tensors of one kind ("model", "optim" …), on the CPU, of one file or of several parts.

    Damaged if they are missing or not safetensors. Verify first.
    """
    name = f"{stem}.safetensors"
    try:
        listed = _manifest(path)
        if name in listed:
            return read_shard(path / name)
        parts = sorted(
            one for one in listed if re.fullmatch(rf"{stem}(_[0-9]{{5}}){{1,2}}\.safetensors", one)
        )
        if not parts:
            raise ValueError(f"the manifest lists no {name}")
        return read_parts(path / one for one in parts)
    except (OSError, ValueError) as error:
        raise Damaged(path, [_reason(name, error)]) from error


def load_state(path: Path) -> dict[str, Any]:
    """The JSON state; Damaged if it cannot be read. Verify first."""
    try:
        return _read_json(path / STATE)
    except (OSError, ValueError) as error:
        raise Damaged(path, [_reason(STATE, error)]) from error


def prune(folder: Path, keep: int, spare: Callable[[int], bool] = lambda step: False) -> list[Path]:
    """Delete all but the `keep` newest good checkpoints, and those of steps to `spare`; return what went.

    The newest one is read back and verified first; when it is not good, the newest good one is found and
    kept whatever its age. A deletion is a rename, so no half-deleted checkpoint has a checkpoint's name.
    """
    if keep < 1:
        raise ValueError("keep at least one checkpoint")
    found = checkpoints(folder)
    if len(found) <= keep:
        return []
    faults.point("before_prune")
    last_good = next((path for path in reversed(found) if not verify(path)), None)
    if last_good is None:
        return []
    older = [path for path in reversed(found) if path < last_good]
    sound = [path for path in older if not verify(path, hashes=False)][: keep - 1]
    doomed = [path for path in reversed(older) if path not in sound and not spare(step_of(path))]
    return [path for path in doomed if _delete(path)]


def clean(folder: Path) -> list[Path]:
    """Remove the temporary folders whose writer is dead (it held a lock on the folder) and return them."""
    removed = []
    for path in sorted(folder.glob("step-*.tmp-*")):
        if not _TEMPORARY.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(OSError), writing(path):
            shutil.rmtree(path)
            removed.append(path)
    return removed


def _write(
    temporary: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state_text: bytes
) -> None:
    """Shards, state, manifest, each durable before the next."""
    faults.point("before_tensors")
    kinds = {stem: {name: Part(one) for name, one in named.items()} for stem, named in tensors.items()}
    written = write(temporary, kinds)
    faults.point("after_tensors")
    written[STATE] = write_file(temporary / STATE, [state_text])
    write_manifest(temporary, step, written)


def write_manifest(temporary: Path, step: int, written: Mapping[str, Written]) -> None:
    """Write the manifest, the last file of a checkpoint."""
    faults.point("before_manifest")
    files = {name: {"size": done.size, "sha256": done.sha256} for name, done in written.items()}
    write_file(temporary / MANIFEST, [json_bytes({"format": FORMAT, "step": step, "files": files})])
    faults.point("after_manifest")


def _discard(temporary: Path) -> None:
    """Delete the folder, if it is still there; others may be writing, and must not find it."""
    aside = temporary.with_name(f"{temporary.name.partition('.')[0]}.tmp-{uuid.uuid4().hex}")
    try:
        os.replace(temporary, aside)
    except OSError:
        aside = temporary
    shutil.rmtree(aside, ignore_errors=True)


def _publish(temporary: Path, final: Path) -> None:
    """One rename; a damaged folder in the way is moved aside first."""
    if final.exists():
        _delete(final)
    os.replace(temporary, final)


def _delete(path: Path) -> bool:
    """Take the name away in one rename, then the files; what a crash leaves is a dead writer's folder."""
    aside = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        os.replace(path, aside)
        if aside.is_symlink():  # asked of the name that no one else knows; what it points to stays
            aside.unlink()
            return True
        sync_folder(path.parent)
        for name in sorted(os.listdir(aside)):
            os.unlink(aside / name)
            faults.point("mid_prune")
        os.rmdir(aside)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        return not path.exists()
    return True


@contextlib.contextmanager
def writing(temporary: Path) -> Iterator[int]:
    """Hold the folder's lock, which says that its writer lives; OSError if another process holds it."""
    descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # A file system without locks: the lock of the run is then the only guard.
        yield descriptor
    finally:
        os.close(descriptor)


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """The manifest's files, after checking everything about it that does not need the files themselves."""
    named = step_of(path)
    manifest = _read_json(path / MANIFEST)
    version, step, files = (manifest.get(key) for key in ("format", "step", "files"))
    if version != FORMAT:
        newer = "; pip install -U ssmtrain" if type(version) is int and version > FORMAT else ""
        raise ValueError(f"format {str(version)[:40]} is not one this version reads ({FORMAT}){newer}")
    if step != named or isinstance(step, bool):
        raise ValueError(f"it is of step {str(step)[:40]}, but the folder is {path.name}")
    if not isinstance(files, dict) or STATE not in files:
        raise ValueError(f"it does not list {STATE}")
    for name, entry in files.items():
        if not _FILE.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"{name[:80]!r} is not a file name of a checkpoint")
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ValueError(f"{name} has no size or sha256")
    return files


def _check_file(path: Path, entry: dict[str, Any], hashes: bool) -> str | None:
    try:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["size"]:
                return f"{path.name} has {size:,} bytes, the manifest says {entry['size']:,}"
            if hashes and (found := hashlib.file_digest(file, "sha256").hexdigest()) != entry["sha256"]:
                return f"{path.name} has sha256 {found[:12]}…, the manifest says {entry['sha256'][:12]}…"
    except OSError as error:
        return _reason(path.name, error)
    return None


def _open(path: Path) -> BufferedReader:
    """A regular file, never through a link and never waiting on a pipe or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return open(descriptor, "rb")


def _read_json(path: Path) -> dict[str, Any]:
    with _open(path) as file:
        text = file.read(_JSON_LIMIT + 1)
    if len(text) > _JSON_LIMIT:
        raise ValueError("it is too large")
    if not text.endswith(b"\n"):
        raise ValueError("its end is missing")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    return data


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{name} is missing"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{name} cannot be used: {said}"
