"""Ranks that watch each other: where one stands still, the others say which and where, and the run ends.

Every rank's watcher, a thread, leaves a beat in the run folder every few seconds: how far its rank is, and in
which line of ours. A rank that is stopped or whose machine is gone leaves none; one that hangs leaves the
same ones. Without this the others would wait in a collective for half an hour, and end without a name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

HOME = str(Path(__file__).parents[1])
OWN = Path(__file__).name


@dataclass
class Beat:
    """What a rank says of itself."""

    rank: int
    host: str
    process: int
    count: int
    """Of its beats: a new one is another even where nothing else has changed."""
    step: int
    forwards: int
    """Forward passes, those of validations and samples included."""
    place: str
    """File, line and function of ours that it is in."""

    @property
    def progress(self) -> tuple[int, int]:
        """What grows while a rank gets on."""
        return self.step, self.forwards


class Watcher:
    """One rank's thread; `progress` says (step, forward passes), `end` is called with what is to be said."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        limit: float,
        progress: Callable[[], tuple[int, int]],
        end: Callable[[str], None],
    ) -> None:
        self.folder, self.rank, self.world, self.limit = folder, rank, world, limit
        self.progress, self.end = progress, end
        self.count = 0
        self.seen: dict[int, tuple[Beat, float, float]] = {}
        """By rank: the latest beat, when it came, when its progress last changed; by this process's clock."""
        self.main = threading.main_thread().ident
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="ssmtrain-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self.folder.mkdir(exist_ok=True)
        self._leave()  # who hangs in the first seconds has a name too
        self.thread.start()

    def stop(self) -> None:
        """Watch no more, and take the own beat away."""
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join()
        with contextlib.suppress(OSError):
            self._file(self.rank).unlink()
            self.folder.rmdir()  # the last one does

    def look(self, now: float) -> str | None:
        """Leave a beat, read the others'; what is to be said when this rank got no further for the limit."""
        self._leave()
        for rank in range(self.world):
            with contextlib.suppress(OSError, ValueError, TypeError):
                self._note(Beat(**json.loads(self._file(rank).read_bytes())), now)
        own = self.seen.get(self.rank)
        if own is None or now - own[2] < self.limit:
            return None
        return self._verdict(now)

    def _run(self) -> None:
        while not self.stopped.wait(min(5.0, self.limit / 4)):
            said = self.look(time.monotonic())
            if said is not None:
                self.end(said)
                return

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _leave(self) -> None:
        self.count += 1
        step, forwards = self.progress()
        frame = sys._current_frames().get(self.main or 0)
        beat = Beat(self.rank, socket.gethostname(), os.getpid(), self.count, step, forwards, place(frame))
        draft = self._file(self.rank).with_suffix(".draft")
        with contextlib.suppress(OSError):  # a disk that is full is told by the saves
            draft.write_text(json.dumps(asdict(beat)))
            os.replace(draft, self._file(self.rank))
        self._note(beat, time.monotonic())

    def _note(self, beat: Beat, now: float) -> None:
        before = self.seen.get(beat.rank)
        if before is None or before[0].process != beat.process:
            self.seen[beat.rank] = (beat, now, now)
        elif before[0].count != beat.count:
            changed = now if before[0].progress != beat.progress else before[2]
            self.seen[beat.rank] = (beat, now, changed)

    def _verdict(self, now: float) -> str:
        """Which rank the others wait for: one not heard of, else the one that is least far."""
        lines = [f"no rank got further for {self.limit:g} s"]
        missing = [rank for rank in range(self.world) if rank not in self.seen]
        silent = {r: now - heard for r, (_, heard, _) in self.seen.items() if now - heard > self.limit / 2}
        least = min(beat.progress for beat, _, _ in self.seen.values())
        behind = [r for r, (beat, _, _) in self.seen.items() if beat.progress == least]
        for rank in missing:
            lines.append(f"rank {rank} was never heard of")
        for rank, seconds in sorted(silent.items()):
            lines.append(f"{self._who(rank)} has not been heard of for {seconds:.0f} s; {self._where(rank)}")
        if not (missing or silent):
            together = len(behind) == self.world
            # Of ranks equally far those that wait for a message are not the ones that are waited for.
            behind = [rank for rank in behind if not self._waits(rank)] or behind
            for rank in sorted(behind):
                what = "stands" if together else "is behind the others"
                lines.append(f"{self._who(rank)} {what}; {self._where(rank)}")
        waiting = [r for r in sorted(self.seen) if r not in silent and (r not in behind or silent or missing)]
        lines += [f"rank {r} waits; {self._where(r)}" for r in waiting[:3]]
        return "\n       ".join(lines)

    def _who(self, rank: int) -> str:
        beat = self.seen[rank][0]
        return f"rank {rank} (process {beat.process} on {beat.host})"

    def _waits(self, rank: int) -> bool:
        return self.seen[rank][0].place.startswith("parallel/ranks.py:")

    def _where(self, rank: int) -> str:
        beat = self.seen[rank][0]
        return f"after step {beat.step}, in {beat.place}"


def culprits(said: str) -> str:
    """Of a verdict the ranks that the others wait for, and where they are, in one line."""
    lines = [line.strip() for line in said.splitlines()[1:]]
    return "; ".join(line for line in lines if not re.match(r"rank [0-9]+ waits;", line))[:300]


def place(frame: FrameType | None) -> str:
    """The innermost line of ours on a stack: file:line function."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(HOME) and Path(file).name != OWN:
            return f"{file[len(HOME) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "no line of ours"
