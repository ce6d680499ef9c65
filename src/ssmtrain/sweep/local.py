"""`fit --multirun`: every combination of the line's choices, one after another, a process each, then a table.

CUDA and torch.distributed do not survive two trainings in one process, so each arm is `ssmtrain fit` again.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ssmtrain.config.arms import Arm, plan
from ssmtrain.config.errors import FINISHED, INTERRUPTED, UNFINISHED

if TYPE_CHECKING:
    from types import FrameType

    from ssmtrain.config.request import Request

STATUS = {
    0: "finished",
    2: "refused",
    3: "non-finite",
    4: "lost",
    5: "out of memory",
    75: "stopped",
    130: "interrupted",
}

COLUMNS = {
    "arm": "arm",
    "status": "status",
    "val_bpb": "bits/byte",
    "val_accuracy": "right",
    "val_row_accuracy": "rows right",
    "val_loss": "val loss",
    "params": "parameters",
    "tokens_per_s": "tokens/s",
    "steps": "steps",
    "seconds": "seconds",
}
"""What the table shows: key of a row -> heading; from val_bpb on they are keys of the runs' report.json."""

TEXT, TASK = ("val_bpb",), ("val_accuracy", "val_row_accuracy")
"""Columns for runs on text, and for those on a task."""


def command(request: Request) -> int:
    """Run all arms of a `fit … --multirun` line; 0 only when every arm finished."""
    arms = plan(request.overrides)
    codes: list[int] = []
    with _forwarding() as children:
        for number, arm in enumerate(arms, 1):
            print(f"[{number}/{len(arms)}] {' '.join(arm.choices)}", file=sys.stderr, flush=True)
            codes.append(children.run([sys.executable, "-m", "ssmtrain", "fit", *arm.line], request.as_json))
            if children.stopped or codes[-1] in (UNFINISHED, INTERRUPTED):
                break
    rows = [row(arm, code) for arm, code in itertools.zip_longest(arms, codes)]
    print(json.dumps(rows, indent=2) if request.as_json else "\n".join(table(rows)))
    if len(codes) < len(arms) or codes[-1] in (UNFINISHED, INTERRUPTED):
        print("stopped; the same line goes on where it stopped", file=sys.stderr)
        return codes[-1] if codes[-1] == INTERRUPTED else UNFINISHED
    return next((code for code in codes if code != FINISHED), FINISHED)


class _Children:
    """Starts one process at a time and hands it the signals that this one gets."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.stopped = False

    def run(self, line: Sequence[str], quiet: bool) -> int:
        """Run a command to its end; returns its exit code, 128 + n for one killed by signal n."""
        # A group of its own: the terminal's Ctrl-C comes once, through this process.
        self.child = subprocess.Popen(line, stdout=sys.stderr if quiet else None, process_group=0)
        code = self.child.wait()
        self.child = None
        return code if code >= 0 else 128 - code

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember to stop after this arm, and tell it."""
        self.stopped = True
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)


@contextmanager
def _forwarding() -> Iterator[_Children]:
    children = _Children()
    before = {n: signal.signal(n, children.handle) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield children
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def row(arm: Arm, code: int | None) -> dict[str, Any]:
    """One arm's line of the table, from its exit code and its run's report."""
    try:
        report = json.loads((arm.folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = {}
    status = "not started" if code is None else STATUS.get(code, f"failed (exit {code})")
    # A report of an earlier start says nothing about an arm that failed now.
    known = report if code == FINISHED and isinstance(report, dict) else {}
    figures = {key: known.get(key) for key in list(COLUMNS)[2:]}
    return {"arm": arm.name, "choices": list(arm.choices), "status": status, "exit": code, **figures}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as an aligned table, best validation first where there is one."""
    texts, tasks = (any(one.get(keys[0]) is not None for one in rows) for keys in (TEXT, TASK))
    hidden = () if texts and tasks else TEXT if tasks else TASK
    columns = [key for key in COLUMNS if key not in hidden]
    by = "val_bpb" if texts else "val_loss"
    ordered = sorted(rows, key=lambda one: (one[by] is None, one[by] or 0.0))
    cells = [[COLUMNS[key] for key in columns]]
    cells += [[_cell(key, one.get(key)) for key in columns] for one in ordered]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = []
    for line in cells:
        left = [text.ljust(width) for text, width in zip(line[:2], widths)]
        right = [text.rjust(width) for text, width in zip(line[2:], widths[2:])]
        lines.append("  ".join([*left, *right]).rstrip())
    return lines


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if key in TASK:
            return f"{100 * value:.2f} %"
        return f"{value:.4f}" if key.startswith("val") else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
