"""`runs rm`: delete runs, and nothing that is not one, is in use, or lies behind a link."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ssmtrain.checkpoint import lock
from ssmtrain.checkpoint.records import CONFIG
from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.runs.find import RUNS_DIR, known, name_of, named, under
from ssmtrain.runs.folder import page_of, size_of, state_of
from ssmtrain.runs.words import plain, size, table

if TYPE_CHECKING:
    from ssmtrain.config.request import Request


def command(request: Request) -> int:
    """List what goes, ask, and delete it; UserError before anything is touched where one run cannot go."""
    runs_dir = Path(request.words.get("runs_dir", RUNS_DIR))
    if not request.overrides:
        raise UserError("runs rm needs a run: ssmtrain runs rm <name or folder> …", known(runs_dir))
    # The arms of a run before it.
    folders = sorted(named(request.overrides, runs_dir), reverse=True)
    for folder in folders:
        _refuse(folder, folders, runs_dir)
    sizes = [size_of(folder) for folder in folders]
    total = sum(n for n, folder in zip(sizes, folders, strict=True) if folder.parent not in folders)
    rows = [
        (f"  {plain(str(folder))}", state_of(folder)[0], size(n_bytes))
        for folder, n_bytes in zip(folders, sizes, strict=True)
    ]
    print("\n".join(table(rows, left=2)))
    for line in _descendants(folders, runs_dir):
        print(plain(line))
    if not request.flags.get("yes") and not _confirmed(len(folders), total):
        print("nothing is deleted")
        return FINISHED
    for folder in folders:
        delete(folder)
        if folder.parent.parent == runs_dir:
            with contextlib.suppress(OSError):
                folder.parent.rmdir()  # a multirun's, if that was its last arm and it holds nothing else
    print(f"deleted {_count(len(folders))}, {size(total)}")
    return FINISHED


def delete(folder: Path) -> None:
    """Delete a run under its lock, its config last: what is left of it, if this is killed, is still a run.

    UserError when a process has begun to use it, or the disk refuses.
    """
    try:
        held = lock.acquire(folder / "lock")
    except lock.Held as owner:
        raise UserError(f"{folder} is in use by {owner}", "nothing of it is deleted") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be deleted: {error.strerror}") from None
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            if entry.name in (CONFIG, "lock"):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)  # it unlinks the links in it and follows none
            else:
                os.unlink(entry.path)
        os.unlink(folder / CONFIG)
        os.unlink(folder / "lock")
        os.rmdir(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be deleted: {error.strerror}") from None
    finally:
        held.release()


def _refuse(folder: Path, folders: list[Path], runs_dir: Path) -> None:
    state, why = state_of(folder)
    if state == "running":
        raise UserError(
            f"{folder} is running: {why}", "stop it first (Ctrl-C there, or kill -TERM its process)"
        )
    parent = folder.parent
    if parent != runs_dir and parent.is_symlink():
        raise UserError(f"{parent} is a link to {os.readlink(parent)}: name the run's own folder")
    inside = [arm for arm in under(folder) if arm not in folders]
    if inside:
        names = ", ".join(name_of(arm, runs_dir) for arm in inside[:3])
        raise UserError(
            f"{folder} holds runs of their own: {names}",
            f"delete them with it by name: ssmtrain runs rm {name_of(folder, runs_dir)} {names}",
        )


def _descendants(folders: list[Path], runs_dir: Path) -> list[str]:
    """Runs that began from one that goes, and have no checkpoint of their own yet: they could not start."""
    gone = {folder.resolve() for folder in folders}
    found = []
    for folder in under(runs_dir):
        if folder in folders or any((folder / "checkpoints").glob("step-*")):
            continue
        origin = page_of(folder).get("origin")
        if isinstance(origin, dict) and Path(str(origin.get("run"))).resolve() in gone:
            name = name_of(folder, runs_dir)
            found.append(f"  {name} begins from {origin['run']}, has saved nothing yet and cannot start then")
    return found


def _confirmed(count: int, n_bytes: int) -> bool:
    if not sys.stdin.isatty():
        raise UserError("runs rm asks before it deletes, and there is no terminal to answer", "add --yes")
    try:
        answer = input(f"delete {_count(count)}, {size(n_bytes)}? [y/N] ")
    except EOFError:
        return False
    return answer.strip().lower() in ("y", "yes")


def _count(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
