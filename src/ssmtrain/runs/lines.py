"""metrics.jsonl read as it stands: from its end, from its beginning, and while it grows.

A line that is cut short, or is no record, is passed over: a run may have died while it wrote.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import deque
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

Record = dict[str, Any]

BLOCK = 2**16
FURTHEST = 2**22
"""Bytes from the end within which the latest records are looked for."""


def parse(line: bytes) -> Record | None:
    """The record in a line; None where there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def records(path: Path) -> Iterator[Record]:
    """Every record of a file, in order, one in memory at a time; nothing where there is no file."""
    try:
        with path.open("rb") as file:
            for line in file:
                record = parse(line)
                if record is not None:
                    yield record
    except OSError:
        return


def backwards(path: Path) -> Iterator[Record]:
    """The records from the last one back, as far as FURTHEST."""
    try:
        with path.open("rb") as file:
            at = file.seek(0, os.SEEK_END)
            last, rest = max(0, at - FURTHEST), b""
            while at > last:
                begin = max(last, at - BLOCK)
                file.seek(begin)
                first, *lines = (file.read(at - begin) + rest).split(b"\n")
                for line in reversed(lines):
                    if (record := parse(line)) is not None:
                        yield record
                at, rest = begin, first
            if not last and (record := parse(rest)) is not None:
                yield record
    except OSError:
        return


def latest(path: Path, *kinds: str) -> dict[str, Record]:
    """The last record of each kind."""
    found: dict[str, Record] = {}
    for record in backwards(path):
        found.setdefault(str(record.get("kind")), record)
        if all(kind in found for kind in kinds):
            break
    return {kind: found[kind] for kind in kinds if kind in found}


class Follower:
    """Reads what is added to a file; a resumed run replaces it by the part of it that was kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BufferedReader | None = None
        self.rest = b""
        self.known = array("q")
        """Hashes of the lines that were handed out or passed over."""
        self.at = 0
        """How many of the known lines the open file was found to begin with."""

    def read(self, last: int | None = None) -> list[Record]:
        """The records that have come since the last call, or the last so many of them."""
        lines: deque[bytes] = deque(maxlen=last)
        try:
            self._open()
            assert self.file is not None
            while block := self.file.read(2**20):
                *whole, self.rest = (self.rest + block).split(b"\n")
                lines.extend(line for line in whole if self._is_new(line))
        except OSError:
            self.close()
        return [record for line in lines if (record := parse(line)) is not None]

    def _open(self) -> None:
        """Open the file, again where it is another one or shorter than what was read of it."""
        now = os.stat(self.path)
        if self.file is not None:
            mine = os.fstat(self.file.fileno())
            if (mine.st_ino, mine.st_dev) != (now.st_ino, now.st_dev) or now.st_size < self.file.tell():
                self.close()
        if self.file is None:
            self.file, self.rest, self.at = self.path.open("rb"), b"", 0

    def _is_new(self, line: bytes) -> bool:
        if self.at < len(self.known):
            if self.known[self.at] == hash(line):
                self.at += 1
                return False
            # The steps behind the kept ones are done again: no two have the same times.
            del self.known[self.at :]
        self.known.append(hash(line))
        self.at += 1
        return True

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()
            self.file = None
