"""The loss curve: read from metrics.jsonl, as a picture and as a few lines of text."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

from ssmtrain.checkpoint.durable import replace_file
from ssmtrain.report.plot import figure as empty

log = logging.getLogger(__name__)

Points = list[tuple[int, float]]
"""(step, bits per byte)."""

TEXT, TASK = "bits per byte", "nats an answer"
"""What the curves of texts and tasks are measured in."""

RAMP = " ▁▂▃▄▅▆▇█"


def read(path: Path) -> tuple[Points, Points]:
    """The training and validation curves of a metrics.jsonl, in bits per byte; of a task in nats."""
    found: dict[str, Points] = {"train": [], "val": []}
    for record in _records(path):
        kind, bpb = record.get("kind"), record.get("bpb", record.get("loss"))
        step = record.get("step")
        if kind in found and isinstance(step, int) and isinstance(bpb, (int, float)) and math.isfinite(bpb):
            found[kind].append((step, float(bpb)))
    return found["train"], found["val"]


def read_sets(path: Path) -> dict[str, Points]:
    """The validation curve of each set of a metrics.jsonl that has several, in bits per byte; of tasks in
    nats."""
    found: dict[str, Points] = {}
    for record in _records(path):
        for name, one in sets_of(record).items():
            found.setdefault(name, []).append((record["step"], float(one.get("bpb", one["loss"]))))
    return found


def sets_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of each set in a validation record, those that are finite."""
    if record.get("kind") != "val":
        return {}
    sets = {name: one for name, one in record.items() if isinstance(one, dict)}
    figures = {name: one.get("bpb", one.get("loss")) for name, one in sets.items()}
    return {name: sets[name] for name, figure in figures.items() if isinstance(figure, (int, float))}


def last_loss(path: Path) -> float | None:
    """The latest training loss in a metrics.jsonl, nats per token."""
    losses = [record.get("loss") for record in _records(path) if record.get("kind") == "train"]
    return losses[-1] if losses else None


def draw(values: list[float], width: int = 64, height: int = 4, unit: str = TEXT) -> list[str]:
    """A curve of block characters, `height` lines high, its largest and smallest value beside it."""
    if len(values) < 2:
        return []
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    levels = [round((m - low) / ((high - low) or 1.0) * (8 * height - 1)) + 1 for m in means]
    rows = []
    for row in reversed(range(height)):
        bar = "".join(RAMP[min(8, max(0, level - 8 * row))] for level in levels)
        side = f"{high:5.2f}" if row == height - 1 else f"{low:5.2f}" if row == 0 else " " * 5
        rows.append(f"{side} {bar}")
    rows[0] += f"  {unit}, training"
    return rows


def picture(
    path: Path,
    train: Points,
    val: Points,
    marks: dict[str, float],
    unit: str = TEXT,
    sets: dict[str, Points] | None = None,
) -> bool:
    """Write the curve as a PNG with the yardsticks as lines; False, with a warning, when that fails."""
    try:
        figure = empty(8, 4.5)
        axes = figure.add_subplot()
        if train:
            axes.plot(*zip(*train), lw=1, label="training")
        if val:
            axes.plot(*zip(*val), "o-", ms=4, label="validation")
        for name, points in (sets or {}).items():
            axes.plot(*zip(*points), ".--", lw=0.8, ms=3, label=name)
        for name, bits in marks.items():
            axes.axhline(bits, lw=0.8, ls="--", color="grey")
            axes.annotate(
                name, (1.0, bits), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey"
            )
        axes.set(xlabel="step", ylabel=unit)
        if train or val:
            axes.legend(loc="upper right")
        axes.grid(alpha=0.2)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=120)
        replace_file(path, drawn.getvalue())
    except Exception as error:  # fonts, a full disk, a matplotlib without its parts: no reason to lose a run
        log.warning("no picture of the loss: %s", error)
        return False
    return True


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON objects; a line cut short by a crash is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]
