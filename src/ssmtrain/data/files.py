"""The user's own files: found by path, glob or directory, and divided into train and val."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import logging
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.config.errors import UserError
from ssmtrain.data.spans import LINE, PIECE, SPACE, Entry, Records, Source, Span, TextFile
from ssmtrain.data.unpack import PACKINGS

if TYPE_CHECKING:
    from ssmtrain.config.data import TextData

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
"""What a file holds by the end of its name; all others are text."""

log = logging.getLogger(__name__)


def text_source(data: TextData) -> Source:
    """The files that `data.train` and `data.val` name; UserError names the key and what is wrong with it."""
    train = find(data.train, data.include, "data.train")
    splits = {"train": [_entry(f, data) for f in train]}
    held_out = None
    if data.val is None:
        plain = [e for e in splits["train"] if isinstance(e, Span)]
        records = [e for e in splits["train"] if isinstance(e, Records)]
        kept, val = _held_out(plain, bool(records), data.val_fraction)
        splits = {"train": [*kept, *records], "val": [*val]}
        held_out = data.val_fraction if records else None
    else:
        sets, held = data.val if isinstance(data.val, dict) else {"": data.val}, set[Path]()
        for name, files in sets.items():
            given = find(files, data.include, f"data.val.{name}" if name else "data.val")
            splits[f"val.{name}" if name else "val"] = [_entry(f, data) for f in given]
            held |= {f.path for f in given}
        both = sorted({f.path for f in train} & held)
        if both:
            log.warning("data.val: %d files are also in data.train, such as %s", len(both), both[0])
    _check_formats([e for split in splits.values() for e in split], data)
    spans = [[name, *_identity(entry)] for name, split in splits.items() for entry in split]
    label = "".join(c if c.isalnum() else "_" for c in _first(data.train))[:40] or "text"
    fingerprint = {"kind": "text", "spans": spans, "held_out": held_out}
    fingerprint |= {"skip_bad": data.skip_bad, "drop_duplicates": data.drop_duplicates}
    return Source(label, splits, fingerprint, held_out, data.skip_bad, data.drop_duplicates)


def _held_out(plain: list[Span], beside: bool, fraction: float) -> tuple[list[Span], list[Span]]:
    """The plain files divided; all of them train where they are too short and there are records `beside`."""
    if not plain:
        return [], []
    try:
        return hold_out(plain, fraction)
    except UserError:
        if not beside:
            raise
        return plain, []


def _entry(file: TextFile, data: TextData) -> Entry:
    """What a file holds, by its name or by `data.format`."""
    stem, ending = os.path.splitext(file.path.name)
    packing = PACKINGS.get(ending)
    if packing is not None:
        ending = os.path.splitext(stem)[1]
    form = FORMATS.get(ending, "text") if data.format == "auto" else data.format
    if form == "text" and packing is None:
        return Span(file, 0, file.size)
    if form == "parquet" and packing is not None:
        raise UserError(f"{file.key}: {file.path}: unpack it: Parquet files are not read inside {packing}")
    return Records(file, form, packing, data.text_key)


def _identity(entry: Entry) -> list[Any]:
    file = entry.file if isinstance(entry, Span | Records) else None
    if not isinstance(file, TextFile):
        return []
    inner = [entry.start, entry.stop] if isinstance(entry, Span) else [*entry[1:]]
    return [str(file.path), file.size, *file.changed, *inner]


def _check_formats(entries: list[Entry], data: TextData) -> None:
    """UserError for a text_key that nothing reads; a warning where JSON is read as plain text."""
    for entry in entries:
        if isinstance(entry, Span) and entry.file.path.name.endswith(".json") and data.format == "auto":
            said = "%s: %s is read as plain text, braces and all; data.format=jsonl reads JSON lines"
            log.warning(said, getattr(entry.file, "key", "data"), entry.file.path)
            break
    if data.text_key != "text" and not any(isinstance(e, Records) and e.format != "text" for e in entries):
        raise UserError(
            f"data.text_key = {data.text_key}: no effect, as no file is JSON lines or Parquet",
            "leave it out, or set data.format=jsonl or parquet",
        )


def find(entries: str | list[str], include: list[str], key: str) -> list[TextFile]:
    """Files of paths, globs and directories: entries in the order given, each in sorted path order."""
    entries = [entries] if isinstance(entries, str) else entries
    found: dict[tuple[int, int], TextFile] = {}  # by device and inode: the same file counts once
    for entry in entries:
        for path, info in _paths(entry, include, key):
            inode, file = _file(path, info, key)
            found.setdefault(inode, file)
    if not found:
        raise UserError(f"{key}: no files given")
    if not any(f.size for f in found.values()):
        names = next(iter(found.values())).path if len(found) == 1 else f"all {len(found)} files"
        raise UserError(f"{key}: {names}: empty, no text to read")
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


def _paths(entry: str, include: list[str], key: str) -> list[tuple[str, os.stat_result | None]]:
    path = Path(entry).expanduser()
    try:
        if path.is_dir():
            inside = _walk(path, include)
            if not inside:
                raise UserError(f"{key}: no file in {entry} matches data.include={include}")
            _name_scripts(path, {name for name, _ in inside}, key)
            return inside
        if path.exists():
            return [(str(path), None)]
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: cannot read {entry}: {getattr(error, 'strerror', error)}") from None
    if glob.has_magic(entry):
        matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if matches:
            return [(str(p), None) for p in matches]
        raise UserError(f"{key}: no file matches {entry}")
    raise UserError(f"{key}: {entry} does not exist", *_nearest(path))


def _name_scripts(folder: Path, taken: set[str], key: str) -> None:
    """Say that a program which lies beside the texts, as one that loads them would, is not run."""
    left = sorted(str(p) for p in folder.glob("*.py") if str(p) not in taken)
    if left:
        log.info("%s: %d scripts, such as %s, are neither run nor read", key, len(left), left[0])


def _walk(folder: Path, include: list[str]) -> list[tuple[str, os.stat_result | None]]:
    """Regular files below a folder that match a glob, in path order; hidden ones and links to folders not."""
    wanted = _matcher(include)
    found: list[list[str]] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f[0] != "."]
        below = [] if Path(root) == folder else os.path.relpath(root, folder).split("/")
        found += [names for f in files if f[0] != "." and wanted(names := [*below, f])]
    out: list[tuple[str, os.stat_result | None]] = []
    for names in sorted(found):
        path = os.path.join(folder, *names)
        try:
            info = os.stat(path)
        except OSError:
            continue  # a link to nothing
        if stat.S_ISREG(info.st_mode):
            out.append((path, info))
    return out


def _matcher(include: list[str]) -> Callable[[list[str]], bool]:
    """Whether one of the globs matches a path; `**/*.c` and its like are looked up by the name alone."""
    include = ["**/*" if p == "**" else p for p in include]
    quick = [p.startswith("**/") and "/" not in p[3:] and p[3:] != "**" for p in include]
    ends = [p[3:] for p, by_name in zip(include, quick, strict=True) if by_name]
    others = [p.split("/") for p, by_name in zip(include, quick, strict=True) if not by_name]
    last = re.compile("|".join(map(fnmatch.translate, ends))) if ends else None
    return lambda names: bool(
        (last is not None and last.match(names[-1])) or any(_matches(names, globs) for globs in others)
    )


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


def _file(path: str, info: os.stat_result | None, key: str) -> tuple[tuple[int, int], TextFile]:
    """What is known of a file, and its device and inode; `info` is what the system said of it, if asked."""
    path = os.path.abspath(path)
    try:
        info = info or os.stat(path)
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{key}: {path} is not a regular file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{key}: cannot read {path}: permission denied")
    changed = (info.st_mtime_ns, info.st_ctime_ns)
    return (info.st_dev, info.st_ino), TextFile(Path(path), info.st_size, changed, key)


def _first(entries: str | list[str]) -> str:
    return Path(entries if isinstance(entries, str) else entries[0]).stem
