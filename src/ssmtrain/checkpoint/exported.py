"""Exported weights: one safetensors file with the config that built the model, and no run around them.

A folder holds model.safetensors, config.yaml and export.json; a single file x.safetensors has x.yaml and
x.json beside it. The JSON, written last, has the file's sha256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmtrain.checkpoint import faults
from ssmtrain.checkpoint.durable import json_bytes, make_folder, replace_file, sync_folder
from ssmtrain.checkpoint.shard import read_shard, write_shard
from ssmtrain.config.errors import UserError

FORMAT = 1
SUFFIX = ".safetensors"
NOTE_LIMIT = 2**20
"""Bytes of a note that are read."""


@dataclass(frozen=True)
class Export:
    """The files of an export."""

    file: Path
    """The weights."""
    page: Path
    """The config, a page for config=."""
    note: Path
    """Step, hash and where they came from."""
    step: int = 0
    sha256: str = ""


def files(out: Path) -> Export:
    """Where an export to `out`, a folder or a .safetensors file, has its parts."""
    if out.suffix == SUFFIX:
        return Export(out, out.with_suffix(".yaml"), out.with_suffix(".json"))
    return Export(out / f"model{SUFFIX}", out / "config.yaml", out / "export.json")


def is_export(path: Path) -> bool:
    """Whether there is an export, whole or not, at a path."""
    found = files(path)
    if path.suffix == SUFFIX:
        return found.file.is_file()
    return found.file.is_file() and found.page.is_file() and not (path / "checkpoints").exists()


def write_export(out: Path, tensors: Mapping[str, Tensor], page: str, note: Mapping[str, Any]) -> Export:
    """Write weights, config and note, each durable before the next; UserError when `out` is taken.

    A half-written export has no note, and is not read.
    """
    found = files(out)
    for path in (found.file, found.page, found.note):
        if path.exists():
            raise UserError(f"out={out}: {path} exists already", "give another out=…, or delete it first")
    make_folder(found.file.parent)
    written = write_shard(found.file, tensors)
    replace_file(found.page, page.encode())
    faults.point("before_note")
    record = {"format": FORMAT, "sha256": written.sha256, "size": written.size, **note}
    replace_file(found.note, json_bytes(record))
    sync_folder(found.file.parent)
    return Export(found.file, found.page, found.note, int(note["step"]), written.sha256)


def open_export(path: Path, word: str) -> Export:
    """An export, read through against its note; UserError when it is half written or damaged."""
    found = files(path)
    if not found.page.is_file():
        raise UserError(
            f"{word}={path}: {found.page.name}, the config of these weights, is not beside them",
            "take both from where they were exported, or export again with: ssmtrain convert run=<run> out=…",
        )
    try:
        with found.note.open("rb") as file:
            note = json.loads(file.read(NOTE_LIMIT))
        step, expected = note["step"], note["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{word}={path}: {found.note.name} is missing or no note of an export: it was not written whole",
            "export again with: ssmtrain convert run=<run> out=<another folder>",
        ) from None
    if type(step) is not int or step < 0 or note.get("format") != FORMAT:
        raise UserError(f"{word}={path}: {found.note.name} is not one that this version reads")
    with found.file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise UserError(
            f"{word}={path} is damaged: {found.file.name} has sha256 {digest[:12]}…, "
            f"{found.note.name} says {str(expected)[:12]}…"
        )
    return Export(found.file, found.page, found.note, step, digest)


def read_export(file: Path) -> dict[str, Tensor]:
    """The weights of an export's file, on the CPU; UserError if it is not safetensors. Open it first."""
    try:
        return read_shard(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None
