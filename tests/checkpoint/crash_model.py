"""A model of a file system that forgets what was not fsynced, fed by the real calls of the code under test.

`record` runs a function and writes down every change it makes below a folder. `crashes` replays the record
and yields, after each operation, every state in which a power cut may leave the disk: names that were not
fsynced may or may not be there, contents that were not fsynced may be old, new, or zeros.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

Op = tuple[str, ...] | tuple[str, str, bytes]


def record(root: Path, work: Callable[[list[Op]], None]) -> list[Op]:
    """The operations of `work` below `root`, in order; `work` may append marks of its own."""
    ops: list[Op] = []
    open_files: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "write", "close", "fsync", "mkdir", "rmdir")}
    real |= {name: getattr(os, name) for name in ("replace", "unlink")}

    def inside(path: object) -> str | None:
        text = os.path.abspath(os.fspath(path)) if not isinstance(path, int) else ""  # type: ignore[call-overload]  # any path-like
        return os.path.relpath(text, root) if text.startswith(str(root)) else None

    def opened(path, flags, mode=0o777, *, dir_fd=None):
        descriptor = real["open"](path, flags, mode, dir_fd=dir_fd)
        name = inside(path)
        if name is not None:
            open_files[descriptor] = name
            if flags & os.O_CREAT:
                ops.append(("create", name))
        return descriptor

    def written(descriptor, data):
        done = real["write"](descriptor, data)
        if descriptor in open_files:
            ops.append(("write", open_files[descriptor], bytes(data[:done])))
        return done

    def closed(descriptor):
        open_files.pop(descriptor, None)
        real["close"](descriptor)

    def synced(descriptor):
        real["fsync"](descriptor)
        if descriptor in open_files:
            ops.append(("fsync", open_files[descriptor]))

    def changed(kind):
        def call(*paths, **options):
            real[kind](*paths, **options)
            names = [name for path in paths if not isinstance(path, int) for name in [inside(path)] if name]
            if names:
                ops.append((kind, *names))

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in {"open": opened, "write": written, "close": closed, "fsync": synced}.items():
            patch.setattr(os, name, stand_in)
        for name in ("mkdir", "rmdir", "replace", "unlink"):
            patch.setattr(os, name, changed(name))
        work(ops)
    return ops


@dataclass
class _Node:
    """A file (contents) or a folder (names), as the program sees it and as the disk surely has it."""

    folder: bool
    data: bytes = b""
    durable: bytes = b""
    names: dict[str, _Node] = field(default_factory=dict)
    durable_names: dict[str, _Node] = field(default_factory=dict)
    pending: list[dict[str, _Node | None]] = field(default_factory=list)
    """Changes of names since the last fsync of the folder; a rename is one change."""


def crashes(ops: list[Op], root: Path, unread: Callable[[str], bool]) -> Iterator[tuple[int, Path]]:
    """(number of operations done, folder holding one possible disk after a power cut), for all of them.

    States that differ only below folders whose name is `unread` are yielded once.
    """
    seen: set[tuple[int, int]] = set()
    tree = _Node(folder=True)
    for done in range(len(ops) + 1):
        if done:
            _apply(tree, ops[done - 1])
        for picture in itertools.chain(*(_pictures(tree, contents) for contents in ("old", "new", "zeros"))):
            read = {name: data for name, data in picture.items() if not unread(name)}
            key = (done, hash(frozenset(read.items())))
            if key not in seen:
                seen.add(key)
                yield done, _materialise(picture, root)
                shutil.rmtree(root)


def _apply(tree: _Node, op: Op) -> None:
    kind, *names = op
    if kind in ("create", "mkdir"):
        _change(tree, names[0], _Node(folder=kind == "mkdir"))
    elif kind == "write":
        _find(tree, op[1]).data += op[2]
    elif kind == "fsync":
        node = _find(tree, names[0])
        node.durable = node.data
        node.durable_names, node.pending = dict(node.names), []
    elif kind in ("unlink", "rmdir"):
        _change(tree, names[0], None)
    elif kind == "replace":
        source, target = names
        parent = _find(tree, os.path.dirname(source))
        assert os.path.dirname(target) == os.path.dirname(source), "a rename must stay in its folder"
        step = {os.path.basename(source): None, os.path.basename(target): _find(tree, source)}
        _commit(parent, step)


def _change(tree: _Node, name: str, node: _Node | None) -> None:
    _commit(_find(tree, os.path.dirname(name)), {os.path.basename(name): node})


def _commit(parent: _Node, change: dict[str, _Node | None]) -> None:
    _merge(parent.names, change)
    parent.pending.append(change)


def _merge(names: dict[str, _Node], change: dict[str, _Node | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _find(tree: _Node, name: str) -> _Node:
    for part in Path(name).parts:
        if part != ".":
            tree = tree.names[part]
    return tree


def _pictures(node: _Node, contents: str) -> Iterator[dict[str, bytes | None]]:
    """States of the disk below a folder, as {relative name: contents, or None for a folder}.

    Names: every subset of the pending changes while there are few, else every prefix. `contents` of files
    that are not durable: "old", "new" or "zeros" for all alike (correct code has one such file at a time).
    """
    subsets = (
        itertools.chain.from_iterable(
            itertools.combinations(node.pending, size) for size in range(len(node.pending) + 1)
        )
        if len(node.pending) <= 4
        else (node.pending[:size] for size in range(len(node.pending) + 1))
    )
    for changes in subsets:
        names = dict(node.durable_names)
        for change in changes:
            _merge(names, change)
        choices = [list(_versions(name, child, contents)) for name, child in sorted(names.items())]
        for combination in itertools.product(*choices):
            picture: dict[str, bytes | None] = {}
            for part in combination:
                picture |= part
            yield picture


def _versions(name: str, node: _Node, contents: str) -> Iterator[dict[str, bytes | None]]:
    if not node.folder:
        yield {
            name: {"old": node.durable, "new": node.data, "zeros": bytes(len(node.data))}[contents]
            if node.data != node.durable
            else node.data
        }
        return
    for inner in _pictures(node, contents):
        yield {name: None} | {f"{name}/{below}": data for below, data in inner.items()}


def _materialise(picture: dict[str, bytes | None], root: Path) -> Path:
    root.mkdir(parents=True)
    for name, data in sorted(picture.items()):
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)
    return root
