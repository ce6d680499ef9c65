"""A tokenizer of the corpus' own: trained once on the training text, kept beside what was prepared."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ssmtrain.config.errors import UserError
from ssmtrain.data import cache
from ssmtrain.data.sources import open_source, size, texts, textual
from ssmtrain.data.spans import Source
from ssmtrain.data.tokenizer import FileTokenizer, train

if TYPE_CHECKING:
    from ssmtrain.config.data import AnyData, BpeTokenizer

FORMAT = 1
log = logging.getLogger(__name__)


def trained(config: BpeTokenizer, data: AnyData) -> Path:
    """The tokenizer.json of a corpus, found or made; UserError when the text has too few distinct pieces."""
    page = textual(data)
    source = open_source(page)
    identity = [FORMAT, config.vocab_size, config.sample_bytes, source.digest]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    name = f"{source.label}-bpe-{config.vocab_size}-{digest[:16]}"
    roots = cache.roots(page.cache_dir)
    for root in roots:
        if _whole(root / name):
            return root / name / "tokenizer.json"
    root = cache.writable(roots, explicit=page.cache_dir is not None)
    with cache.lock(root / f".{name}.lock") as alone:
        if alone:
            cache.sweep(root, name)
        if not _whole(root / name):
            _make(config, source, root / name)
    return root / name / "tokenizer.json"


def _whole(folder: Path) -> bool:
    """Whether a folder holds the tokenizer that was put there."""
    try:
        definition = (folder / "tokenizer.json").read_bytes()
        return (folder / "sha256").read_text() == hashlib.sha256(definition).hexdigest()
    except (OSError, ValueError):
        return False


def _make(config: BpeTokenizer, source: Source, folder: Path) -> None:
    began = time.monotonic()
    log.info("training a tokenizer of %d ids on %s", config.vocab_size, source.label)
    definition = train(_sample(source, config.sample_bytes), config.vocab_size)
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


def _sample(source: Source, limit: int) -> Iterator[str]:
    """About `limit` bytes of the training text, evenly spaced over it; all of it where it is no longer.

    A stream, whose length is not known, is read from its beginning; packed files count as they are.
    """
    total = sum(size(entry) for entry in source.splits["train"])
    left = limit
    for text in texts(source, "train", 1.0 if math.isinf(total) else min(1.0, limit / max(total, 1))):
        left -= len(text) if text.isascii() else len(text.encode())
        yield text
        if left <= 0:
            return
