"""attempts.jsonl: where the time of every start of a run went, and how much of it trained what was kept.

A start that is killed leaves its last line; what it did after that line is not known.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ssmtrain.checkpoint.durable import json_bytes, replace_file
from ssmtrain.config.errors import Stop
from ssmtrain.config.redact import redact
from ssmtrain.train.callbacks.words import duration
from ssmtrain.train.clock import Clock
from ssmtrain.train.journal import Record

FILE = "attempts.jsonl"
GOODPUT = "goodput.json"

PARTS = {
    "start": "start-up",
    "data": "waiting for data",
    "save": "saving",
    "val": "validation",
    "sample": "samples",
    "lost": "steps done again",
    "other": "other",
}
"""What is not productive -> in words."""


@dataclass(frozen=True)
class Attempt:
    """One start of the program on a run."""

    begin: int
    """Finished steps when it started."""
    step: int
    """Finished steps when it was last heard of."""
    time: dict[str, float]
    """Seconds by purpose, as Clock.split gives them."""
    since: float | None = None
    """When it started, in seconds since 1970; absent in the files of older versions."""
    end: str | None = None
    """How it ended: "finished", "stopped: …", "failed: …" or "stalled: …"; absent while it lives and when it
    was killed."""
    turned: bool = False
    """It goes on where the one before, in the same process, went back to a checkpoint."""


def account(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Seconds of all attempts by what they were for, and goodput: the share in steps that were kept.

    A step is lost when a later attempt began before it; it is taken to have cost the mean of its attempt.
    """
    spent = dict.fromkeys(("productive", *PARTS), 0.0)
    lost_steps = 0
    for number, attempt in enumerate(attempts):
        done = attempt.step - attempt.begin
        again = min((later.begin for later in attempts[number + 1 :]), default=attempt.step)
        lost = done - max(0, min(done, again - attempt.begin))
        kept = 1.0 - lost / done if done else 1.0
        lost_steps += lost
        for purpose, seconds in attempt.time.items():
            if purpose not in ("step", "data"):
                spent[purpose if purpose in spent else "other"] += seconds
        step, data = attempt.time.get("step", 0.0), attempt.time.get("data", 0.0)
        spent["productive"] += kept * step
        spent["data"] += kept * data
        spent["lost"] += (1.0 - kept) * (step + data)
    total = sum(spent.values())
    return {
        "goodput": spent["productive"] / total if total else 0.0,
        "attempts": sum(not attempt.turned for attempt in attempts),
        "lost_steps": lost_steps,
        "seconds": round(total, 3),
        "time": {purpose: round(seconds, 3) for purpose, seconds in spent.items()},
    }


def line(found: dict[str, Any]) -> str:
    """An account in one line."""
    total, time = found["seconds"] or 1.0, found["time"]
    rest = [f"{name} {100 * time[part] / total:.1f} %" for part, name in PARTS.items() if part != "lost"]
    if found["lost_steps"]:
        rest.insert(-1, f"{found['lost_steps']:,} {PARTS['lost']} {100 * time['lost'] / total:.1f} %")
    starts = "1 start" if found["attempts"] == 1 else f"{found['attempts']} starts"
    return f"goodput: {100 * found['goodput']:.1f} % of {duration(total)} in {starts}; {', '.join(rest)}"


class Attempts:
    """A sink that notes this attempt's time with every record; goodput.json has the account at its end."""

    def __init__(self, folder: Path, begin: int, clock: Clock) -> None:
        self.folder, self.begin, self.step, self.clock = folder, begin, begin, clock
        self.since = round(time.time() - clock.elapsed, 3)
        self.end: str | None = None
        """How this attempt ended, set before close."""
        self.past = read(folder / FILE)
        self.before: dict[str, float] = {}
        """What the clock had counted when the run went back to a checkpoint."""
        lines = [_line(number, attempt) for number, attempt in enumerate(self.past, 1)]
        replace_file(folder / FILE, "".join(lines).encode())
        self.file = (folder / FILE).open("a", encoding="utf-8")
        self._note()

    def write(self, record: Record) -> None:
        """Note how far it is and where the time went."""
        self.step = max(self.step, record["step"])
        self._note()

    def close(self) -> None:
        """Note the end and write the account."""
        self._note()
        self.file.close()
        replace_file(self.folder / GOODPUT, json_bytes(self.account()))

    def account(self) -> dict[str, Any]:
        """The account of all attempts so far."""
        return account([*self.past, self._now()])

    def turn_back(self, step: int) -> None:
        """Begin anew at the step of a checkpoint that the run has gone back to."""
        self.past.append(replace(self._now(), end="went back to a checkpoint"))
        self.before, self.begin, self.step = self.clock.split(), step, step
        self._note()

    def _now(self) -> Attempt:
        spent = {what: seconds - self.before.get(what, 0.0) for what, seconds in self.clock.split().items()}
        return Attempt(self.begin, self.step, spent, self.since, self.end, turned=bool(self.before))

    def _note(self) -> None:
        self.file.write(_line(len(self.past) + 1, self._now()))
        self.file.flush()


def read(path: Path) -> list[Attempt]:
    """The attempts in a file, each as its last whole line has it; lines that are none are passed over."""
    found: dict[int, Attempt] = {}
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        lines = []
    for text in lines:
        try:
            data = json.loads(text)
            spent = {str(purpose): float(seconds) for purpose, seconds in data["time"].items()}
            since, end = data.get("since"), data.get("end")
            found[int(data["attempt"])] = Attempt(
                int(data["begin"]),
                int(data["step"]),
                spent,
                float(since) if isinstance(since, (int, float)) else None,
                end if isinstance(end, str) else None,
                data.get("turned") is True,
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            continue
    return [found[number] for number in sorted(found)]


def _line(number: int, attempt: Attempt) -> str:
    known = {key: value for key, value in asdict(attempt).items() if value is not None}
    return json.dumps({"attempt": number, **known}) + "\n"


def leave_word(path: Path, end: str) -> None:
    """Note how the last attempt ended, where the process that writes the file can no longer do so."""
    found = read(path)
    if found:
        with path.open("a", encoding="utf-8") as file:
            file.write(_line(len(found), replace(found[-1], end=redact(end))))


def failure(error: BaseException) -> str:
    """How an attempt ended that an error ended: its name and first line, without secrets."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped: interrupted"
    said = (error.lines if isinstance(error, Stop) else str(error).splitlines()) or [""]
    return redact(f"failed: {type(error).__name__}: {said[0][:300]}".removesuffix(": "))
