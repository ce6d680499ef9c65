"""Tensors of one kind cut into files of bounded size, which threads write side by side.

A core hashes one or two gigabytes a second, and a hash cannot be shared out; files can. Copies from a device,
hashes and writes all leave the interpreter's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ssmtrain.checkpoint.durable import Written
from ssmtrain.checkpoint.parts import Part, write_parts

LIMIT = 2**29
"""Bytes of a file beyond which the next tensor goes to another one; a larger tensor has a file of its own."""
WORTH = 2**27
"""Bytes below which starting threads costs more than it gives."""
MOST = 8
"""Threads; more than this many no disk keeps busy."""

T = TypeVar("T")
K = TypeVar("K")


def cut(base: str, parts: Mapping[str, Part]) -> Iterator[tuple[str, dict[str, Part]]]:
    """Yield files' names, without a suffix, and their parts: `base`, or base_00000, base_00001 … if one file
    were too large."""
    files: list[dict[str, Part]] = [{}]
    held = 0
    for name, part in parts.items():
        if files[-1] and held + part.tensor.nbytes > LIMIT:
            files.append({})
            held = 0
        files[-1][name] = part
        held += part.tensor.nbytes
    for index, file in enumerate(files):
        yield base if len(files) == 1 else f"{base}_{index:05d}", file


def side_by_side(work: Callable[[K], T], items: Mapping[K, int]) -> dict[K, T]:
    """What work makes of each item, given their bytes; the first exception when all have ended."""
    threads = min(len(items), MOST, len(os.sched_getaffinity(0)))
    if threads < 2 or sum(items.values()) < WORTH:
        return {item: work(item) for item in items}
    # The largest first, so that none is begun when the others are done.
    order = sorted(items, key=lambda item: -items[item])
    with ThreadPoolExecutor(threads, "ssmtrain-files") as pool:
        found = dict(zip(order, pool.map(work, order), strict=True))
    return {item: found[item] for item in items}


def write(folder: Path, kinds: Mapping[str, Mapping[str, Part]]) -> dict[str, Written]:
    """Write the parts of each kind, by the base of its files' names; what was written, by file."""
    files = {f"{name}.safetensors": parts for base in kinds for name, parts in cut(base, kinds[base])}
    sizes = {name: sum(part.tensor.nbytes for part in parts.values()) for name, parts in files.items()}
    return side_by_side(lambda name: write_parts(folder / name, files[name]), sizes)
