"""What a line is about: a run, or a config that has none yet, and which sample numbers a step of it takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.records import CONFIG, read_status
from ssmtrain.config.errors import UserError
from ssmtrain.config.growth import batches, lengths
from ssmtrain.config.identity import differences, may_change
from ssmtrain.config.load import load_run_config
from ssmtrain.config.reference import parse
from ssmtrain.config.request import Request
from ssmtrain.config.schema import RunConfig
from ssmtrain.explain.steps import ZERO, Begin, Stretch, stretches


@dataclass(frozen=True)
class Subject:
    """A config and, where it has been started, the run's folder."""

    config: RunConfig
    folder: Path | None
    done: int = 0
    """Steps that the run has taken."""
    begin: Begin = ZERO
    """Where a fork began."""

    @property
    def name(self) -> str:
        """The run's, or the recipe's."""
        return f"run {self.folder.name}" if self.folder else f"recipe {self.config.recipe}"

    @cached_property
    def last(self) -> int:
        """The step at which the run ends."""
        trainer, steps = self.config.trainer, batches(self.config.trainer)
        limits = [trainer.max_steps] if trainer.max_steps else []
        if trainer.max_tokens:
            limits.append(self.begin.step + steps.steps_to(trainer.max_tokens, self.begin.tokens))
            limits += [] if trainer.max_steps else [steps.steps_to(trainer.max_tokens)]
        return min(limits, default=max(self.done, 1))

    @cached_property
    def stretches(self) -> list[Stretch]:
        """All its steps."""
        saved = store.checkpoints(self.folder / "checkpoints") if self.folder else []
        known = [(store.step_of(path), int(store.load_state(path)["run"]["rows"])) for path in saved]
        grown, row = batches(self.config.trainer), self.config.data.seq_len
        last = max(self.last, self.done)
        return stretches(grown, row, self.begin, known, last, self._left_out(known))

    def _left_out(self, known: Sequence[tuple[int, int]]) -> int:
        """Rows that the run left out when it went back to its last checkpoint."""
        if self.folder is None or not known:
            return 0
        turns = records(self.folder / "metrics.jsonl", "rollback")
        return sum(int(turn["rows_left_out"]) for turn in turns[-1:] if turn["step"] == known[-1][0] + 1)

    def stretch(self, step: int) -> Stretch:
        """The stretch that a step is in; UserError where the run has no such step."""
        if step <= self.begin.step:
            origin = self.config.origin
            raise UserError(
                f"step={step}: this run was forked at step {self.begin.step:,}",
                f"earlier steps are those of run={origin.run if origin else '…'}",
            )
        found = next((one for one in self.stretches if step <= one.before + one.steps), None)
        if found is None:
            raise UserError(
                f"step={step}: {self.name} ends at step {self.last:,}", "give a step=… up to that"
            )
        return found

    def numbers(self, step: int) -> range:
        """The sample numbers of a step; UserError where the run has no such step."""
        return self.stretch(step).numbers(step)

    def length(self, step: int, within: Stretch | None = None) -> int:
        """Tokens of its rows, which a warm-up cuts shorter than data.seq_len; `within` is its stretch, where
        that is known."""
        row, found = self.config.data.seq_len, within or self.stretch(step)
        seen = found.tokens + (step - 1 - found.before) * found.rows * row
        return lengths(self.config.data).at(seen)


def open_subject(request: Request) -> Subject:
    """The run of run=, or the config of config=; UserError when there is no such run or it would be another.

    A run needs no checkpoint to be read.
    """
    if request.config is not None:
        if request.config.origin is not None and request.config.origin.kind == "fork":
            raise UserError("this page is a fork's: give its run, as in run=runs/<name>")
        return Subject(request.config, None)
    where = _where(request.run or "")
    config = load_run_config(where, request.overrides)
    folder = _folder(where, request.overrides)
    changed = [key for key in differences(load_run_config(folder / CONFIG), config) if not may_change(key)]
    if changed:
        raise UserError(
            f"{', '.join(changed[:3])}: with another value it would be another run", "leave it as it is"
        )
    return Subject(config, folder, int(read_status(folder)["step"]), _begin(config, folder))


def _where(run: str) -> Path:
    """The run that run= names, be it by one of its checkpoints."""
    where = Path(parse(run).where).expanduser()
    return where.parent.parent if store.is_name(where.name) and where.is_dir() else where


def _folder(where: Path, overrides: list[str]) -> Path:
    words = [word.partition("=")[2] for word in overrides if word.startswith("runs_dir=")]
    where = where.parent if where.name == CONFIG else where
    for folder in (where, Path(words[0] if words else "runs") / where):
        if (folder / CONFIG).is_file() and (folder / "checkpoints").is_dir():
            return folder
    raise UserError(f"run={where}: this is no run's folder", "give its page as config=… instead")


def _begin(config: RunConfig, folder: Path) -> Begin:
    """Where a fork began, as it wrote down; UserError where it did not."""
    origin = config.origin
    if origin is None or origin.kind != "fork":
        return ZERO
    noted = [record for record in records(folder / "metrics.jsonl", "fork") if "rows" in record]
    if noted:
        return Begin(noted[-1]["step"], noted[-1]["rows"], noted[-1]["tokens"])
    found = store.checkpoints(folder / "checkpoints")
    if not found or config.trainer.global_batch_warmup:
        raise UserError(f"{folder} is a fork that has not written down where its rows begin")
    run = store.load_state(found[-1])["run"]
    tokens = (int(run["step"]) - origin.step) * config.trainer.global_batch
    return Begin(origin.step, int(run["rows"]) - tokens // config.data.seq_len, int(run["tokens"]) - tokens)


def step_of(request: Request) -> int:
    """The number of step=; UserError when it is none."""
    text = request.words.get("step", "")
    if not text:
        raise UserError(f"{request.verb} needs step=N, as in step=100")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"step={text}: expected a step of the run, 1 or more")
    return int(text)


def records(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl (of one kind) or ledger.jsonl; empty where there is none."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # the last line of a run that was killed
            continue
        if kind is None or record.get("kind") == kind:
            found.append(record)
    return found
