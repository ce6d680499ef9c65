"""One safetensors file: written piece by piece with its hash, read by the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ssmtrain.checkpoint import faults
from ssmtrain.checkpoint.durable import Written, write_file

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


_HEADER_LIMIT = 100_000_000
"""Bytes of a header beyond which the safetensors library reads no file."""


def write_shard(path: Path, tensors: Mapping[str, Tensor], extra: Mapping[str, str] | None = None) -> Written:
    """Write `tensors` (any device, any strides) as safetensors and fsync; one at a time is on the host.

    `extra` goes into the header's metadata.
    """
    # Widest first: every tensor then starts at a multiple of its item size, as readers by mmap want.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = _header(tensors, names, extra or {})
    half = (len(header) + sum(tensors[n].numel() * tensors[n].element_size() for n in names)) // 2
    crossed = False

    def progress(written: int) -> None:
        nonlocal crossed
        if not crossed and written >= half:
            crossed = True
            faults.point("mid_file")

    return write_file(path, _pieces(header, tensors, names), progress)


def read_shard(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; ValueError if it is not one, or holds a type or a name
    that no checkpoint has."""
    try:
        _refuse_twins(path)
        found = load_file(path, device="cpu")
    except (SafetensorError, TypeError, RuntimeError, OverflowError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"it is not a safetensors file: {said}") from error
    for name, tensor in found.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name[:80]!r} is {tensor.dtype}, which no checkpoint holds")
    return found


def read_extra(path: Path) -> dict[str, str]:
    """What the header of a file that read_shard has read holds beside the tensors."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _refuse_twins(path: Path) -> None:
    """ValueError when a name stands twice in the header: the library takes the last one without a word."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twin = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twin[:80]!r} stands twice in its header")
        return found

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= _HEADER_LIMIT else b""
    try:
        json.loads(header, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return  # the library says better what is wrong with it


def _header(tensors: Mapping[str, Tensor], names: list[str], extra: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **extra}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: a checkpoint cannot hold {tensor.dtype}")
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(header: bytes, tensors: Mapping[str, Tensor], names: list[str]) -> Iterator[memoryview | bytes]:
    yield header
    for name in names:
        if tensors[name].numel():
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data
