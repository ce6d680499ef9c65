"""What the user sees: a live bar on a terminal, plain lines elsewhere. Rank 0 only."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback

from ssmtrain.parallel import ranks
from ssmtrain.train.callbacks.words import duration, scored, si
from ssmtrain.train.curve import sets_of
from ssmtrain.train.journal import Record
from ssmtrain.train.module import LitLM

REFRESH = 0.25
"""Seconds between updates of the bar."""

ODD = {
    "spike": "left out: {why} ({row})",
    "rollback": "after step {after:,} the run went back to {to}, {rows_left_out:,} rows are left out: {why}",
    "micro_batch": "{rows:,} of {of:,} rows fit at a time",
}
"""What is said of records that few runs have, by kind."""


class Console(Callback):
    """Shows records as lines; on a terminal the train records are a bar that stays at the bottom."""

    def __init__(self) -> None:
        self.live: Any = None
        self.task: Any = None
        self.latest: Record = {}
        self.drawn = 0.0
        self.steps: tuple[int, float] = (0, 0.0)
        """Step and seconds at the start of this process, for the time that is left."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the bar on a terminal."""
        lit: LitLM = pl_module
        self.steps = (lit.state.step, lit.clock.elapsed)
        if ranks.rank() or not sys.stdout.isatty():
            return
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(24),
            TextColumn("{task.fields[text]}"),
        )
        self.live = Progress(*columns, auto_refresh=False, transient=True)
        self.task = self.live.add_task("", total=lit.horizon.last_step, completed=lit.state.step, text="")
        self.live.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Move the bar, a few times a second at most."""
        lit: LitLM = pl_module
        if self.live is None or time.monotonic() - self.drawn < REFRESH:
            return
        self.drawn = time.monotonic()
        text = "  ".join([*figures(self.latest), self.left(lit)])
        self.live.update(self.task, completed=lit.state.step, text=text, refresh=True)

    def left(self, lit: LitLM) -> str:
        """The time that is left, by the pace of this process, validations and saves included."""
        begin, since = self.steps
        if lit.state.step == begin:
            return ""
        left, seen = lit.horizon.left(lit.state.step)
        seconds = left * (lit.clock.elapsed - since) / (seen - lit.horizon.left(begin)[1])
        limit = lit.config.trainer.max_seconds
        if limit is not None:
            seconds = min(seconds, max(0.0, limit - lit.clock.elapsed))
        return f"{duration(seconds)} left"

    def write(self, record: Record) -> None:
        """Show a record: train records in the bar where there is one, everything else as a line."""
        kind = record["kind"]
        if kind == "train":
            self.latest = record
            if self.live is None:
                self.say(f"step {record['step']:>6,}  " + "  ".join(figures(record)))
        elif kind == "val":
            self.say(f"step {record['step']:>6,}  validation {scored(record)}")
            sets = sets_of(record)
            if "accuracy" in record:
                for name, one in sets.items():
                    self.say(f"{'':13}{name}: {scored(one)}")
            elif sets:
                each = [f"{name} {one['bpb']:.4f}" for name, one in sets.items()]
                self.say(f"{'':13}bits per byte of {', '.join(each)}")
            for length, found in record.get("lengths", {}).items():
                self.say(f"{'':13}rows of {length}: {scored(found)}")
        elif kind == "check":
            for name, found in record.items():
                if isinstance(found, dict):
                    self.say(f"step {record['step']:>6,}  check {name}: {scored(found)}")
        elif kind == "sample":
            self.say(f"step {record['step']:>6,}  sample: {record['text']}")
        elif kind == "skip":
            what, row = record["what"], record["row"]
            self.say(f"step {record['step']:>6,}  skipped: the {what} is not finite ({row})")

        elif kind in ODD:
            self.say(f"step {record['step']:>6,}  {ODD[kind].format(**record)}")

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.live is not None:
            self.live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self.live is not None:
            self.live.stop()
            self.live = None


def figures(record: Record) -> list[str]:
    """The figures of a train record as short words."""
    if not record:
        return []
    found = [
        f"loss {record['loss']:.4f}",
        *([f"{record['bpb']:.3f} bits/byte"] if "bpb" in record else []),
        f"lr {record['lr']:.2e}",
        f"{si(record['tokens_per_s'])} tokens/s",
    ]
    if "mfu" in record:
        found.append(f"MFU {100 * record['mfu']:.1f} %")
    return found
