"""Data sets of the Hugging Face hub, streamed by the `datasets` library (extra `data`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.config.errors import UserError
from ssmtrain.data.spans import Entry, Remote, Source

if TYPE_CHECKING:
    from ssmtrain.config.data import HubData

log = logging.getLogger(__name__)


def hub_source(data: HubData) -> Source:
    """The splits of a data set; a local folder is known again by its files, another by name and revision."""
    scripts = sorted(Path(data.path).glob("*.py"))
    if scripts:
        log.info("data.path: scripts such as %s are not run", scripts[0])
    names = {"train": data.train} | ({"val": data.val} if data.val else {})
    splits: dict[str, list[Entry]] = {
        split: [Remote(data.path, data.subset, data.revision, name, data.text_key)]
        for split, name in names.items()
    }
    splits.setdefault("val", [])
    held_out = data.val_fraction if data.val is None else None
    fingerprint = {
        "kind": "hub",
        "splits": {name: [*entry] for name, split in splits.items() for entry in split},
        "local": _local(Path(data.path)),
        "held_out": held_out,
        "skip_bad": data.skip_bad,
        "drop_duplicates": data.drop_duplicates,
    }
    label = "".join(c if c.isalnum() else "_" for c in data.path.strip("/").split("/")[-1])[:40] or "hub"
    return Source(label, splits, fingerprint, held_out, data.skip_bad, data.drop_duplicates)


def stream(entry: Remote) -> Iterator[Any]:
    """The text of each record, whatever it is; UserError when the data set or the field is not there."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "data.path: data sets of the hub need the package datasets", "pip install 'ssmtrain[data]'"
        ) from None
    path = entry.path
    quiet = datasets.utils.logging
    quiet.set_verbosity_error()
    try:
        if Path(path).is_file():
            raise UserError(f"data.path: {path} is a file", f"read it with data=text data.train={path}")
        rows = datasets.load_dataset(
            path, entry.subset, split=entry.split, revision=entry.revision, streaming=True
        )
        for row in rows:
            if entry.key not in row:
                raise UserError(
                    f"data.text_key: {path} has no field {entry.key!r}, only {', '.join(list(row)[:8])}",
                    "set data.text_key=<the field that holds the text>",
                )
            yield row[entry.key]
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # the library raises what its own dozen of libraries do
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"data.path: cannot read the split {entry.split} of {path}: {said}",
            "data.path=<owner/name or folder>, data.subset= and data.train= name the text",
        ) from None


def _local(folder: Path) -> list[list[Any]]:
    """Names, sizes and times of a local folder's files; empty for a data set of the hub."""
    found = []
    for root, _, files in os.walk(folder):
        for name in files:
            info = os.stat(os.path.join(root, name))
            found.append([os.path.join(root, name), info.st_size, info.st_mtime_ns, info.st_ctime_ns])
    return sorted(found)
