"""The small files of a run folder: resolved config, status, and the JSON lines that grow with the steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.checkpoint.durable import json_bytes, replace_file
from ssmtrain.config.errors import UserError
from ssmtrain.config.guard import check_tree
from ssmtrain.config.yaml_reader import read_yaml

if TYPE_CHECKING:
    from ssmtrain.config.schema import RunConfig

CONFIG = "config.yaml"
STATUS = "status.json"
_LEFT_BEHIND = re.compile(r"\..+\.[0-9a-f]{32}")


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the resolved config, every value spelled out; it is itself a page for `config=`."""
    from ssmtrain.config.identity import default_name
    from ssmtrain.config.load import to_yaml

    # How this start was asked to resume is not part of what the run is; nor is a name that follows from
    # the rest, so that the page with a change on top is a run of its own.
    name = None if config.name == default_name(config) else config.name
    text = to_yaml(config.model_copy(update={"resume": "auto", "name": name}))
    replace_file(folder / CONFIG, text.encode())


def read_config(folder: Path) -> RunConfig:
    """The config of a run folder; UserError if it is missing or not a config of this version."""
    from ssmtrain.config.load import typed

    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}")
    try:
        tree = read_yaml(path)
        check_tree(tree)  # a run folder from a stranger is a page like any other
        return typed(tree)
    except UserError as error:
        raise UserError(f"{path} is not a config of this version:", *error.lines) from None


def write_status(folder: Path, status: str, step: int, tokens: int) -> None:
    """Record how far the run is: `status` is "unfinished" or "finished"."""
    replace_file(folder / STATUS, json_bytes({"status": status, "step": step, "tokens": tokens}))


def read_status(folder: Path) -> dict[str, Any]:
    """What write_status wrote; an unreadable or absent file counts as unfinished at step 0."""
    try:
        status = json.loads((folder / STATUS).read_bytes())
    except (OSError, ValueError, RecursionError):
        status = {}
    fresh = {"status": "unfinished", "step": 0, "tokens": 0}
    if not isinstance(status, dict) or any(type(status.get(key)) is not type(fresh[key]) for key in fresh):
        return fresh
    return status


def cut_jsonl(path: Path, step: int) -> int:
    """Drop the lines whose "step" is beyond `step`, and a torn last line; return how many went.

    The file is replaced in one rename: open it for appending afterwards, not before.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    kept = [line for line in lines if _is_within(line, step)]
    if len(kept) < len(lines):
        replace_file(path, b"".join(kept))
    return len(lines) - len(kept)


def sweep(folder: Path) -> None:
    """Remove what a kill inside replace_file left in `folder`; only while its lock is held."""
    for path in folder.glob(".*"):
        if _LEFT_BEHIND.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def _is_within(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    at = record.get("step", 0) if isinstance(record, dict) else None
    return isinstance(at, int) and at <= step
