"""Making a prepared folder: units in, shards out, and what a maker that is killed needs to go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from pydantic import ValidationError

from ssmtrain.config.base import Config
from ssmtrain.config.errors import UserError
from ssmtrain.data import cache
from ssmtrain.data import units as work
from ssmtrain.data.encode import Encoded, How, encode_all
from ssmtrain.data.progress import Progress
from ssmtrain.data.seen import Seen
from ssmtrain.data.shards import Damaged, SplitEntry, SplitWriter, WriterState
from ssmtrain.data.sources import divided, validates
from ssmtrain.data.spans import Entry, Remote, Source, more_problems
from ssmtrain.data.units import Unit

EVERY = 2.0
"""Seconds between two notes of how far it is, each once all before it is on disk."""
NOTE, DIGESTS = "progress.json", "digests.bin"
SHOWN = 3
"""Documents that are left out and named; the rest are counted."""
log = logging.getLogger(__name__)


class Note(Config):
    """How far an interrupted preparation was, all of it on disk."""

    unit_bytes: int
    """Size of a unit when it was made: other units would be numbered otherwise."""
    units: int
    """Units that are done."""
    records: int
    """Records that were divided between train and val."""
    leaving: bool
    """Whether the rest of a long document is left out."""
    digests: int
    """Digests of documents in their file."""
    writers: dict[str, WriterState]
    digests_sha256: str = ""
    """SHA-256 of the digests so far, where duplicates are left out."""
    counts_sha256: str = ""
    """SHA-256 of the counts that belong to it."""
    sha256: str = ""
    """SHA-256 of the note without it: one that is damaged is none."""

    def seal(self) -> str:
        """What its sha256 must be."""
        bare = self.model_copy(update={"sha256": ""})
        return _sha256(bare.model_dump_json().encode())


class Maker:
    """Writes the splits of a source into a folder, going on from the last note there."""

    def __init__(self, source: Source, how: How, eot: int, folder: Path, shard_tokens: int) -> None:
        self.source, self.how, self.folder = source, how, folder
        self.entries, self.split_of = source.entries, source.entry_splits
        self.seen = Seen() if how.digests else None
        note = _read_note(folder)
        try:
            self._open(note, eot, shard_tokens)
        except (Damaged, OSError, ValueError):
            note = None
            self._open(note, eot, shard_tokens)
        self.resumed = note is not None

    def _open(self, note: Note | None, eot: int, cap: int) -> None:
        at = note or Note(unit_bytes=work.UNIT, units=0, records=0, leaving=False, digests=0, writers={})
        self.units, self.records, self.leaving = at.units, at.records, at.leaving
        self.counts = np.zeros((len(self.entries), 2), np.int64)  # documents and bytes of each entry
        if note is not None:
            data = (self.folder / _counts(at.units)).read_bytes()
            if len(data) != self.counts.nbytes or _sha256(data) != at.counts_sha256:
                raise Damaged(_counts(at.units))
            self.counts = np.frombuffer(data, np.int64).reshape(self.counts.shape).copy()
        self.writers = {
            split: SplitWriter(self.folder, split, self.how.dtype, eot, cap, at.writers.get(split))
            for split in self.source.splits
        }
        if self.seen is not None:
            self.digests = (self.folder / DIGESTS).open("r+b" if note else "w+b")
            found = self.digests.read(16 * at.digests)
            self.digests_hash = hashlib.sha256(found)
            if len(found) != 16 * at.digests or (
                found and self.digests_hash.hexdigest() != at.digests_sha256
            ):
                raise Damaged(DIGESTS)
            self.digests.truncate()
            self.seen = Seen()
            self.seen.add(np.frombuffer(found, "V16"))

    def run(self, workers: int) -> dict[str, SplitEntry | None]:
        """Do what is left; returns the manifest's entries, None for a split without tokens."""
        if self.resumed:
            log.info("going on with what an interrupted preparation left in %s", self.folder)
        todo = islice(work.units(self.source), self.units, None)
        bar = Progress(self.source.label, self.entries)
        with bar, ThreadPoolExecutor(1) as pool:
            said, noting = monotonic(), None
            for unit, encoded in encode_all(todo, self.how, workers):
                self._take(unit, encoded)
                self.units += 1
                bar.at(sum(w.bytes for w in self.writers.values()), unit)
                if monotonic() - said > EVERY and (noting is None or noting.done()):
                    noting = self._note(pool, noting)
                    said = monotonic()
        return {split: writer.close() for split, writer in self.writers.items()}

    def _take(self, unit: Unit, encoded: Encoded) -> None:
        """Write what became of a unit."""
        self._bad(unit, encoded)
        whole = unit.opens and unit.closes
        bad = np.zeros(len(encoded.lengths), bool)
        bad[[i for i, _ in encoded.bad]] = True
        to_val = validates(self.source, unit, self.records, len(bad))
        self.records += len(bad) if unit.closes and divided(self.source, unit) else 0
        held = self.split_of[unit.entry]
        beside = "val" if held == "train" else held
        writers = [(self.writers["train"], ~to_val)] if not to_val.all() else []
        writers += [(self.writers[beside], to_val)] if to_val.any() else []
        again = self._again(unit, encoded, bad)
        entry = unit.entry + np.arange(len(bad)) if unit.one_each else np.full(len(bad), unit.entry)
        keep = ~(bad | again)
        np.add.at(self.counts[:, 0], entry[keep & unit.closes], 1)
        np.add.at(self.counts[:, 1], entry[keep], encoded.sizes[keep])
        for writer, mine in writers:
            if not mine.any():
                continue
            writer.bytes += int(encoded.sizes[mine & keep].sum())
            if unit.opens:
                writer.skipped += int((bad & mine).sum())
                writer.duplicates += int((again & mine).sum())
            chosen = keep & mine
            ids = encoded.ids if chosen.all() else encoded.ids[np.repeat(chosen, encoded.lengths)]
            if whole:
                writer.append(ids, encoded.lengths[chosen])
            elif chosen.all():
                # The ids of the last part end with the end of text, which `end_document` writes itself.
                writer.write(ids[: len(ids) - 1] if unit.closes and len(ids) else ids)
                if unit.closes:
                    writer.end_document()

    def _bad(self, unit: Unit, encoded: Encoded) -> None:
        """Name the first documents that are left out, or stop at one; UserError."""
        if not encoded.bad:
            return
        if self.source.skip_bad:
            before = sum(w.skipped for w in self.writers.values())
            for _, why in encoded.bad[: max(0, SHOWN - before) if unit.opens else 0]:
                log.warning("left out: %s", why or f"{_name(self.entries[unit.entry])}: not UTF-8 text")
            return
        at, why = encoded.bad[0]
        after = unit.entry + (at if unit.one_each else 0) + 1
        advice = "take these files out of data.include, convert them to UTF-8 text, or set data.skip_bad=true"
        raise UserError(why, *more_problems(self.entries[after:], limit=3), advice)

    def _again(self, unit: Unit, encoded: Encoded, bad: np.ndarray) -> np.ndarray:
        """Which documents came before, bool (documents,)."""
        again = np.zeros(len(bad), bool)
        if self.seen is None:
            return again
        digests = encoded.digests
        if unit.digest is not None:
            digests = np.frombuffer(unit.digest, "V16")
        if not unit.opens:
            again[:] = self.leaving
        elif digests is not None and (unit.closes or unit.digest is not None):
            # One without text is empty, not a duplicate of another.
            some = ~bad & (encoded.sizes > 0)
            new = self.seen.add(digests[some])
            again[some] = ~new
            data = digests[some][new].tobytes()
            self.digests.write(data)
            self.digests_hash.update(data)
        self.leaving = not unit.closes and bool(again.any())
        return again

    def _note(self, pool: ThreadPoolExecutor, last: Future[None] | None) -> Future[None]:
        """Sync what was written so far while the work goes on, then note it."""
        if last is not None:
            last.result()
        handles = [h for w in self.writers.values() for h in w.handles()]
        if self.seen is not None:
            self.digests.flush()
            handles.append(os.dup(self.digests.fileno()))
        note = Note(
            unit_bytes=work.UNIT,
            units=self.units,
            records=self.records,
            leaving=self.leaving,
            digests=len(self.seen) if self.seen is not None else 0,
            digests_sha256=self.digests_hash.hexdigest() if self.seen is not None else "",
            counts_sha256=_sha256(self.counts.tobytes()),
            writers={split: writer.state() for split, writer in self.writers.items()},
        )
        return pool.submit(self._sync, handles, note, self.counts.copy())

    def _sync(self, handles: list[int], note: Note, counts: np.ndarray) -> None:
        for handle in handles:
            os.fsync(handle)
            os.close(handle)
        with (self.folder / _counts(note.units)).open("wb") as file:
            file.write(counts.tobytes())
            file.flush()
            os.fsync(file.fileno())
        sealed = note.model_copy(update={"sha256": note.seal()})
        cache.write_file(self.folder / f"{NOTE}.new", sealed.model_dump_json().encode())
        (self.folder / f"{NOTE}.new").replace(self.folder / NOTE)
        cache.sync_folder(self.folder)
        for old in self.folder.glob(_counts("*")):
            if old.name != _counts(note.units):
                old.unlink()


def source_list(maker: Maker) -> Iterator[dict[str, Any]]:
    """What every entry of the source gave, a mapping each: the manifest's list of sources."""
    for i, (entry, (documents, size)) in enumerate(zip(maker.entries, maker.counts.tolist(), strict=True)):
        on_disk = None if isinstance(entry, Remote) else entry.file.size
        split = maker.split_of[i]
        yield {"path": _name(entry), "split": split, "size": on_disk, "documents": documents, "bytes": size}


def _name(entry: Entry) -> str:
    return f"{entry.path} {entry.split}" if isinstance(entry, Remote) else str(entry.file.path)


def clear(folder: Path) -> None:
    """Remove what only an interrupted preparation needs."""
    for path in (folder / NOTE, folder / f"{NOTE}.new", folder / DIGESTS, *folder.glob(_counts("*"))):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _counts(units: int | str) -> str:
    """The counts that belong to a note have its number, so that a kill between the two does not part them."""
    return f"counts-{units}.bin"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_note(folder: Path) -> Note | None:
    try:
        note = Note.model_validate(json.loads((folder / NOTE).read_bytes()))
    except (OSError, ValueError, ValidationError, RecursionError):
        return None
    return note if note.unit_bytes == work.UNIT and note.sha256 == note.seal() else None
