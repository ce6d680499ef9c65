"""`runs ls`: a table of the runs in a folder, the arms of a multirun under its name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.runs.find import RUNS_DIR, known, named, under
from ssmtrain.runs.folder import STATES, Seen, look
from ssmtrain.runs.words import ago, number, plain, size, speed, table

if TYPE_CHECKING:
    from ssmtrain.config.request import Request

HEAD = ("run", "state", "step", "loss", "val bits/byte", "tokens/s", "last change", "size")

ORDERS: dict[str, Callable[[Seen], Any]] = {
    "name": lambda run: run.name.split("/"),
    "state": lambda run: STATES.index(run.state),
    "step": lambda run: -run.step,
    "loss": lambda run: _first(run.loss),
    "val": lambda run: _first(run.val_bpb if run.val_bpb is not None else run.val_loss),
    "speed": lambda run: _first(-run.tokens_per_s if run.tokens_per_s is not None else None),
    "changed": lambda run: -run.changed,
    "size": lambda run: -run.size,
}
"""What sort= takes -> the order: best, fastest, newest or largest first."""


def command(request: Request) -> int:
    """Print the runs under runs_dir, or those that the line names."""
    runs_dir = Path(request.words.get("runs_dir", RUNS_DIR))
    order = request.words.get("sort", "name")
    if order not in ORDERS:
        raise UserError(f"sort={order}: expected one of {', '.join(ORDERS)}")
    folders = named(request.overrides, runs_dir) if request.overrides else under(runs_dir)
    runs = sorted((look(folder, runs_dir) for folder in folders), key=ORDERS[order])
    if request.as_json:
        print(json.dumps([as_json(run) for run in runs], indent=2))
    elif runs:
        print("\n".join(lines(runs, nested=order == "name", now=time.time())))
    else:
        print(known(runs_dir))
    return FINISHED


def as_json(run: Seen) -> dict[str, Any]:
    """A run as plain figures."""
    return {**asdict(run), "folder": str(run.folder), "progress": run.progress}


def lines(runs: Sequence[Seen], nested: bool, now: float) -> list[str]:
    """The table, and for whom the ranks of those that stalled waited.

    `nested` puts arms below the name of their multirun, and needs the order of names.
    """
    rows: list[tuple[str, ...]] = [HEAD]
    above = ""
    for run in runs:
        parent, _, arm = run.name.partition("/") if nested and run.name.count("/") == 1 else ("", "", "")
        if parent and parent != above and not any(other.name == parent for other in runs):
            rows.append((f"{plain(parent)}/", *[""] * (len(HEAD) - 1)))
        above = parent
        rows.append(_row(run, f"  {arm}" if parent else run.name, now))
    return table(rows, left=2) + [
        f"{plain(run.name)} stalled: {plain(run.why)}" for run in runs if run.state == "stalled"
    ]


def _row(run: Seen, name: str, now: float) -> tuple[str, ...]:
    step = f"{run.step:,}/{run.max_steps:,}" if run.max_steps else f"{run.step:,}"
    if not run.max_steps and run.progress is not None:
        step += f" ({100 * run.progress:.0f} %)"
    return (
        plain(name),
        run.state,
        step,
        number(run.loss),
        number(run.val_bpb),
        speed(run.tokens_per_s),
        ago(now - run.changed),
        size(run.size),
    )


def _first(value: float | None) -> tuple[bool, float]:
    return value is None, value or 0.0
