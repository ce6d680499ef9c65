"""Where text comes from: the corpus inside the package, or the user's own files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import TYPE_CHECKING

from ssmtrain.config.data import source_page
from ssmtrain.data.files import text_source
from ssmtrain.data.spans import Member, Source, Span, pieces

if TYPE_CHECKING:
    from ssmtrain.config.data import AnyData, EmbeddedData, TextData


VAL = "val."
"""Splits whose names begin so are validation sets of a source that has several."""


def pages(data: AnyData) -> dict[str, EmbeddedData | TextData]:
    """The page of each source by name; a page that is no mixture is its only one, under no name."""
    if data.kind != "mix":
        return {"": data}
    return {name: source_page(data, source) for name, source in data.sources.items()}


def set_name(split: str) -> str:
    """The validation set that a split is; empty where the source has one alone."""
    return split.removeprefix(VAL) if split.startswith(VAL) else ""


def open_source(data: AnyData) -> Source:
    """The source that `config.data` names, its files found but not read; UserError names the key."""
    if data.kind == "mix":
        raise ValueError("a mixture is several sources: see pages()")
    if data.kind == "embedded":
        return embedded(data.name)
    if not isinstance(data.val, dict):
        return text_source(data)
    parts = {name: text_source(data.model_copy(update={"val": files})) for name, files in data.val.items()}
    first = next(iter(parts.values()))
    splits = {"train": first.splits["train"]}
    splits |= {VAL + name: part.splits["val"] for name, part in parts.items()}
    prints = {name: part.fingerprint for name, part in parts.items()}
    return Source(first.label, splits, {"kind": "sets", "sets": prints})


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
    for span in _spans(data, split):
        for piece in pieces(span):
            out += piece.encode()
            if limit is not None and len(out) >= limit:
                return bytes(out[:limit])
    return bytes(out)


def _spans(data: AnyData, split: str) -> Iterator[Span]:
    """The spans of a split of all sources, of validation those of all sets."""
    for page in pages(data).values():
        for name, spans in open_source(page).splits.items():
            if name == split or name.startswith(f"{split}."):
                yield from spans
