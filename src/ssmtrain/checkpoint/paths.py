"""Paths that a user or a stranger's folder names: what they are, and links that would lead elsewhere."""

from __future__ import annotations

from pathlib import Path

from ssmtrain.checkpoint.store import MANIFEST
from ssmtrain.config.errors import UserError
from ssmtrain.config.reference import BEST

PICKLED = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}
"""Suffixes of files that torch.load would unpickle."""


def real(path: Path, key: str) -> Path:
    """The path without links; UserError where they lead back to themselves."""
    try:
        return path.resolve()
    except (RuntimeError, OSError):
        raise UserError(
            f"{key}: {path} is a link that leads back to itself", f"delete it: rm {path}"
        ) from None


def why_none(path: Path, otherwise: str) -> str:
    """Why a path that was given for a run or a checkpoint is neither."""
    if path.is_file():
        if path.suffix in PICKLED:
            return f"{path.suffix} files are pickles, which run code when opened; only safetensors are read"
        return "a single file; expected a folder with its manifest"
    if path.is_dir() and (path.name.startswith("step-") or (path / MANIFEST).is_file()):
        return "not a checkpoint's name (step- and eight digits)"
    return f"an empty folder, {otherwise}" if path.is_dir() and not any(path.iterdir()) else otherwise


def refuse_links(folder: Path) -> None:
    """What a run writes to and deletes from must lie in its folder, whoever the folder came from.

    The link to the best checkpoint is the run's own: it is replaced, and never followed.
    """
    entries = folder.iterdir() if folder.is_dir() else ()
    links = sorted(path.name for path in entries if path.is_symlink() and path.name != BEST)
    if links:
        raise UserError(
            f"{folder / links[0]} is a link, and a run writes and deletes only inside its own folder",
            "move what it points to in its place, or put the whole run elsewhere with runs_dir=…",
        )
