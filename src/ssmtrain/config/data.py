"""The data and tokenizer pages: where text comes from and how it becomes tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import Field, create_model

from ssmtrain.config.base import Config, Count, Positive
from ssmtrain.config.tasks import AnyTaskData, Rows


class LengthStage(Config):
    """Rows of a length until so many tokens have been seen."""

    until_tokens: Positive
    """The first step that begins after at least so many tokens has the next stage's rows."""
    seq_len: Annotated[int, Field(ge=2)]
    """Tokens in a row; divides data.seq_len."""


class _Data(Rows):
    seq_len_warmup: list[LengthStage] | None = None
    """Shorter rows at the beginning, ascending: each row of seq_len tokens is cut into several, each of them
    without what came before it; absent: none."""
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
    val: str | list[str] | dict[str, str | list[str]] | None = None
    """Files, globs or directories to validate on, or several sets of them by name, each with figures of its
    own; absent: `val_fraction` of `train`."""
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


class _Share(Config):
    weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Share of the tokens, relative to the other sources' weights; 0: none until a phase gives it some."""
    max_epochs: Positive | None = None
    """How often its text may be read through; a run that would read it more often is refused."""


PAGES: dict[str, type[Rows]] = {
    "embedded": EmbeddedData, "text": TextData, "hub": HubData,
    **{page.model_fields["kind"].default: page for page in get_args(AnyTaskData)},
}  # fmt: skip
"""The kinds that can be a source of a mixture, of texts or of tasks."""


def _as_source(page: type[Rows]) -> Any:
    """The page's own settings as a source of a mixture: what all rows share stands on the mixture's page."""
    own = {name: field for name, field in page.model_fields.items() if name not in _Data.model_fields}
    fields: dict[str, Any] = {name: (field.annotation, field) for name, field in own.items()}
    name = page.__name__.replace("Data", "Source")
    return create_model(name, __base__=_Share, __doc__=page.__doc__, __module__=__name__, **fields)


if TYPE_CHECKING:

    class AnySource(_Share):
        """A source of any kind."""

        kind: str
else:
    AnySource = Annotated[Union[tuple(map(_as_source, PAGES.values()))], Field(discriminator="kind")]  # noqa: UP007


class Phase(Config):
    """The mixture from a step, or from so many tokens, on."""

    from_step: Count | None = None
    """Finished steps after which it begins."""
    from_tokens: Count | None = None
    """Tokens after which it begins, in place of from_step."""
    weights: dict[str, Annotated[float, Field(ge=0.0)]]
    """Weight of every source; 0 leaves it out."""


class MixData(_Data):
    """Several texts or tasks, each with a share of the tokens, an order, epochs and validation of its own."""

    kind: Literal["mix"] = "mix"
    sources: dict[str, AnySource]
    """The sources by name."""
    phases: list[Phase] | None = None
    """Other weights later on, ascending; each source goes on where it was. Those still to come may change
    when a run is continued. Absent: the sources' weights throughout."""


def source_page(mix: MixData, source: AnySource) -> EmbeddedData | TextData | HubData | AnyTaskData:
    """A source of a mixture as the page of its own that it would be without the others."""
    page: Any = PAGES[source.kind]
    own = {name: getattr(source, name) for name in page.model_fields if name in type(source).model_fields}
    cache = {"cache_dir": mix.cache_dir} if issubclass(page, _Data) else {}
    return page(**own, seq_len=mix.seq_len, **cache)


AnyData = Annotated[EmbeddedData | TextData | HubData | MixData | AnyTaskData, Field(discriminator="kind")]


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


class IdsTokenizer(Config):
    """None: the rows of a task are ids; typed or shown they are numbers with spaces between."""

    kind: Literal["ids"] = "ids"


AnyTokenizer = Annotated[
    BytesTokenizer | FileTokenizer | BpeTokenizer | IdsTokenizer, Field(discriminator="kind")
]
