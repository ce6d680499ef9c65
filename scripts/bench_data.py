"""Preparing data: MB of text a second, beside the tokenizers library, and reading rows: tokens a second.

    python scripts/bench_data.py                                        # 256 MB of the embedded novels
    python scripts/bench_data.py --folder linux-source-6.1 --cores 2    # a source tree, every file of it

`bytes` and `bpe` are `ssmtrain prepare` from the files to shards on the disk, in a process of its own, its
imports not counted. `encode_batch` is the tokenizers library alone on the same text in memory, with the
same cores and nothing written. Rounds take turns; medians are printed, and CPU time beside them, which other
programs of the machine disturb less. `rows` reads batches of rows in a run's order from mapped shards, in one
process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS, LENGTH = 16, 2048


def page(folder: str, cache: str, tokenizer: str | None) -> Any:
    """The page of a run that reads a folder."""
    from ssmtrain.config.data import BytesTokenizer, FileTokenizer, TextData
    from ssmtrain.config.schema import RunConfig

    data = TextData(train=folder, include=["**"], skip_bad=True, cache_dir=cache, seq_len=LENGTH)
    reader = FileTokenizer(path=tokenizer) if tokenizer else BytesTokenizer()
    return RunConfig.model_construct(seed=0, data=data, tokenizer=reader)


def prepare(folder: str, tokenizer: str | None, cores: int) -> dict[str, float]:
    """Prepare a folder from nothing."""
    from ssmtrain.data.prepare import prepare as make

    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as cache:
        config = page(folder, cache, tokenizer)
        began, spent = time.perf_counter(), cpu()
        made = make(config, workers=cores)
        seconds, spent = time.perf_counter() - began, cpu() - spent
        size = sum(split.bytes for split in made.manifest.splits.values())
        peak = max(
            resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        return {"seconds": seconds, "cpu": spent, "megabytes": size / 1e6, "peak_gb": peak / 1e6}


def encode_batch(folder: str, tokenizer: str | None, cores: int) -> dict[str, float]:
    """The library alone, offsets included as it gives them by default."""
    from tokenizers import Tokenizer

    texts = read(folder)
    backend = Tokenizer.from_file(tokenizer)
    backend.encode_special_tokens = True
    began, spent = time.perf_counter(), cpu()
    for start in range(0, len(texts), 512):
        backend.encode_batch(texts[start : start + 512], add_special_tokens=False)
    seconds, spent = time.perf_counter() - began, cpu() - spent
    return {"seconds": seconds, "cpu": spent, "megabytes": sum(len(t.encode()) for t in texts) / 1e6}


def rows(folder: str, tokenizer: str | None, cores: int) -> dict[str, float]:
    """Batches of rows in a run's order."""
    from ssmtrain.data.module import Rows
    from ssmtrain.data.prepare import prepare as make

    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as cache:
        made = make(page(folder, cache, tokenizer), workers=cores)
        read_rows = Rows(made.stream("train"), LENGTH, 0, made.manifest.eot)
        batches = max(1, min(2000, read_rows.per_epoch // ROWS))
        began, spent = time.perf_counter(), cpu()
        for i in range(batches):
            read_rows.batch(range(i * ROWS, (i + 1) * ROWS))
            read_rows.ahead(range((i + 1) * ROWS, (i + 2) * ROWS))
        seconds, spent = time.perf_counter() - began, cpu() - spent
        return {"seconds": seconds, "cpu": spent, "megabytes": batches * ROWS * LENGTH / 1e6}


def read(folder: str) -> list[str]:
    """The texts of a folder."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    out = []
    for path in paths:
        try:
            out.append(path.read_bytes().decode())
        except UnicodeDecodeError:
            continue
    return out


def cpu() -> float:
    """Seconds of CPU time of this process and those it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def novels(folder: Path, megabytes: int) -> None:
    """Files of the embedded novels, 64 KiB each, until there are so many megabytes."""
    from ssmtrain.config.data import EmbeddedData
    from ssmtrain.data.sources import split_text

    text = split_text(EmbeddedData(), "train")
    for i in range(megabytes * 16):
        at = i * 65536 % (len(text) - 65536)
        (folder / f"{i:06d}.txt").write_bytes(text[at : at + 65536])


def sample(folder: Path, into: Path, size: int) -> None:
    """Every so many-th file of a folder, about `size` bytes of them."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    every = max(1, sum(p.stat().st_size for p in paths) // size)
    for i, path in enumerate(paths[::every]):
        shutil.copyfile(path, into / f"{i:06d}.txt")


def train(folder: Path, vocab: int) -> str:
    """A tokenizer for a folder."""
    from ssmtrain.config.data import BpeTokenizer
    from ssmtrain.data.bpe import trained

    config = page(str(folder), str(folder.parent / "bpe"), None)
    return str(trained(BpeTokenizer(vocab_size=vocab), config.data))


STAGES = {"bytes": prepare, "bpe": prepare, "encode_batch": encode_batch, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="text to prepare; absent: the embedded novels")
    parser.add_argument("--megabytes", type=int, default=256, help="of the novels")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--sample", type=int, default=64, help="MB that the tokenizers are compared on")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--scratch", help="where shards are written")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, folder, tokenizer = args.one
        print(json.dumps(STAGES[name](folder, tokenizer or None, args.cores)))
        return
    stages = args.stages.split(",")
    with tempfile.TemporaryDirectory(dir=args.scratch) as made:
        root = Path(made)
        whole, few = args.folder or root / "text", root / "few"
        few.mkdir()
        if args.folder is None:
            whole.mkdir()
            novels(whole, args.megabytes)
        tokenizer = ""
        if {"bpe", "encode_batch"} & set(stages):
            sample(whole, few, args.sample * 10**6)
            tokenizer = train(few, args.vocab)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in stages}
        for _ in range(args.rounds):
            for name in stages:
                short = name in ("bpe", "encode_batch")
                argv = [name, str(few if short else whole.absolute()), tokenizer if short else ""]
                environment = os.environ | {"RAYON_NUM_THREADS": str(args.cores), "OMP_NUM_THREADS": "1"}
                out = subprocess.run(
                    [sys.executable, __file__, "--cores", str(args.cores), "--one", *argv],
                    env=environment, check=True, capture_output=True, text=True,
                )  # fmt: skip
                found[name].append(json.loads(out.stdout.splitlines()[-1]))
                print(f"{name}: {out.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
        tell(found)


def tell(found: dict[str, list[dict[str, float]]]) -> None:
    """Print medians."""
    for name, rounds in found.items():
        middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        unit = "million tokens" if name == "rows" else "MB"
        peak = f", peak memory {middle['peak_gb']:.2f} GB" if "peak_gb" in middle else ""
        print(
            f"{name:14} {middle['megabytes']:,.0f} {unit} in {middle['seconds']:.1f} s: "
            f"{middle['megabytes'] / middle['seconds']:,.1f} a second; CPU {middle['cpu']:.1f} s: "
            f"{middle['megabytes'] / middle['cpu']:,.1f} a CPU second{peak}"
        )


if __name__ == "__main__":
    main()
