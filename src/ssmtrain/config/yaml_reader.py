"""A small, safe YAML reader: plain containers and YAML 1.2 scalars, every refusal with its line.

It stands before OmegaConf, whose loader resolves tags, reads 010 as 8 and 12:30:00 as 45000, and lets a file
of 170 bytes with nested aliases grow for minutes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ssmtrain.config.errors import UserError

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_ALIASES = 64
MAX_NODES = 20_000
"""Nodes of a file with every alias written out."""

_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE = {"true", "True", "TRUE"}
_FALSE = {"false", "False", "FALSE"}
_OLD_BOOLEANS = {"y", "n", "yes", "no", "on", "off"}
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = {".nan", ".NaN", ".NAN"}
_OCTAL = re.compile(r"[-+]?0[0-7_]*[0-9]")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a page into plain containers; UserError names file, line, cause and mend."""
    shown = _shown(path)
    try:
        if not path.is_file():
            raise UserError(f"{shown}: not a file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"{shown}: larger than 1 MiB, which no config is")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    return parse_yaml(text, shown)


def parse_yaml(text: str, shown: str = "config") -> dict[str, Any]:
    """Read a page's text; `shown` is the file's name in messages."""
    try:
        page = _Builder(shown).build(text)
    except yaml.YAMLError as error:
        raise UserError(_syntax(error, text, shown)) from None
    if page is None:
        raise UserError(f"{shown}: the config is empty")
    if not isinstance(page, dict):
        kind = "a list" if isinstance(page, list) else f"the value {str(page)[:40]!r}"
        raise UserError(f"{shown}: expected a mapping (key: value) at the top level, found {kind}")
    return page


def _shown(path: Path) -> str:
    """The path as a person would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def _syntax(error: yaml.YAMLError, text: str, shown: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        reason = getattr(error, "reason", None) or str(error)
        return f"{shown}: {' '.join(str(reason).split())}"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    before = line[: mark.column + 1]
    if "\t" in before and not before.strip():
        column = before.index("\t") + 1
        return f"{shown}:{mark.line + 1}:{column}: a tab in the indentation; indent with spaces"
    problem = getattr(error, "problem", None) or "not YAML"
    if line[mark.column :].startswith("???"):
        problem = "inside { } or [ ] write '???' in quotes"
    return f"{shown}:{mark.line + 1}:{mark.column + 1}: {problem}"


class _Builder:
    """Builds plain containers from the parser's events, counting what an attack would inflate."""

    def __init__(self, shown: str) -> None:
        self.shown = shown
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.aliases = 0
        self.nodes = 0

    def fail(self, mark: Any, what: str) -> UserError:
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        return UserError(f"{self.shown}{where}: {what if len(what) <= 200 else what[:199] + '…'}")

    def build(self, text: str) -> Any:
        self.events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        page: Any = None
        documents = 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.fail(event.start_mark, "a second document (---); a config is one")
            elif isinstance(event, yaml.NodeEvent):
                page = self.node(event, 1)
        return page

    def node(self, event: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self.fail(event.start_mark, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        before = self.nodes
        self.count(event, 1)
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise self.fail(event.start_mark, f"the tag {tag} is refused; write plain values")
        if isinstance(event, yaml.ScalarEvent):
            value = self.scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self.sequence(depth)
        else:
            value = self.mapping(depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, self.nodes - before)
        return value

    def count(self, event: Any, nodes: int) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise self.fail(event.start_mark, f"more than {MAX_NODES} values, aliases written out")

    def alias(self, event: Any) -> Any:
        self.aliases += 1
        if self.aliases > MAX_ALIASES:
            raise self.fail(event.start_mark, f"more than {MAX_ALIASES} aliases (*name)")
        if event.anchor not in self.anchors:
            raise self.fail(event.start_mark, f"*{event.anchor} has no anchor &{event.anchor} before it")
        value, nodes = self.anchors[event.anchor]
        self.count(event, nodes)
        return value

    def sequence(self, depth: int) -> list[Any]:
        items: list[Any] = []
        for event in self.events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            items.append(self.node(event, depth + 1))
        return items

    def mapping(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        merged: list[dict[str, Any]] = []
        for event in self.events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self.key(event)
            value = self.node(next(self.events), depth + 1)
            if key == "<<" and event.style is None:
                merged += self.merge(event, value)
                continue
            if key in found:
                first, second = lines[key], event.start_mark.line + 1
                raise self.fail(
                    event.start_mark, f"the key {key!r} stands twice, on lines {first} and {second}"
                )
            found[key], lines[key] = value, event.start_mark.line + 1
        for other in merged:
            found = {**other, **found}
        return found

    def merge(self, event: Any, value: Any) -> list[dict[str, Any]]:
        many = value if isinstance(value, list) else [value]
        if not all(isinstance(one, dict) for one in many):
            raise self.fail(event.start_mark, "<< takes a mapping (*name) or a list of them")
        return many

    def key(self, event: Any) -> str:
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
            raise self.fail(event.start_mark, "a key must be a plain word")
        self.count(event, 1)
        if event.style is None:
            word: str = event.value
            if word.lower() in _OLD_BOOLEANS | {"true", "false"}:
                raise self.fail(
                    event.start_mark,
                    f"the key {word} reads as a boolean in YAML; write '{word}' in quotes if it is meant",
                )
            if word in _NULL:
                raise self.fail(event.start_mark, "a key is missing before ':'")
        return str(event.value)

    def scalar(self, event: Any) -> Any:
        text = event.value
        if event.style is not None:  # quoted or block text
            return text
        if text in _NULL:
            return None
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        if _OCTAL.fullmatch(text):
            plain = text.replace("_", "").lstrip("+-0") or "0"
            raise self.fail(
                event.start_mark,
                f"{text} reads as an octal number in YAML; write {plain}, or quote it as text",
            )
        if _SEXAGESIMAL.fullmatch(text):
            raise self.fail(
                event.start_mark,
                f"{text} reads as a base-60 number in YAML; write seconds, or quote it as text",
            )
        if _INT.fullmatch(text):
            return int(text) if len(text) < 40 else float(text)
        if _HEX.fullmatch(text):
            return int(text, 16)
        if _FLOAT.fullmatch(text):
            return float(text)
        infinite = _INF.fullmatch(text)
        if infinite:
            return float(f"{infinite[1]}inf")
        return float("nan") if text in _NAN else text
