"""Training over several devices through the real command line: tokens a second, scaling, peak memory.

    python scripts/bench_parallel.py                               # two GPUs, 1.3 B, each strategy
    python scripts/bench_parallel.py mamba2_1b3 --ways one ddp fsdp fsdp:parallel.reshard=false
    python scripts/bench_parallel.py mamba2_1b3 --rows 4 --words trainer.compile=true

Each way is a run of `ssmtrain fit` of the same rows per device (weak scaling), ended once its steps are
measured; `one` is the same on one device. Speed is the median over the steps after the first few, scaling the
tokens a second of a device beside those of `one`. A way is a `parallel=` page, with words of its own after
colons.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RECIPES = ["mamba2_1b3", "granite_9to1_1b3"]
WAYS = ["one", "ddp", "fsdp"]
WARM = 5
"""Steps that are not measured."""


@dataclass
class Result:
    """What a way took."""

    recipe: str
    way: str
    devices: int
    tokens_s: float | None = None
    scaling: float | None = None
    peak_gb: float | None = None
    first_s: float | None = None
    """From the command to the first finished step."""
    loss: float | None = None
    note: str = ""


def words_of(way: str, devices: int) -> tuple[int, list[str]]:
    """Devices and words of a way."""
    kind, *words = way.split(":")
    return (1, words) if kind == "one" else (devices, [f"parallel={kind}", *words])


def measure(recipe: str, way: str, options: argparse.Namespace, folder: Path) -> Result:
    """Run fit until enough steps are on record, and end it."""
    devices, words = words_of(way, options.devices)
    found = Result(recipe, way, devices)
    share = options.rows * options.length
    quiet = ["trainer.val_every=100000", "trainer.sample_every=0", "trainer.save_every=100000"]
    command = [
        *(sys.executable, "-m", "ssmtrain", "fit", f"config={recipe}", "name=bench", f"runs_dir={folder}"),
        *(f"trainer.devices={devices}", f"trainer.global_batch={share * devices}"),
        *(f"trainer.micro_batch={options.rows}", f"data.seq_len={options.length}", "trainer.log_every=1"),
        *("trainer.recompute=ops", *quiet, *words, *options.words),
    ]
    log = folder / "log.txt"
    begin = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    records: list[dict[str, Any]] = []
    try:
        while len(records) < WARM + options.steps:
            time.sleep(0.5)
            if process.poll() is not None or time.monotonic() - begin > options.seconds:
                found.note = " ".join(log.read_text(errors="replace").split("\n")[-4:])[-300:] or "too slow"
                return found
            records = trained(folder / "bench" / "metrics.jsonl")
            if records and found.first_s is None:
                found.first_s = time.monotonic() - begin
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    measured = records[WARM:]
    found.tokens_s = statistics.median(record["tokens_per_s"] for record in measured)
    found.loss = measured[options.steps - 1]["loss"]
    found.peak_gb = max((record.get("memory_gb", 0.0) for record in records), default=0.0) or None
    return found


def trained(metrics: Path) -> list[dict[str, Any]]:
    """The whole train records of a run so far."""
    if not metrics.exists():
        return []
    lines = metrics.read_text().split("\n")[:-1]
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def table(results: list[Result]) -> list[str]:
    """The results for a reader."""
    head = f"{'recipe':18s} {'way':28s} {'devices':>7s} {'tokens/s':>9s} {'scaling':>8s} {'GB':>6s}"
    lines = [f"{head} {'first step s':>12s} {'loss':>9s}"]
    for one in results:
        figures = (one.tokens_s, one.scaling, one.peak_gb, one.first_s, one.loss)
        forms = ("9,.0f", "8.3f", "6.1f", "12.1f", "9.5f")
        widths = (9, 8, 6, 12, 9)
        cells = [
            format(value, form) if value is not None else "-".rjust(width)
            for value, form, width in zip(figures, forms, widths, strict=True)
        ]
        lines.append(f"{one.recipe:18s} {one.way:28s} {one.devices:7d} {' '.join(cells)} {one.note}".rstrip())
    return lines


def main() -> int:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", default=RECIPES, help=f"recipes (default {' '.join(RECIPES)})")
    parser.add_argument("--ways", nargs="+", default=WAYS, help=f"parallel= pages (default {' '.join(WAYS)})")
    parser.add_argument("--devices", type=int, default=2, help="devices (default 2)")
    parser.add_argument("--rows", type=int, default=8, help="of a device and step (default 8)")
    parser.add_argument("--length", type=int, default=2048, help="of a row (default 2048)")
    parser.add_argument("--steps", type=int, default=15, help=f"measured, after {WARM} more (default 15)")
    parser.add_argument("--seconds", type=float, default=300, help="a way may take (default 300)")
    parser.add_argument("--words", nargs="*", default=[], help="overrides of the recipes")
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()
    results: list[Result] = []
    for recipe in options.recipes:
        for way in options.ways:
            with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
                found = measure(recipe, way, options, Path(folder))
            one = next((r for r in results if (r.recipe, r.devices) == (recipe, 1) and r.tokens_s), None)
            if one is not None and one.tokens_s and found.tokens_s:
                found.scaling = found.tokens_s / found.devices / one.tokens_s
            results.append(found)
            print(table([found])[-1], flush=True)
    print("", *table(results), sep="\n")
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(one) for one in results], indent=2))
    return 1 if any(one.note for one in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
