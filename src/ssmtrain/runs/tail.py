"""`runs tail`: a run watched from another process: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.config.errors import FINISHED, INTERRUPTED, UserError
from ssmtrain.runs.find import RUNS_DIR, one
from ssmtrain.runs.folder import METRICS, figure, limits, look, state_of, whole
from ssmtrain.runs.lines import Follower, Record
from ssmtrain.runs.show import next_commands
from ssmtrain.runs.words import number, plain, record_line, speed
from ssmtrain.train.callbacks.words import duration, si

if TYPE_CHECKING:
    from ssmtrain.config.request import Request

PAUSE = 0.5
"""Seconds between looks at the file."""
LINES = 10
RAMP = "▁▂▃▄▅▆▇█"
WIDTH = 60
"""Losses in the live view's curve."""


def command(request: Request) -> int:
    """Follow a run to its end; exit 130 at Ctrl-C, which the run does not notice."""
    runs_dir = Path(request.words.get("runs_dir", RUNS_DIR))
    folder = one(request.overrides, runs_dir, "runs tail")
    text = request.words.get("lines", str(LINES))
    if not text.isdigit() or not int(text):
        raise UserError(f"lines={text}: expected how many lines of the past to show, as in lines=20")
    follower = Follower(folder / METRICS)
    view = Live(folder, int(text)) if sys.stdout.isatty() else Plain()
    try:
        follow(folder, follower, view, int(text))
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        follower.close()
        view.close()
    run = look(folder, runs_dir)
    why = f" ({run.why})" if run.why else ""
    what, line = next_commands(run)[0]
    print(plain(f"{run.name}: {run.state}{why} at step {run.step:,}; {what}: {line}"))
    return FINISHED


def follow(folder: Path, follower: Follower, view: Plain | Live, past: int) -> None:
    """Show the last `past` records and each one that comes, until the run has ended."""
    found = follower.read(last=max(past, WIDTH))
    view.show(found, past)
    while state_of(folder)[0] == "running":
        time.sleep(PAUSE)
        found = follower.read()
        view.show(found, len(found))
    found = follower.read()
    view.show(found, len(found))


class Plain:
    """Prints a line for each record, as the run itself does."""

    def show(self, records: list[Record], last: int) -> None:
        """Print the last so many of the records that have a line."""
        lines = [line for record in records if (line := record_line(record)) is not None]
        for line in lines[max(0, len(lines) - last) :]:
            print(line, flush=True)

    def close(self) -> None:
        """Nothing is open."""


class Live:
    """A few lines at the bottom of the terminal that change, other records scrolling above them."""

    def __init__(self, folder: Path, height: int) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self.folder, self.height = folder, height
        self.goals = limits(folder)
        self.losses: deque[float] = deque(maxlen=WIDTH)
        self.train: Record = {}
        self.val: Record = {}
        self.live = RichLive(console=Console(), auto_refresh=False, transient=True)
        self.live.start()

    def show(self, records: list[Record], last: int) -> None:
        """Take training records into the view and print the others above it."""
        for record in records:
            if record.get("kind") == "train":
                self.train = record
                if (loss := figure(record.get("loss"))) is not None:
                    self.losses.append(loss)
                continue
            if record.get("kind") == "val":
                self.val = record
            if (line := record_line(record)) is not None:
                self.live.console.print(line, markup=False, highlight=False)
        self.live.update(self._picture(), refresh=True)

    def close(self) -> None:
        """Leave the terminal as it was, the last figures on it."""
        self.live.stop()
        if (line := record_line(self.train)) is not None:
            self.live.console.print(line, markup=False, highlight=False)

    def _picture(self) -> Any:
        from rich.text import Text

        return Text("\n".join(picture(self.folder.name, self.train, self.val, self.goals, self.losses)))


def picture(
    name: str,
    train: Record,
    val: Record,
    goals: tuple[int | None, int | None],
    losses: deque[float],
) -> list[str]:
    """The lines of the live view."""
    step, tokens = whole(train.get("step")), whole(train.get("tokens"))
    max_steps, max_tokens = goals
    share = step / max_steps if max_steps else tokens / max_tokens if max_tokens else 0.0
    share = min(1.0, share)
    bar = ("█" * round(30 * share)).ljust(30, "░")
    found = [
        f"{name}  step {step:,}{f'/{max_steps:,}' if max_steps else ''}  {si(tokens)} tokens",
        f"{bar} {100 * share:.1f} %{_left(train, share)}",
        f"loss {number(train.get('loss'))}  validation {number(val.get('bpb'))} bits/byte  "
        f"{speed(train.get('tokens_per_s'))} tokens/s",
    ]
    return [plain(line) for line in [*found, *([spark(list(losses))] if len(losses) > 1 else [])]]


def spark(values: list[float]) -> str:
    """Values as block characters, the lowest and the highest beside them."""
    low, high = min(values), max(values)
    scale = (len(RAMP) - 1) / ((high - low) or 1.0)
    return "".join(RAMP[round((one - low) * scale)] for one in values) + f"  {low:.3f} to {high:.3f}"


def _left(train: Record, share: float) -> str:
    seconds = figure(train.get("seconds"))
    return f"  {duration(seconds * (1.0 - share) / share)} left" if seconds and share else ""
