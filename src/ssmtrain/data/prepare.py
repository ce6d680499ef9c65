"""Sources and a tokenizer to a folder of memory-mapped shards: made once, found again by fingerprint."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationError

from ssmtrain.config.base import Config
from ssmtrain.config.errors import UserError
from ssmtrain.data import cache, making
from ssmtrain.data.encode import How, Interrupted
from ssmtrain.data.shards import SHARD_TOKENS, SplitEntry, TokenStream, ailing, verify, verify_file
from ssmtrain.data.sources import VAL, open_source, textual
from ssmtrain.data.spans import Source, Span
from ssmtrain.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from ssmtrain.config.schema import RunConfig

FORMAT = 2
LIST = "sources.jsonl"
log = logging.getLogger(__name__)


class SourceList(Config):
    """The file that says what the text was made from: path, split, size, documents and bytes, a line each."""

    entries: int
    """Files, or splits of a hub's data set."""
    size: int
    """Bytes on disk, packed ones as they are."""
    sha256: str
    """SHA-256 of the list, `sources.jsonl`."""


class Manifest(Config):
    """What a prepared folder holds; written last, so a folder that has one is whole."""

    format: int
    """Version of this layout."""
    label: str
    """Short name of the source."""
    tokenizer: str
    """SHA-256 of the tokenizer's definition."""
    vocab_size: int
    """Token ids are below this."""
    eot: int
    """The token that closes each document."""
    dtype: Literal["<u2", "<u4"]
    """Type of a token on disk."""
    shard_tokens: Annotated[int, Field(gt=0)]
    """Tokens in each shard but a split's last."""
    source: str
    """SHA-256 of the source's fingerprint: which files, how large, and when they last changed."""
    sources: SourceList
    """Where the text came from."""
    splits: dict[str, SplitEntry]
    """train and val."""


@dataclass(frozen=True)
class Prepared:
    """A prepared folder."""

    folder: Path
    manifest: Manifest
    made: bool
    """Whether this call made it."""

    def stream(self, split: str) -> TokenStream:
        """The tokens of a split."""
        m = self.manifest
        return TokenStream(self.folder, m.splits[split], m.dtype, m.shard_tokens)

    def verify(self) -> None:
        """Read everything through against the manifest; UserError names file and offset."""
        for entry in self.manifest.splits.values():
            verify(self.folder, entry, self.manifest.dtype, self.manifest.vocab_size)
        verify_file(self.folder / LIST, self.manifest.sources.sha256)


def prepare(config: RunConfig, tokenizer: Tokenizer | None = None, workers: int | None = None) -> Prepared:
    """The run's prepared data, found and verified or made; UserError for bad sources or shards.

    `workers` processes tokenise, absent: one for each core this process may use; the result is the same.
    """
    page = textual(config.data)
    tokenizer = tokenizer or load_tokenizer(config.tokenizer, page)
    source = open_source(page)
    identity = hashlib.sha256(f"{FORMAT} {tokenizer.hash} {source.digest}".encode()).hexdigest()
    name = f"{source.label}-{identity[:16]}"
    roots = cache.roots(page.cache_dir)
    for root in roots:
        found = load(root / name)
        if found is not None:
            return _checked(found, tokenizer, source)
    root = cache.writable(roots, explicit=page.cache_dir is not None)
    with cache.lock(root / f".{name}.lock") as alone:
        found = load(root / name)  # another process may have made it while this one waited
        if found is not None:
            return _checked(found, tokenizer, source)
        why = _ailing(root / name)
        if why is not None:
            log.warning("prepared data in %s is not whole: %s; it is made anew", root / name, why)
        if alone:
            cache.sweep(root, name)
        work = root / (f"{name}.part" if alone else f"{name}.tmp-{uuid.uuid4().hex[:8]}")
        resumed = _make(source, tokenizer, root / name, work, workers or len(os.sched_getaffinity(0)))
        made = load(root / name)
        if made is None:
            raise UserError(f"{root / name} was damaged as soon as it was written: is the disk failing?")
        if not resumed:  # what was hashed as it was written need not be read again
            cache.mark_passed(made.folder)
        return replace(_checked(made, tokenizer, source), made=True)


def load(folder: Path) -> Prepared | None:
    """The prepared folder, or None when it is absent, half made, or of another format."""
    found = _read(folder)
    return found if isinstance(found, Prepared) else None


def _ailing(folder: Path) -> str | None:
    """Why a folder that has a manifest cannot be used; None where it can, or where there is none."""
    found = _read(folder)
    return found if isinstance(found, str) else None


def _read(folder: Path) -> Prepared | str | None:
    """The prepared folder, or what is wrong with it; None where it has no manifest."""
    try:
        manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    except OSError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        return f"manifest.json: {where}{': ' if where else ''}{first['msg'][:200]}"
    if manifest.format != FORMAT or not _are_splits(list(manifest.splits)):
        return f"manifest.json: it is of format {manifest.format}, or of other splits"
    for entry in manifest.splits.values():
        why = ailing(folder, entry, manifest.dtype, manifest.shard_tokens)
        if why is not None:
            return why
    return Prepared(folder, manifest, made=False)


def _are_splits(names: list[str]) -> bool:
    """train and val, or train and validation sets."""
    sets = [name for name in names if name.startswith(VAL)]
    return sorted(names) == ["train", "val"] or (bool(sets) and sorted(names) == sorted(["train", *sets]))


def _checked(prepared: Prepared, tokenizer: Tokenizer, source: Source) -> Prepared:
    """Verify a folder that some other process made, unless it has not changed since it last passed."""
    manifest = prepared.manifest
    splits = manifest.splits.keys() == source.splits.keys()
    if not splits or (manifest.tokenizer, manifest.source) != (tokenizer.hash, source.digest):
        what = "tokenizer" if manifest.tokenizer != tokenizer.hash else "source"
        raise UserError(
            f"prepared data in {prepared.folder} is of another {what} than its name says",
            f"delete {prepared.folder} and run again: it is made anew from the sources",
        )
    if not cache.passed(prepared.folder):
        prepared.verify()
        for name in _unlisted(prepared):
            log.warning("%s is not in the manifest and is ignored", prepared.folder / name)
        cache.mark_passed(prepared.folder)
    return prepared


def _unlisted(prepared: Prepared) -> list[str]:
    """Files like shards that the manifest does not list."""
    splits = prepared.manifest.splits.values()
    listed = {shard.file for split in splits for shard in (*split.shards, split.starts)}
    return sorted(p.name for p in prepared.folder.glob("*.bin") if p.name not in listed)


def _make(source: Source, tokenizer: Tokenizer, folder: Path, work: Path, workers: int) -> bool:
    """Tokenise into a folder beside the final one and rename it into place; whether it went on with one."""
    keep = False
    try:
        there = load(work)
        if there is not None:  # killed between the manifest and the new name
            making.clear(work)
            cache.publish(work, folder, whole=lambda there: load(there) is not None)
            return True
        return _fill(source, tokenizer, folder, work, workers)
    except Interrupted:
        keep = True
        raise
    except KeyboardInterrupt:
        keep = True
        log.warning("interrupted; the same command goes on with what is done")
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"data.cache_dir: no space left in {folder.parent} for the prepared tokens",
                "set data.cache_dir=<a folder on a larger disk>",
            ) from None
        raise
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)


def _fill(source: Source, tokenizer: Tokenizer, folder: Path, work: Path, workers: int) -> bool:
    work.mkdir(exist_ok=True)
    dtype: Literal["<u2", "<u4"] = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    plain = all(isinstance(entry, Span) for split in source.splits.values() for entry in split)
    threads = plain and isinstance(tokenizer, ByteTokenizer)
    how = How(tokenizer, dtype, source.skip_bad, source.drop_duplicates, threads)
    maker = making.Maker(source, how, tokenizer.eot, work, SHARD_TOKENS)
    splits: dict[str, SplitEntry] = {}
    for split, entry in maker.run(workers).items():
        if entry is None:
            raise _nothing(split, source)
        splits[split] = entry
    lines = list(making.source_list(maker))
    listed = "".join(json.dumps(line) + "\n" for line in lines).encode()
    cache.write_file(work / LIST, listed)
    sources = SourceList(
        entries=len(lines),
        size=sum(line["size"] or 0 for line in lines),
        sha256=hashlib.sha256(listed).hexdigest(),
    )
    manifest = Manifest(
        format=FORMAT,
        label=source.label,
        tokenizer=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eot=tokenizer.eot,
        dtype=dtype,
        shard_tokens=SHARD_TOKENS,
        source=source.digest,
        sources=sources,
        splits=splits,
    )
    cache.write_file(work / "manifest.json", manifest.model_dump_json(indent=1).encode())
    making.clear(work)
    cache.publish(work, folder, whole=lambda there: load(there) is not None)
    return maker.resumed


def _nothing(split: str, source: Source) -> UserError:
    if split == "val" and source.held_out is not None:
        return UserError(
            f"data.val: too few documents to hold {source.held_out:g} of them out",
            "give data.val a file of its own, or set a larger data.val_fraction",
        )
    return UserError(f"data.{split}: the text gives no tokens with this tokenizer")
