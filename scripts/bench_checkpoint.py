"""Saving and loading a checkpoint's tensors: GB a second, beside torch.save and torch.distributed.checkpoint.

    python scripts/bench_checkpoint.py                      # 2 GB on this machine's disk
    python scripts/bench_checkpoint.py --gb 16 --device cuda --folder /scratch

All three write the same fp32 tensors (weights and two moments, 64 MB each), and a save counts when its bytes
are on the disk (fsync). Ours hashes what it writes, and a load compares every hash; the others' loads compare
nothing. Medians of rounds in which they take turns; files that were written a moment ago are read from the
system's cache. `copy` is what a step waits for under `trainer.save_async`: the first time host memory is
taken, which a run does while it trains, then the copy alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.parts import Part
from ssmtrain.train.hold import Hold

ELEMENTS = 1 << 24
"""Of a tensor: 64 MB."""
Kinds = dict[str, dict[str, Tensor]]


def make(gigabytes: float, device: str) -> Kinds:
    """Weights and moments of about so many bytes, random."""
    count = max(1, round(gigabytes * 1e9 / (3 * 4 * ELEMENTS)))
    draw = torch.Generator(device).manual_seed(0)

    def tensor() -> Tensor:
        return torch.randn(ELEMENTS // 4096, 4096, device=device, generator=draw)

    names = [f"blocks.{i}.weight" for i in range(count)]
    moments = {f"{name}/{key}": tensor() for name in names for key in ("exp_avg", "exp_avg_sq")}
    return {"model": {name: tensor() for name in names}, "optim": moments}


def synced(path: Path) -> None:
    """Bring a file, or the files of a folder, to the disk."""
    for file in [path] if path.is_file() else path.rglob("*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def ours(kinds: Kinds, folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    """Save and verified load of the store."""

    def load() -> None:
        wrong = store.verify(folder / store.step_name(1))
        if wrong:
            sys.exit(f"ours: {wrong}")
        found = {kind: store.load_tensors(folder / store.step_name(1), kind) for kind in kinds}
        check(kinds, found)

    return lambda: store.save(folder, 1, kinds, {"step": 1}), load


def plain(kinds: Kinds, folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    """torch.save and torch.load."""
    file = folder / "plain.pt"

    def save() -> None:
        torch.save(kinds, file)
        synced(file)

    return save, lambda: check(kinds, torch.load(file, map_location="cpu", weights_only=True))


def distributed(kinds: Kinds, folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    """torch.distributed.checkpoint in one process."""
    place = folder / "dcp"

    def save() -> None:
        dcp.save(dict(kinds), checkpoint_id=place)
        synced(place)

    def load() -> None:
        found = {kind: {n: torch.empty(t.shape) for n, t in group.items()} for kind, group in kinds.items()}
        dcp.load(found, checkpoint_id=place)
        check(kinds, found)

    return save, load


def check(kinds: Kinds, found: Kinds) -> None:
    """End with a message unless what was loaded is, in a few of its numbers, what was saved."""
    for kind, group in kinds.items():
        for name, tensor in group.items():
            if not torch.equal(found[kind][name].reshape(-1)[::65536], tensor.cpu().reshape(-1)[::65536]):
                sys.exit(f"{kind} {name}: not what was saved")


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def copies(kinds: Kinds) -> list[float]:
    """Seconds of the first, and of the second copy to host memory."""
    hold = Hold()
    shares = {kind: {name: Part(tensor) for name, tensor in group.items()} for kind, group in kinds.items()}
    return [timed(lambda: hold.copy(shares)) for _ in range(2)]


def main() -> int:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.0, help="bytes of a checkpoint (default 2 GB)")
    parser.add_argument("--device", default="cpu", help="where the tensors lie (default cpu)")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument(
        "--folder", default=None, help="disk to write to (default the system's temporary one)"
    )
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed")
    kinds = make(options.gb, options.device)
    size = sum(tensor.nbytes for group in kinds.values() for tensor in group.values()) / 1e9
    seconds: dict[str, tuple[list[float], list[float]]] = {}
    for _ in range(options.rounds):
        for name, way in {"ours": ours, "torch.save": plain, "dcp": distributed}.items():
            folder = Path(tempfile.mkdtemp(prefix="bench-", dir=options.folder))
            try:
                save, load = way(kinds, folder)
                saves, loads = seconds.setdefault(name, ([], []))
                saves.append(timed(save))
                loads.append(timed(load))
            finally:
                shutil.rmtree(folder)
    results = {
        name: {"save": size / statistics.median(saves), "load": size / statistics.median(loads)}
        for name, (saves, loads) in seconds.items()
    }
    first, again = copies(kinds)
    print(f"{size:.1f} GB of fp32 tensors on {options.device}, {options.rounds} rounds")
    for name, found in results.items():
        print(f"{name:12s} save {found['save']:6.2f} GB/s   load {found['load']:6.2f} GB/s")
    print(f"copy for an asynchronous save: {first:.2f} s the first time, then {again:.2f} s")
    if options.json:
        page = {"gb": size, "device": options.device, "ways": results, "copy_s": [first, again]}
        Path(options.json).write_text(json.dumps(page, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
