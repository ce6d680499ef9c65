"""What a run has recorded, read once from beginning to end and thinned on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ssmtrain.report.thin import Thinned
from ssmtrain.runs.folder import METRICS, Seen, figure, goodput, json_of, look, page_of
from ssmtrain.runs.lines import Record, records
from ssmtrain.runs.words import plain

MOST_CURVES = 300
"""Curves of one run; a file from a stranger could name a new one in every line."""
MOST_SAMPLES = 4
"""Samples kept from the beginning, and from the end."""
LONGEST_SAMPLE = 4000

CURVED = ("train", "val", "health", "check")
"""Kinds of records whose figures are curves."""
APART = {"kind", "step", "tokens", "seconds", "time", "labels"}
"""Keys of records that are no curve."""


@dataclass
class Told:
    """A run as the report tells it."""

    run: Seen
    page: dict[str, Any]
    report: dict[str, Any]
    """report.json of a finished run."""
    goodput: dict[str, Any] | None
    curves: dict[str, Thinned] = field(default_factory=dict)
    """By name: the record's kind and the path of the figure in it, as in health.grad_norm.norm."""
    samples: list[tuple[int, str]] = field(default_factory=list)
    """(step, text): the earliest and the latest."""
    skipped: int = 0
    """Steps that were skipped as not finite."""
    seconds: float | None = None
    """Of all its starts."""
    flops_per_token: int | None = None
    params: int | None = None


def gather(
    folder: Path, runs_dir: Path, buckets: int, count: Callable[[Path], tuple[int, int] | None]
) -> Told:
    """Read a run; `count` gives its parameters and FLOPs per token, or None where its config is not known."""
    report = json_of(folder / "report.json")
    told = Told(look(folder, runs_dir), page_of(folder), report, goodput(folder))
    clock: dict[str, float] = {"tokens": 0.0, "seconds": 0.0}
    early: list[tuple[int, str]] = []
    late: list[tuple[int, str]] = []
    for record in records(folder / METRICS):
        kind, step = record.get("kind"), record.get("step")
        if type(step) is not int:
            continue
        for key in clock:
            clock[key] = clock[key] if (value := figure(record.get(key))) is None else value
        if kind == "skip":
            told.skipped += 1
        elif kind == "sample":
            text = str(record.get("text", ""))[:LONGEST_SAMPLE]
            (early if len(early) < MOST_SAMPLES else late).append((step, text))
            late = late[-MOST_SAMPLES:]
        elif kind in CURVED:
            _curves(told.curves, str(kind), record, (float(step), clock["tokens"], clock["seconds"]), buckets)
    final = _final_sample(folder / "report.md")[:LONGEST_SAMPLE]
    found = [*early, *late, *([(told.run.step, final)] if final else [])]
    told.samples = [(step, "\n".join(map(plain, text.splitlines()))) for step, text in found]
    told.seconds = (told.goodput or {}).get("seconds") or clock["seconds"] or None
    counted = count(folder)
    if counted is not None:
        told.params, told.flops_per_token = counted
    return told


def leaves(record: Record, path: str = "") -> Iterator[tuple[str, float]]:
    """Every (path, finite number) of a record, nested ones with dots."""
    for key, value in record.items():
        if not path and key in APART:
            continue
        shown = _clean(key)
        where = f"{path}.{shown}" if path else shown
        if isinstance(value, dict) and where.count(".") < 4:
            yield from leaves(value, where)
        elif (number := figure(value)) is not None:
            yield where, number


@lru_cache(4096)
def _clean(key: str) -> str:
    """A key as part of a chart's text; the same few come in every record."""
    return plain(key)


def _curves(
    curves: dict[str, Thinned], kind: str, record: Record, at: tuple[float, float, float], buckets: int
) -> None:
    for key, value in leaves(record):
        name = f"{kind}.{key}"
        curve = curves.get(name)
        if curve is None:
            if len(curves) >= MOST_CURVES:
                continue
            curve = curves[name] = Thinned(buckets)
        curve.add((*at, value))


def _final_sample(path: Path) -> str:
    """The sample at the end of a finished run, out of its report.md."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(2**20)
    except OSError:
        return ""
    section = text.partition("\n## Sample\n")[2].partition("\n## ")[0]
    return "\n".join(line[2:] for line in section.splitlines() if line.startswith("> "))
