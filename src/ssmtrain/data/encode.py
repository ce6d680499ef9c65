"""Units to tokens, in order: in this process, or in processes of their own, one for each core."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

import numpy as np

from ssmtrain.config.errors import UserError
from ssmtrain.data.spans import BadText
from ssmtrain.data.units import Unit

if TYPE_CHECKING:
    from ssmtrain.data.tokenizer import Tokenizer

BATCH = 2**23
"""Characters tokenised at a time by a process that has all cores; a worker of several takes an eighth."""
ALONE = 4
"""Units done before other processes are started, which takes as long as these."""


@dataclass(frozen=True)
class How:
    """What is done with every unit."""

    tokenizer: Tokenizer
    dtype: str
    skip_bad: bool
    digests: bool
    threads: bool = False
    """Whether threads do it: files to bytes is copying, which the interpreter's lock does not hold up."""
    batch: int = BATCH


@dataclass
class Encoded:
    """What became of a unit's documents; all arrays but `ids` are (documents,)."""

    ids: np.ndarray
    """(tokens,): documents end to end, each that ends here and has tokens closed by end of text."""
    lengths: np.ndarray
    """int64: tokens of each, the end of text included."""
    sizes: np.ndarray
    """int64: bytes of UTF-8 of each."""
    digests: np.ndarray | None
    """V16: of each text, where duplicates are left out."""
    bad: list[tuple[int, str]]
    """Which documents cannot be read as text, and why: all that are left out, or the one to stop at."""


def encode(unit: Unit, how: How) -> Encoded:
    """The tokens of a unit; UserError for a file that changed or cannot be read."""
    out: list[np.ndarray] = []
    bad: list[tuple[int, str]] = []
    pieces_of: list[int] = []
    sizes: list[int] = []
    digests: list[bytes] = []
    texts: list[str] = []
    held = 0
    for i, document in enumerate(unit.documents()):
        if isinstance(document, BadText) or unit.bad:
            bad.append((i, document.lines[0] if isinstance(document, BadText) else ""))
            if not how.skip_bad:
                break
            document = []
        for text in document:
            texts.append(text)
            held += len(text)
            if held >= how.batch:
                out += how.tokenizer.encode_all(texts)
                texts, held = [], 0
        pieces_of.append(len(document))
        sizes.append(sum(len(t) if t.isascii() else len(t.encode()) for t in document))
        if how.digests:
            digests.append(_digest(document))
    out += how.tokenizer.encode_all(texts) if texts else []
    ids, lengths = _joined(out, pieces_of, how, unit.closes)
    found = np.frombuffer(b"".join(digests), "V16") if how.digests else None
    return Encoded(ids, lengths, np.array(sizes, np.int64), found, bad)


def _digest(document: list[str]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for text in document:
        digest.update(text.encode())
    return digest.digest()


def _joined(
    out: list[np.ndarray], pieces_of: list[int], how: How, closes: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces end to end with their ends of text (tokens,), and the tokens of each document (documents,)."""
    lengths = np.zeros(len(pieces_of), np.int64)
    ids = np.empty(sum(map(len, out)) + len(pieces_of), how.dtype)
    at = piece = 0
    for i, count in enumerate(pieces_of):
        begin = at
        for one in out[piece : piece + count]:
            ids[at : at + len(one)] = one
            at += len(one)
        piece += count
        if at > begin and closes:
            ids[at] = how.tokenizer.eot
            at += 1
        lengths[i] = at - begin
    ids = ids[:at]
    if at and ids.max() >= how.tokenizer.vocab_size:
        raise UserError(
            f"tokenizer: it gave the id {ids.max()}, its vocabulary has {how.tokenizer.vocab_size}"
        )
    return ids, lengths


def encode_all(units: Iterator[Unit], how: How, workers: int) -> Iterator[tuple[Unit, Encoded]]:
    """Every unit with what became of it, in order, made by `workers` processes (1: by this one)."""
    for unit in units if workers == 1 else islice(units, ALONE):
        yield unit, encode(unit, how)
    first = next(units, None)
    if first is None:
        return
    try:
        with _pool(replace(how, batch=BATCH // 8), workers) as submit:
            waiting: deque[tuple[Unit, Future[Encoded]]] = deque()
            for unit in chain([first], units):
                waiting.append((unit, submit(unit)))
                if len(waiting) > workers + 2:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
    except BrokenProcessPool:
        raise Interrupted(
            "a process that tokenised was killed, which is what a machine does that runs out of memory",
            "run again: it goes on from there; workers=1 takes the least memory (ssmtrain prepare)",
        ) from None


class Interrupted(UserError):
    """What was prepared so far is worth keeping."""


@contextlib.contextmanager
def _pool(how: How, workers: int) -> Iterator[Callable[[Unit], Future[Encoded]]]:
    """Processes that tokenise; they end with this one, however it ends. Threads where those are enough."""
    if how.threads:
        with ThreadPoolExecutor(workers) as threads:
            try:
                yield lambda unit: threads.submit(encode, unit, how)
            finally:
                threads.shutdown(wait=True, cancel_futures=True)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit locks that other threads hold
    pool = ProcessPoolExecutor(workers, spawn, _start, (how,))
    try:
        yield lambda unit: pool.submit(_work, unit)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_how: list[How] = []


def _start(how: How) -> None:
    """Make this process a worker: deaf to Ctrl-C, which its parent hears, and gone when its parent is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process already
    _how.append(how)


def _work(unit: Unit) -> Encoded:
    return encode(unit, _how[0])
