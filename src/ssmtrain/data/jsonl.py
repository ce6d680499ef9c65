"""JSON lines: one object a line, its text under a key; what is wrong is named by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import BinaryIO

from ssmtrain.data.spans import BadText, TextFile

MAX_LINE = 2**28
"""Bytes of a line, at most."""


def read_range(file: TextFile, key: str, start: int, stop: int) -> Iterator[list[str] | BadText]:
    """The texts of the lines that begin in bytes [start, stop) of a plain file."""
    with file.open() as stream:
        if start:
            stream.seek(start - 1)
            start += len(_line(stream, file, start)) - 1
        data = stream.read(max(0, stop - start))
        if data and not data.endswith(b"\n"):
            data += _line(stream, file, start)
        file.check(stream)
    yield from read_lines(data, file, key, lambda at, _: _number(file, start + at))


def read_lines(
    data: bytes, file: TextFile, key: str, number: Callable[[int, int], int]
) -> Iterator[list[str] | BadText]:
    """The texts of whole lines; `number(offset, index)` tells a line's number in the file."""
    at = 0
    for i, line in enumerate(data.split(b"\n")):
        if line and not line.isspace():
            try:
                yield [_text(line, key)]
            except ValueError as error:
                yield BadText(f"{file.key}: {file.path}:{number(at, i)}: {error}")
        at += len(line) + 1


def blocks(stream: BinaryIO, file: TextFile, size: int) -> Iterator[bytes]:
    """Whole lines of a stream, about `size` bytes at a time; BadText for a line that is too long."""
    held: list[bytes] = []
    length = 0
    while data := stream.read(size):
        end = data.rfind(b"\n") + 1
        if end:
            yield b"".join([*held, data[:end]])
            held, length = [], 0
        held.append(data[end:])
        length += len(data) - end
        if length > MAX_LINE:
            raise _too_long(file, "a line")
    if length:
        yield b"".join(held)


def _line(stream: BinaryIO, file: TextFile, at: int) -> bytes:
    """What is left of a line."""
    line = stream.readline(MAX_LINE + 1)
    if len(line) > MAX_LINE:
        raise _too_long(file, f"the line at byte {at}")
    return line


def _too_long(file: TextFile, which: str) -> BadText:
    return BadText(
        f"{file.key}: {file.path}: {which} has more than {MAX_LINE // 2**20} MiB: are these JSON lines?"
    )


def _number(file: TextFile, offset: int) -> int:
    """Number of the line at an offset, from 1: counted only for an error."""
    count = 1
    with file.open() as stream:
        while offset > 0 and (data := stream.read(min(offset, 2**24))):
            count += data.count(b"\n")
            offset -= len(data)
    return count


def _text(line: bytes, key: str) -> str:
    """The text of one line; ValueError says what is wrong with it."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {line[error.start]:#04x} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not a line of JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("this JSON is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected an object such as {{{json.dumps(key)}: …}}, not {_kind(record)}")
    if key not in record:
        has = ", ".join(repr(k[:40]) for k in list(record)[:6]) or "no fields"
        raise ValueError(
            f"there is no {key!r}, only {has}; data.text_key names the field that holds the text"
        )
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is {_kind(text)}, expected a text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key!r} holds half a surrogate pair, which is not text") from None
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
