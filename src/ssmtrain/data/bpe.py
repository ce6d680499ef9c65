"""A tokenizer of the corpus' own: trained once on the training text, kept beside what was prepared."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssmtrain.config.errors import UserError
from ssmtrain.data import cache
from ssmtrain.data.sources import open_source, pages, size, texts
from ssmtrain.data.spans import Source
from ssmtrain.data.tokenizer import FileTokenizer, train

if TYPE_CHECKING:
    from ssmtrain.config.data import AnyData, BpeTokenizer
    from ssmtrain.data.sources import AnyText

FORMAT = 2
log = logging.getLogger(__name__)


def trained(config: BpeTokenizer, data: AnyData) -> Path:
    """The tokenizer.json of a corpus, or of all sources of a mixture together, found or made.

    Weights and phases do not matter, so that they may change. UserError when the text has too few distinct
    pieces.
    """
    sources = [_open(name, page) for name, page in pages(data).items()]
    digests = [source.digest for source in sources]
    identity = [FORMAT, config.vocab_size, config.sample_bytes, *digests]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    label = sources[0].label if data.kind != "mix" else f"mix-of-{len(sources)}"
    name = f"{label}-bpe-{config.vocab_size}-{digest[:16]}"
    given = getattr(data, "cache_dir", None)
    roots = cache.roots(given)
    for root in roots:
        if _whole(root / name):
            return root / name / "tokenizer.json"
    root = cache.writable(roots, explicit=given is not None)
    with cache.lock(root / f".{name}.lock") as alone:
        if alone:
            cache.sweep(root, name)
        if not _whole(root / name):
            _make(config, sources, root / name)
    return root / name / "tokenizer.json"


def _open(name: str, page: AnyText) -> Source:
    try:
        return open_source(page)
    except UserError as error:
        if not name:
            raise
        raise UserError(f"data.sources.{name}: {error.lines[0]}", *error.lines[1:]) from None


def _whole(folder: Path) -> bool:
    """Whether a folder holds the tokenizer that was put there."""
    try:
        definition = (folder / "tokenizer.json").read_bytes()
        return (folder / "sha256").read_text() == hashlib.sha256(definition).hexdigest()
    except (OSError, ValueError):
        return False


def _make(config: BpeTokenizer, sources: Sequence[Source], folder: Path) -> None:
    began = time.monotonic()
    labels = ", ".join(source.label for source in sources)
    log.info("training a tokenizer of %d ids on %s", config.vocab_size, labels)
    definition = train(_samples(sources, config.sample_bytes), config.vocab_size)
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        cache.write_file(temporary / "tokenizer.json", definition)
        cache.write_file(temporary / "sha256", hashlib.sha256(definition).hexdigest().encode())
        given = FileTokenizer(temporary / "tokenizer.json").vocab_size
        if given != config.vocab_size:
            raise UserError(
                f"tokenizer.vocab_size = {config.vocab_size}: the text gives only {given} tokens",
                f"set tokenizer.vocab_size={given} or less, or give more text",
            )
        cache.publish(temporary, folder, whole=_whole)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("trained it in %.0f s", time.monotonic() - began)


def _samples(sources: Sequence[Source], limit: int) -> Iterator[str]:
    """About `limit` bytes of the training text of several sources, of each in proportion to how much it has.

    Where one is a stream, whose length is not known, all have equal parts of the limit.
    """
    sizes = [_length(source) for source in sources]
    total = sum(sizes)
    for source, length in zip(sources, sizes, strict=True):
        part = limit // len(sources) if math.isinf(total) else -(-limit * int(length) // max(int(total), 1))
        yield from _sample(source, max(1, part))


def _length(source: Source) -> float:
    """Bytes of the training text, packed files as they are; infinite for a stream."""
    return sum(size(entry) for entry in source.splits["train"])


def _sample(source: Source, limit: int) -> Iterator[str]:
    """About `limit` bytes of the training text, evenly spaced over it; all of it where it is no longer.

    A stream, whose length is not known, is read from its beginning; packed files count as they are.
    """
    total = _length(source)
    left = limit
    for text in texts(source, "train", 1.0 if math.isinf(total) else min(1.0, limit / max(total, 1))):
        left -= len(text) if text.isascii() else len(text.encode())
        yield text
        if left <= 0:
            return
