"""Where Triton keeps what it has compiled, what that depends on, and how much of it is new."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def use(folder: str | None) -> Path:
    """Keep kernels in a folder, of this process and of those that it starts; None: where they are kept now.

    Saying so also holds for None: torch's compiler would move Triton's cache to a folder of its own, another
    one for each device, as soon as it compiles anything.
    """
    from triton import knobs

    place = Path(folder or knobs.cache.dir).expanduser().absolute()
    if folder is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(place)
    return place


def fingerprint(device: torch.device, sources: Iterable[Path]) -> list[str]:
    """What the kernels of a call depend on besides the call: the GPU, the compilers, and source files."""
    import triton

    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(path.read_bytes())
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return [name, str(capability), torch.__version__, triton.__version__, digest.hexdigest()]


@contextmanager
def compiled() -> Iterator[list[str]]:
    """The names of the kernels that Triton compiles in the block, not of those that it has in its cache."""
    from triton import knobs

    names: list[str] = []
    lock, before = threading.Lock(), knobs.compilation.listener

    def listen(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            with lock:
                names.append(src.name)
        if before is not None:
            before(src=src, cache_hit=cache_hit, **rest)

    knobs.compilation.listener = listen
    try:
        yield names
    finally:
        knobs.compilation.listener = before
