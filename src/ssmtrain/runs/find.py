"""Which folders are runs, and which of them a line names."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ssmtrain.checkpoint.records import CONFIG
from ssmtrain.config.errors import UserError

RUNS_DIR = "runs"
"""Where runs are, unless the line says runs_dir=."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run: it has a config and is no link."""
    return not folder.is_symlink() and (folder / CONFIG).is_file()


def under(runs_dir: Path) -> list[Path]:
    """The runs in a folder, by name: its own, and the arms of multiruns one level below."""
    found = []
    for folder in _folders(runs_dir):
        if is_run(folder):
            found.append(folder)
        found += [arm for arm in _folders(folder) if is_run(arm)]
    return sorted(found)


def name_of(folder: Path, runs_dir: Path) -> str:
    """A run's name: its folder as runs_dir has it, or as it is."""
    return str(folder.relative_to(runs_dir) if folder.is_relative_to(runs_dir) else folder)


def named(words: Iterable[str], runs_dir: Path) -> list[Path]:
    """The runs that words name: names, folders, patterns such as 'quick*', multiruns (all arms), in order.

    UserError for a word that names none.
    """
    found: list[Path] = []
    for word in words:
        found += [one for one in _of(word, runs_dir) if one not in found]
    return found


def one(words: Sequence[str], runs_dir: Path, verb: str) -> Path:
    """The single run that a line names; UserError for none or several."""
    found = named(words, runs_dir)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{verb} needs a run: ssmtrain {verb} <name or folder>", known(runs_dir))
    shown = ", ".join(name_of(folder, runs_dir) for folder in found[:3])
    raise UserError(f"{verb} takes one run, the line names {len(found)}: {shown}…")


def known(runs_dir: Path, near: str = "") -> str:
    """What runs there are, nearest first, as a line for errors."""
    names = [name_of(folder, runs_dir) for folder in under(runs_dir)]
    if not names:
        return f"there are no runs in {runs_dir}; another place is named by runs_dir=…"
    shown = difflib.get_close_matches(near, names, 3, 0.4) or names[:5]
    return f"runs in {runs_dir}: {', '.join(shown)}"


def _of(word: str, runs_dir: Path) -> list[Path]:
    text = word.removeprefix("run=").rstrip("/") or word
    given = Path(os.path.expanduser(text))
    if given.name == CONFIG:
        given = given.parent
    if any(mark in text for mark in "*?["):
        found = [folder for folder in under(runs_dir) if fnmatchcase(name_of(folder, runs_dir), text)]
        if not found:
            raise UserError(f"{text}: no run is named so", known(runs_dir))
        return found
    for place in (runs_dir / given, given):
        if is_run(place):
            return [place]
        arms = [arm for arm in _folders(place) if is_run(arm)]
        if arms and place != Path():
            return arms
    raise UserError(f"{text}: {_why(given, runs_dir)}", known(runs_dir, text))


def _why(given: Path, runs_dir: Path) -> str:
    """Why a path is no run."""
    place = next((path for path in (runs_dir / given, given) if os.path.lexists(path)), None)
    if place is None:
        return "there is no such run"
    if place.is_symlink():
        return f"{place} is a link to {os.readlink(place)}; name the run itself"
    return f"{place} is not a run: it has no {CONFIG}" if place.is_dir() else f"{place} is a file, not a run"


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted; neither links nor hidden ones."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir(follow_symlinks=False) and e.name[0] != "."]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]
