"""Where text comes from: the corpus inside the package, or the user's own files."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING

from ssmtrain.config.errors import UserError
from ssmtrain.data.files import text_source
from ssmtrain.data.spans import Member, Source, Span, pieces

if TYPE_CHECKING:
    from ssmtrain.config.data import AnyData, EmbeddedData, TextData


def open_source(data: AnyData) -> Source:
    """The source that `config.data` names, its files found but not read; UserError names the key."""
    page = textual(data)
    return embedded(page.name) if page.kind == "embedded" else text_source(page)


def textual(data: AnyData) -> EmbeddedData | TextData:
    """The data page if it is of text; UserError for a task."""
    if data.kind == "embedded" or data.kind == "text":
        return data
    raise UserError(
        f"data.kind = {data.kind}: its rows are made as they are read; there is no text to prepare"
    )


def embedded(name: str) -> Source:
    """A corpus inside the package."""
    folder = files("ssmtrain.data") / "corpora" / name
    corpus = json.loads((folder / "corpus.json").read_text())
    splits: dict[str, list[Span]] = {"train": [], "val": []}
    for entry in corpus["files"]:
        member = Member(folder / entry["file"], entry["bytes"], entry["sha256"])
        splits[entry["split"]].append(Span(member, 0, member.size))
    digests = [[entry["split"], entry["sha256"]] for entry in corpus["files"]]
    return Source(name, splits, {"kind": "embedded", "name": name, "files": digests})


def split_text(data: AnyData, split: str, limit: int | None = None) -> bytes:
    """The UTF-8 text of a split (its first `limit` bytes), documents end to end."""
    out = bytearray()
    for span in open_source(data).splits[split]:
        for piece in pieces(span):
            out += piece.encode()
            if limit is not None and len(out) >= limit:
                return bytes(out[:limit])
    return bytes(out)
