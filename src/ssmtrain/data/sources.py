"""Where text comes from: the corpus inside the package, the user's own files, or a hub."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from ssmtrain.config.data import source_page
from ssmtrain.config.errors import UserError
from ssmtrain.data.files import text_source
from ssmtrain.data.spans import BadText, Entry, Member, Remote, Source, Span
from ssmtrain.data.units import Unit, units

if TYPE_CHECKING:
    from ssmtrain.config.data import AnyData, EmbeddedData, HubData, TextData

    AnyText = EmbeddedData | TextData | HubData


VAL = "val."
"""Splits whose names begin so are validation sets of a source that has several."""


def pages(data: AnyData) -> dict[str, AnyText]:
    """The page of each source by name; a page that is no mixture is its only one, under no name."""
    if data.kind != "mix":
        return {"": textual(data)}
    return {name: textual(source_page(data, source)) for name, source in data.sources.items()}


def set_name(split: str) -> str:
    """The validation set that a split is; empty where the source has one alone."""
    return split.removeprefix(VAL) if split.startswith(VAL) else ""


def open_source(data: AnyData) -> Source:
    """The source that `config.data` names, its files found but not read; UserError names the key."""
    page = textual(data)
    if page.kind == "embedded":
        return embedded(page.name)
    if page.kind == "hub":
        from ssmtrain.data.hub import hub_source

        return hub_source(page)
    return text_source(page)


def textual(data: AnyData) -> AnyText:
    """The data page if it is of one text; UserError for a task."""
    if data.kind == "embedded" or data.kind == "text" or data.kind == "hub":
        return data
    if data.kind == "mix":
        raise ValueError("a mixture is several sources: see pages()")
    raise UserError(
        f"data.kind = {data.kind}: its rows are made as they are read; there is no text to prepare"
    )


def embedded(name: str) -> Source:
    """A corpus inside the package."""
    folder = files("ssmtrain.data") / "corpora" / name
    corpus = json.loads((folder / "corpus.json").read_text())
    splits: dict[str, list[Entry]] = {"train": [], "val": []}
    for entry in corpus["files"]:
        member = Member(folder / entry["file"], entry["bytes"], entry["sha256"])
        splits[entry["split"]].append(Span(member, 0, member.size))
    digests = [[entry["split"], entry["sha256"]] for entry in corpus["files"]]
    return Source(name, splits, {"kind": "embedded", "name": name, "files": digests})


def validates(source: Source, unit: Unit, before: int, documents: int) -> np.ndarray:
    """Which of a unit's documents validate, bool (documents,); `before` records came before it.

    Of the training split's records every so many-th does where `held_out` says so, by number alone.
    """
    train = len(source.splits["train"])
    if unit.entry >= train:
        return np.ones(documents, bool)
    if source.held_out is None or isinstance(source.splits["train"][unit.entry], Span):
        return np.zeros(documents, bool)
    number = np.floor((before + np.arange(documents + 1)) * source.held_out)
    return number[1:] > number[:-1]


def divided(source: Source, unit: Unit) -> bool:
    """Whether a unit's documents are numbered, to be divided between train and val."""
    train = source.splits["train"]
    return source.held_out is not None and unit.entry < len(train) and not isinstance(train[unit.entry], Span)


def texts(source: Source, split: str, share: float = 1.0) -> Iterator[str]:
    """The text of a split in pieces, documents end to end, of about `share` of the units, evenly spaced, the
    first among them."""
    before, split_of = 0, source.entry_splits

    def taken(val: bool, unit: Unit) -> bool:
        held = split_of[unit.entry]
        return split == ("val" if val and held == "train" else held)

    for i, unit in enumerate(units(source)):
        chosen = math.ceil((i + 1) * share) > math.ceil(i * share)
        if not chosen and not divided(source, unit):
            continue
        documents = list(unit.documents())
        to_val = validates(source, unit, before, len(documents))
        before += len(documents) if unit.closes and divided(source, unit) else 0
        for document, val in zip(documents, to_val.tolist(), strict=True):
            if isinstance(document, BadText) and not source.skip_bad:
                raise UserError(*document.lines)
            if chosen and taken(val, unit) and not isinstance(document, BadText):
                yield from document


def cost(source: Source, split: str) -> float:
    """Bytes of files that must be read for the text of a split; infinite for a stream of the hub."""
    beside = source.held_out is not None and split == "val"
    entries = [*source.splits[split], *(source.splits["train"] if beside else ())]
    return sum(size(entry) for entry in entries)


def size(entry: Entry) -> float:
    """Bytes of an entry, packed ones as they are; infinite for a stream of the hub."""
    if isinstance(entry, Span):
        return entry.stop - entry.start
    return math.inf if isinstance(entry, Remote) else entry.file.size


def split_text(data: AnyData, split: str, limit: int | None = None) -> bytes:
    """The UTF-8 text of a split (its first `limit` bytes), documents end to end."""
    out = bytearray()
    for page in pages(data).values():
        source = open_source(page)
        for name in source.splits:
            if name == split or name.startswith(f"{split}."):
                for piece in texts(source, name):
                    out += piece.encode()
                    if limit is not None and len(out) >= limit:
                        return bytes(out[:limit])
    return bytes(out)
