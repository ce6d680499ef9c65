"""The data and tokenizer pages: where text comes from and how it becomes tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssmtrain.config.base import Config
from ssmtrain.config.tasks import AnyTaskData, Rows


class _Data(Rows):
    cache_dir: str | None = None
    """Where prepared shards are kept; absent: the user's cache folder."""


class EmbeddedData(_Data):
    """A corpus inside the package: six novels by Jane Austen; five train, Persuasion validates."""

    kind: Literal["embedded"] = "embedded"
    name: Literal["austen"] = "austen"
    """Which corpus."""


class TextData(_Data):
    """The user's own text files; each file is one document."""

    kind: Literal["text"] = "text"
    train: str | list[str]
    """Files, globs or directories (searched for `include`) to train on."""
    val: str | list[str] | None = None
    """Files, globs or directories to validate on; absent: the last `val_fraction` of documents or text."""
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the text held out when `val` is absent."""
    include: list[str] = ["**/*.txt", "**/*.md"]
    """Globs of the files taken from a directory, in sorted path order; hidden ones are left out."""


AnyData = Annotated[EmbeddedData | TextData | AnyTaskData, Field(discriminator="kind")]


class BytesTokenizer(Config):
    """Text as UTF-8 bytes: 256 byte tokens and an end-of-text token."""

    kind: Literal["bytes"] = "bytes"


class FileTokenizer(Config):
    """A `tokenizer.json` as the tokenizers library writes it."""

    kind: Literal["file"] = "file"
    path: str
    """The file."""
    end_of_text: str | None = None
    """The token that closes a document; absent: the usual names are tried (<|endoftext|>, </s>, <eos>, …)."""


class IdsTokenizer(Config):
    """None: the rows of a task are ids; typed or shown they are numbers with spaces between."""

    kind: Literal["ids"] = "ids"


AnyTokenizer = Annotated[BytesTokenizer | FileTokenizer | IdsTokenizer, Field(discriminator="kind")]
