"""Sources and a tokenizer to a folder of memory-mapped shards: made once, found again by fingerprint."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from ssmtrain.config.base import Config
from ssmtrain.config.errors import UserError
from ssmtrain.data import cache
from ssmtrain.data.shards import SHARD_TOKENS, SplitEntry, SplitWriter, TokenStream, sizes_match, verify
from ssmtrain.data.sources import open_source, textual
from ssmtrain.data.spans import BadText, Source, Span, more_problems, pieces
from ssmtrain.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from ssmtrain.config.schema import RunConfig

FORMAT = 1
BATCH = 2**23  # characters tokenised at a time
log = logging.getLogger(__name__)


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


def prepare(config: RunConfig, tokenizer: Tokenizer | None = None) -> Prepared:
    """The run's prepared data, found and verified or made; UserError for bad sources or shards."""
    page = textual(config.data)
    tokenizer = tokenizer or load_tokenizer(config.tokenizer)
    source = open_source(page)
    identity = {"format": FORMAT, "tokenizer": tokenizer.hash, "source": source.fingerprint}
    name = f"{source.label}-{_digest(identity)[:16]}"
    roots = cache.roots(page.cache_dir)
    for root in roots:
        found = load(root / name)
        if found is not None:
            return _checked(found)
    root = cache.writable(roots, explicit=page.cache_dir is not None)
    with cache.lock(root / f".{name}.lock") as alone:
        found = load(root / name)  # another process may have made it while this one waited
        if found is not None:
            return _checked(found)
        if alone:
            cache.sweep(root, name)
        _make(source, tokenizer, root / name)
        made = load(root / name)
        if made is None:
            raise UserError(f"{root / name} was damaged as soon as it was written: is the disk failing?")
        return replace(_checked(made), made=True)


def load(folder: Path) -> Prepared | None:
    """The prepared folder, or None when it is absent, half made, or of another format."""
    try:
        manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    except (OSError, ValidationError):
        return None
    whole = all(sizes_match(folder, s, manifest.dtype) for s in manifest.splits.values())
    return Prepared(folder, manifest, made=False) if whole and manifest.format == FORMAT else None


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _checked(prepared: Prepared) -> Prepared:
    """Verify a folder that some other process made, unless it has not changed since it last passed."""
    if not cache.passed(prepared.folder):
        prepared.verify()
        cache.mark_passed(prepared.folder)
    return prepared


def _make(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenise into a temporary folder beside the final one, then rename it into place."""
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    dtype: Literal["<u2", "<u4"] = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    try:
        splits = {}
        for split, spans in source.splits.items():
            writer = SplitWriter(temporary, split, dtype, tokenizer.eot, SHARD_TOKENS)
            _tokenise(spans, tokenizer, writer, f"{source.label} {split}")
            splits[split] = writer.close()
            if not splits[split].documents:
                raise UserError(f"data.{split}: the text gives no tokens with this tokenizer")
        manifest = Manifest(
            format=FORMAT,
            label=source.label,
            tokenizer=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            eot=tokenizer.eot,
            dtype=dtype,
            shard_tokens=SHARD_TOKENS,
            source=_digest(source.fingerprint),
            splits=splits,
        )
        cache.write_file(temporary / "manifest.json", manifest.model_dump_json(indent=1).encode())
        cache.publish(temporary, folder, whole=lambda there: load(there) is not None)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"data.cache_dir: no space left in {folder.parent} for the prepared tokens",
                "set data.cache_dir=<a folder on a larger disk>",
            ) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenise(spans: Sequence[Span], tokenizer: Tokenizer, writer: SplitWriter, what: str) -> None:
    """Stream documents through the tokenizer, a batch of texts at a time (one batch runs on all cores)."""
    said = time.monotonic()
    total = sum(s.stop - s.start for s in spans)
    for texts, ends in _batches(spans):
        for text, ids, end in zip(texts, tokenizer.encode_all(texts), ends, strict=True):
            writer.bytes += len(text) if text.isascii() else len(text.encode())
            writer.write(ids)
            if end:
                writer.end_document()
        if time.monotonic() - said > 5:
            said = time.monotonic()
            log.info("preparing %s: %.0f of %.0f MB", what, writer.bytes / 1e6, total / 1e6)


def _batches(spans: Sequence[Span]) -> Iterator[tuple[list[str], list[bool]]]:
    """Texts and whether each ends its document, about BATCH characters at a time."""
    texts: list[str] = []
    ends: list[bool] = []
    held = 0
    for i, span in enumerate(spans):
        try:
            for text in pieces(span):
                texts.append(text)
                ends.append(False)
                held += len(text)
                if held >= BATCH:
                    # The last text may prove to end its document: it waits for the next batch.
                    yield texts[:-1], ends[:-1]
                    texts, ends, held = texts[-1:], ends[-1:], len(texts[-1])
        except BadText as error:
            more = more_problems(spans[i + 1 :], limit=3)
            advice = "take these files out of data.include, or convert them to UTF-8 text"
            raise UserError(error.lines[0], *more, advice) from None
        if span.stop > span.start:
            ends[-1] = True
        else:
            texts.append("")
            ends.append(True)
    if texts:
        yield texts, ends
