"""Files and folders that are still there, and whole, after a power cut: write, fsync, rename, fsync."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ssmtrain.digest import Digest

PIECE = 16 * 2**20
"""Bytes handed to the system at once."""


@dataclass(frozen=True)
class Written:
    """What was handed to the disk: bytes and their sha256 (hex)."""

    size: int
    sha256: str


def write_file(
    path: Path, pieces: Iterable[memoryview | bytes], progress: Callable[[int], None] = lambda written: None
) -> Written:
    """Create `path` (0600, must not exist) from `pieces` and fsync it; `progress` gets the bytes so far."""
    digest = Digest()
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for whole in pieces:
            rest = memoryview(whole).cast("B")
            while len(rest):
                done = os.write(descriptor, rest[:PIECE])
                digest.update(rest[:done])
                size += done
                rest = rest[done:]
                progress(size)
        os.fsync(descriptor)
        return Written(size, digest.hexdigest())
    finally:
        digest.close()
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make the names inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create `path` (0700) and what is missing above it, each name durable in its parent."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not path.is_dir():
            raise
    sync_folder(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash, sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write_file(temporary, [content])
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append_file(path: Path) -> TextIO:
    """Open a text file to append to (0600 when it is made); OSError for a link, whose target is not ours."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, 0o600), "a", encoding="utf-8")


def json_bytes(data: Any) -> bytes:
    """`data` as JSON text with a final newline; TypeError for what JSON cannot hold."""
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
