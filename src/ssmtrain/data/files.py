"""The user's own text files: found by path, glob or directory, and divided into train and val."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import logging
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ssmtrain.config.errors import UserError
from ssmtrain.data.spans import LINE, PIECE, SPACE, Source, Span, TextFile

if TYPE_CHECKING:
    from ssmtrain.config.data import TextData

log = logging.getLogger(__name__)


def text_source(data: TextData) -> Source:
    """The files that `data.train` and `data.val` name; UserError names the key and what is wrong with it."""
    train = find(data.train, data.include, "data.train")
    splits = {"train": [Span(f, 0, f.size) for f in train]}
    if data.val is None:
        splits["train"], splits["val"] = hold_out(splits["train"], data.val_fraction)
    else:
        assert not isinstance(data.val, dict), "open_source asks for the sets one by one"
        val = find(data.val, data.include, "data.val")
        splits["val"] = [Span(f, 0, f.size) for f in val]
        both = sorted({f.path for f in train} & {f.path for f in val})
        if both:
            log.warning("data.val: %d files are also in data.train, such as %s", len(both), both[0])
    spans = [
        [name, str(s.file.path), s.file.size, *s.file.changed, s.start, s.stop]
        for name, split in splits.items()
        for s in split
        if isinstance(s.file, TextFile)
    ]
    label = "".join(c if c.isalnum() else "_" for c in _first(data.train))[:40] or "text"
    return Source(label, splits, {"kind": "text", "spans": spans})


def find(entries: str | list[str], include: list[str], key: str) -> list[TextFile]:
    """Text files of paths, globs and directories: entries in the order given, each in sorted path order."""
    entries = [entries] if isinstance(entries, str) else entries
    found: dict[tuple[int, int], TextFile] = {}  # by device and inode: the same file counts once
    for entry in entries:
        for path in _paths(entry, include, key):
            inode, file = _stat(path, key)
            found.setdefault(inode, file)
    if not found:
        raise UserError(f"{key}: no files given")
    if not any(f.size for f in found.values()):
        names = next(iter(found.values())).path if len(found) == 1 else f"all {len(found)} files"
        raise UserError(f"{key}: {names}: empty, no text to read")
    for file in found.values():
        if file.path.suffix in (".jsonl", ".json"):
            log.warning("%s: %s is read as plain text, braces and all", key, file.path)
            break
    return list(found.values())


def hold_out(spans: list[Span], fraction: float) -> tuple[list[Span], list[Span]]:
    """Divide documents so that the last `fraction` of the bytes validates.

    The cut falls between two documents where that misses the mark by at most a quarter of the validation
    text; otherwise after a line's end inside the document that holds the mark, which becomes two.
    """
    spans = [s for s in spans if s.stop > s.start]
    ends = [0]
    for span in spans:
        ends.append(ends[-1] + span.stop - span.start)
    mark = round(ends[-1] * (1 - fraction))
    near = min(range(len(ends)), key=lambda i: abs(ends[i] - mark))
    if 0 < near < len(spans) and abs(ends[near] - mark) <= 0.25 * fraction * ends[-1]:
        return spans[:near], spans[near:]
    at = next(i for i in range(len(spans)) if ends[i + 1] >= mark)
    span = spans[at]
    cut = _cut_after(span, span.start + mark - ends[at])
    head, tail = span._replace(stop=cut), span._replace(start=cut)
    train = spans[:at] + [s for s in (head,) if s.stop > s.start]
    val = [s for s in (tail,) if s.stop > s.start] + spans[at + 1 :]
    if not train or not val:
        raise UserError(
            "data.val: the text is too short to hold some of it out",
            "give data.val a file of its own, or more text",
        )
    return train, val


def _cut_after(span: Span, mark: int) -> int:
    """The first line's end, else space, else character at or after `mark` in a span."""
    with span.file.open() as file:
        file.seek(mark)
        text = file.read(min(PIECE, span.stop - mark))
    for pattern in (LINE, SPACE):
        match = pattern.search(text)
        if match:
            return mark + match.end()
    skip = 0
    while skip < len(text) and text[skip] & 0xC0 == 0x80:
        skip += 1
    return mark + skip


def _paths(entry: str, include: list[str], key: str) -> list[Path]:
    path = Path(entry).expanduser()
    try:
        if path.is_dir():
            inside = _walk(path, include)
            if not inside:
                raise UserError(f"{key}: no file in {entry} matches data.include={include}")
            return inside
        if path.exists():
            return [path]
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: cannot read {entry}: {getattr(error, 'strerror', error)}") from None
    if glob.has_magic(entry):
        matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if matches:
            return matches
        raise UserError(f"{key}: no file matches {entry}")
    raise UserError(f"{key}: {entry} does not exist", *_nearest(path))


def _walk(folder: Path, include: list[str]) -> list[Path]:
    """Regular files below a folder that match a glob, in path order; hidden ones and links to folders not."""
    wanted = [pattern.split("/") for pattern in include]
    found: list[list[str]] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f[0] != "."]
        below = [] if Path(root) == folder else os.path.relpath(root, folder).split("/")
        names = [[*below, f] for f in files if f[0] != "."]
        found += [n for n in names if any(_matches(n, globs) for globs in wanted)]
    paths = (folder.joinpath(*names) for names in sorted(found))
    return [path for path in paths if path.is_file()]


def _matches(names: list[str], globs: list[str]) -> bool:
    """Whether the components of a path match those of a glob; `**` stands for any number of folders."""
    if not globs or not names:
        return not globs and not names
    if globs[0] == "**":
        rest = globs[1:] or ["*"]
        return any(_matches(names[i:], rest) for i in range(len(names)))
    return fnmatch.fnmatchcase(names[0], globs[0]) and _matches(names[1:], globs[1:])


def _nearest(path: Path) -> list[str]:
    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        return []
    close = difflib.get_close_matches(path.name, names, n=1)
    return [f"did you mean {path.parent / close[0]}?"] if close else []


def _stat(path: Path, key: str) -> tuple[tuple[int, int], TextFile]:
    path = path.absolute()
    try:
        info = path.stat()
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{key}: {path} is not a regular file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{key}: cannot read {path}: permission denied")
    changed = (info.st_mtime_ns, info.st_ctime_ns)
    return (info.st_dev, info.st_ino), TextFile(path, info.st_size, changed, key)


def _first(entries: str | list[str]) -> str:
    return Path(entries if isinstance(entries, str) else entries[0]).stem
