"""The data and tokenizer pages: where text comes from and how it becomes tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssmtrain.config.base import Config


class _Data(Config):
    seq_len: Annotated[int, Field(ge=2)] = 512
    """Tokens in a row."""
    cache_dir: str | None = None
    """Where prepared shards are kept; absent: the user's cache folder."""


class EmbeddedData(_Data):
    """A corpus inside the package: six novels by Jane Austen; five train, Persuasion validates."""

    kind: Literal["embedded"] = "embedded"
    name: Literal["austen"] = "austen"
    """Which corpus."""


class _Documents(_Data):
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share held out when `val` is absent: the end of the text files, and evenly spaced records."""
    text_key: Annotated[str, Field(min_length=1)] = "text"
    """The field of a JSON line, or the column of a table, that holds the text."""
    drop_duplicates: bool = False
    """Leave out documents whose text came before, word for word, train first; they are counted."""
    skip_bad: bool = False
    """Leave out documents that cannot be read as text instead of stopping at the first; they are counted."""


class TextData(_Documents):
    """The user's own files: plain text (a file is a document), JSON lines or Parquet (a record is one)."""

    kind: Literal["text"] = "text"
    train: str | list[str]
    """Files, globs or directories (searched for `include`) to train on; .gz, .xz and .zst are unpacked."""
    val: str | list[str] | None = None
    """Files, globs or directories to validate on; absent: `val_fraction` of `train`."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """What the files hold; auto goes by the name: .jsonl and .ndjson, .parquet, all others text."""
    include: list[str] = [
        *("**/*.txt", "**/*.txt.gz", "**/*.txt.xz", "**/*.txt.zst", "**/*.md", "**/*.parquet"),
        *("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.xz", "**/*.jsonl.zst"),
    ]
    """Globs of the files taken from a directory, in sorted path order; hidden ones are left out."""


class HubData(_Documents):
    """A data set of the Hugging Face hub, or a local folder or file that `datasets` reads, as a stream."""

    kind: Literal["hub"] = "hub"
    path: str
    """The data set, as in owner/name, or a local folder of JSON, Parquet or text files."""
    subset: str | None = None
    """Which of its configurations, where it has several."""
    revision: str | None = None
    """The commit, branch or tag to read; a commit keeps the text the same for good."""
    train: str = "train"
    """The split to train on."""
    val: str | None = None
    """The split to validate on; absent: evenly spaced documents of `train`, `val_fraction` of them."""


AnyData = Annotated[EmbeddedData | TextData | HubData, Field(discriminator="kind")]


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


class BpeTokenizer(Config):
    """A byte-level BPE that is trained on the training text before the text is prepared."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=257, le=2**20)] = 8192
    """Token ids, the 256 bytes and <|endoftext|> among them."""
    sample_bytes: Annotated[int, Field(ge=1)] = 2**28
    """At most about so many bytes of text, evenly spaced over the corpus, are trained on."""


AnyTokenizer = Annotated[BytesTokenizer | FileTokenizer | BpeTokenizer, Field(discriminator="kind")]
