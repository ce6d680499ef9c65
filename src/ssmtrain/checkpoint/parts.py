"""Tensors in parts: several processes write a checkpoint side by side, each its own rows of a tensor.

A part is some rows (of dimension 0) of a tensor. A file of parts, `model_00003.safetensors`, says in its own
header which rows it has of how many; tensors that it has whole it does not mention.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssmtrain.checkpoint.durable import Written
from ssmtrain.checkpoint.shard import read_extra, read_shard, write_shard

ROWS = "rows"
"""The entry of the header: name -> [first row, rows of the whole]."""


@dataclass(frozen=True)
class Part:
    """Rows of a tensor, `start` on, of `total`; None: all of it."""

    tensor: Tensor
    start: int = 0
    total: int | None = None


def write_parts(path: Path, parts: Mapping[str, Part]) -> Written:
    """Write parts as one safetensors file and fsync it."""
    rows = {name: [part.start, part.total] for name, part in parts.items() if part.total is not None}
    extra = {ROWS: json.dumps(rows, separators=(",", ":"))} if rows else {}
    return write_shard(path, {name: part.tensor for name, part in parts.items()}, extra)


def read_parts(paths: Iterable[Path]) -> dict[str, Tensor]:
    """The whole tensors of files of parts, on the CPU; ValueError for rows that are not there once."""
    whole: dict[str, Tensor] = {}
    found: dict[str, list[tuple[int, int, Tensor]]] = {}
    for path in paths:
        tensors, rows = read_shard(path), _rows(path)
        strange = [name for name in rows if name not in tensors or not tensors[name].ndim]
        if strange:
            raise ValueError(f"{path.name} has no rows of {strange[0][:80]!r}, though it says so")
        for name, tensor in tensors.items():
            if name in rows:
                found.setdefault(name, []).append((*rows[name], tensor))
            elif name in whole:
                raise ValueError(f"{name[:80]!r} stands in two files")
            else:
                whole[name] = tensor
    for name, parts in found.items():
        if name in whole:
            raise ValueError(f"{name[:80]!r} is whole in one file and in parts in another")
        whole[name] = _joined(name, parts)
    return whole


def _joined(name: str, parts: list[tuple[int, int, Tensor]]) -> Tensor:
    parts = sorted(parts, key=lambda part: part[0])
    total, first = parts[0][1], parts[0][2]
    rows = sum(len(tensor) for _, _, tensor in parts)
    if rows != total:  # before memory is asked for
        raise ValueError(f"{name[:80]!r} has {rows} of {total} rows")
    out = torch.empty(total, *first.shape[1:], dtype=first.dtype)
    at = 0
    for start, size, tensor in parts:
        same = size == total and tensor.dtype == first.dtype and tensor.shape[1:] == first.shape[1:]
        if not same or start != at or start + len(tensor) > total:
            raise ValueError(
                f"the parts of {name[:80]!r} do not make one tensor: rows from {start}, not {at}"
            )
        out[start : start + len(tensor)] = tensor
        at += len(tensor)
    return out


def _rows(path: Path) -> dict[str, tuple[int, int]]:
    try:
        rows = json.loads(read_extra(path).get(ROWS, "{}"))
        found = {name: (start, total) for name, (start, total) in rows.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path.name} does not say which rows it has") from error
    for name, (start, total) in found.items():
        if type(start) is not int or type(total) is not int or not 0 <= start <= total:
            raise ValueError(f"{path.name} does not say which rows of {name[:80]!r} it has")
    return found
