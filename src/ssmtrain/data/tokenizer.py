"""Text to token ids and back: UTF-8 bytes, or any `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ssmtrain.config.errors import UserError
from ssmtrain.config.task_rules import vocabulary

if TYPE_CHECKING:
    from ssmtrain.config.data import AnyData, AnyTokenizer
    from ssmtrain.config.schema import RunConfig

END_OF_TEXT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<EOS>",
    "<|end▁of▁sentence|>",
    "<|eot|>",
    "<EOT>",
)


KEPT = "tokenizer.json"
"""Where a run keeps a tokenizer that was trained for it."""


class Tokenizer(Protocol):
    """What the rest of the program knows of a tokenizer."""

    vocab_size: int
    """One more than the largest id."""
    eot: int
    """The id that closes a document."""
    hash: str
    """SHA-256 (hex) of the definition: equal hashes give equal ids."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int64 (n,), without an end-of-text token."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, each of some integer dtype (n,); on all cores where that pays."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids; end-of-text shows as a line's end, ids outside the vocabulary as nothing."""


class ByteTokenizer:
    """UTF-8 bytes 0 to 255, and 256 for end of text."""

    vocab_size = 257
    eot = 256
    hash = hashlib.sha256(b"ssmtrain bytes: 0-255, end of text 256").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int64 (n,)."""
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, uint8 (n,) each."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids; bytes that are no UTF-8 become U+FFFD."""
        shown = (10 if i == self.eot else i for i in map(int, ids))
        return bytes(i for i in shown if 0 <= i < 256).decode("utf-8", errors="replace")


class IdsTokenizer:
    """Ids as numbers with spaces between, for the rows of a task; 0 stands for the end."""

    eot = 0
    hash = "ids"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int64 (n,); UserError when a word is no id."""
        words = text.split()
        wrong = [w for w in words if not w.isdecimal() or int(w) >= self.vocab_size]
        if wrong:
            raise UserError(
                f"{wrong[0][:40]!r} is no id of this run's task",
                f"type numbers below {self.vocab_size} with spaces between, such as 1 5 2",
            )
        return np.array([int(w) for w in words], np.int64)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, int64 (n,) each."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Numbers, a space before each."""
        return "".join(f" {int(i)}" for i in ids)


class FileTokenizer:
    """A `tokenizer.json`, through the tokenizers library; special tokens in a text count as plain text."""

    def __init__(self, path: str | Path, end_of_text: str | None = None) -> None:
        from tokenizers import Tokenizer as Backend  # half a tenth of a second that bytes need not pay

        definition = _read(Path(path))
        try:
            backend = Backend.from_str(definition.decode("utf-8"))
            listed = json.loads(definition).get("added_tokens") or []
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the library raises bare Exceptions, and BaseException when it panics
            why = " ".join(str(error).split())[:300]
            raise UserError(
                f"tokenizer.path: {path} is not a tokenizer.json: {why}",
                "take the file that the tokenizers library saved, or tokenizer=bytes",
            ) from None
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        vocab = backend.get_vocab(with_added_tokens=True)
        for token in listed:
            # The library numbers added tokens anew where their ids have a gap, without a word.
            given = vocab.get(token["content"], token["id"])
            if given != token["id"]:
                raise UserError(
                    f"tokenizer.path: {path}: the added token {token['content']!r} has the id {token['id']}, "
                    f"which follows no other; the tokenizers library would read it as {given}",
                    "number the added tokens without gaps after the vocabulary",
                )
        self.vocab_size = 1 + max(vocab.values(), default=-1)  # ids may have gaps
        added = [t.content for t in backend.get_added_tokens_decoder().values()]
        name = _end_of_text(vocab, added, end_of_text, path)
        self.eot = vocab[name]
        self.hash = hashlib.sha256(definition + b"\0" + name.encode()).hexdigest()
        self.definition = definition
        """The file's content."""
        self._backend = backend

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int64 (n,)."""
        return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, uint32 (n,) each."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, np.uint32) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids."""
        documents: list[list[int]] = [[]]
        for i in map(int, ids):
            if i == self.eot:
                documents.append([])
            elif 0 <= i < self.vocab_size:
                documents[-1].append(i)
        return "\n".join(self._backend.decode(d, skip_special_tokens=False) for d in documents)


def vocab_rows(config: RunConfig) -> int:
    """Rows of the embedding: the recipe's model.vocab_size, or the tokenizer's or the task's size."""
    if config.tokenizer.kind == "bpe":
        return config.model.vocab_size or config.tokenizer.vocab_size
    return config.model.vocab_size or tokenizer_of(config).vocab_size


def tokenizer_of(config: RunConfig, run: Path | None = None) -> Tokenizer:
    """The run's tokenizer; for a task, whose ids are no text, one that reads and writes numbers.

    `run` is the run's folder, which keeps one that was trained for it.
    """
    vocab = vocabulary(config.data)
    if vocab is not None:
        return IdsTokenizer(vocab)
    return load_tokenizer(config.tokenizer, config.data, run)


def load_tokenizer(config: AnyTokenizer, data: AnyData | None = None, run: Path | None = None) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names, trained on `data` where it asks for that; UserError.

    A run keeps the one that was trained for it in its folder, so that it needs neither text nor cache.
    """
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.kind == "bpe":
        if run is not None and (run / KEPT).is_file():
            return FileTokenizer(run / KEPT, END_OF_TEXT_NAMES[0])
        from ssmtrain.data.bpe import trained

        assert data is not None, "a tokenizer that is trained needs the text"
        return FileTokenizer(trained(config, data), END_OF_TEXT_NAMES[0])
    if config.kind == "file":
        return FileTokenizer(config.path, config.end_of_text)
    raise UserError("tokenizer.kind = ids: it reads no text", "take tokenizer=bytes")


def train(texts: Iterator[str], vocab_size: int) -> bytes:
    """A byte-level BPE of at most `vocab_size` ids for some texts: a tokenizer.json, always the same."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return str(backend.to_str()).encode()


def _read(path: Path) -> bytes:
    try:
        path = path.expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if path.exists() and not path.is_file():
            raise UserError(f"tokenizer.path: {path} is not a regular file")
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"tokenizer.path: cannot read {path}: {why}") from None


def _end_of_text(vocab: dict[str, int], added: list[str], wanted: str | None, path: str | Path) -> str:
    """The name of the end-of-text token: the configured one, or the first usual name that exists."""
    names = END_OF_TEXT_NAMES if wanted is None else (wanted,)
    found = next((name for name in names if name in vocab), None)
    if found is not None:
        return found
    problem = f"has no token {wanted!r}" if wanted else "has no end-of-text token under a usual name"
    raise UserError(
        f"tokenizer.end_of_text: {path} {problem}",
        f"its special tokens: {', '.join(added[:8]) or 'none'}",
        "set tokenizer.end_of_text=<one of its tokens>",
    )
