"""What a line is about: a run, or a config that has none yet, and which sample numbers a step of it takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.records import CONFIG, read_status
from ssmtrain.config.errors import UserError
from ssmtrain.config.growth import lengths
from ssmtrain.config.identity import differences, may_change
from ssmtrain.config.load import load_run_config
from ssmtrain.config.reference import parse
from ssmtrain.config.request import Request
from ssmtrain.config.schema import RunConfig
from ssmtrain.config.task_rules import TASKS


@dataclass(frozen=True)
class Subject:
    """A config and, where it has been started, the run's folder."""

    config: RunConfig
    folder: Path | None
    done: int = 0
    """Steps that the run has taken."""
    begin: tuple[int, int] = (0, 0)
    """A step and the rows consumed before the one that follows it: where a fork began."""

    @property
    def name(self) -> str:
        """The run's, or the recipe's."""
        return f"run {self.folder.name}" if self.folder else f"recipe {self.config.recipe}"

    @property
    def last(self) -> int:
        """The step at which the run ends."""
        trainer = self.config.trainer
        limits = [trainer.max_steps] if trainer.max_steps else []
        limits += [-(-trainer.max_tokens // trainer.global_batch)] if trainer.max_tokens else []
        return min(limits, default=max(self.done, 1))

    @property
    def rows_per_step(self) -> int:
        """Rows of the global batch."""
        return self.config.trainer.global_batch // self.config.data.seq_len

    def numbers(self, step: int) -> range:
        """The sample numbers of a step; UserError where the run has no such step."""
        since, rows = self.begin
        if step <= since:
            origin = self.config.origin
            raise UserError(
                f"step={step}: this run was forked at step {since:,}",
                f"earlier steps are those of run={origin.run if origin else '…'}",
            )
        if step > max(self.last, self.done):
            raise UserError(
                f"step={step}: {self.name} ends at step {self.last:,}", "give a step=… up to that"
            )
        saved = store.checkpoints(self.folder / "checkpoints") if self.folder else []
        if saved:
            # The next checkpoint knows what was read up to it, rows that the run left out not counted.
            path = next((path for path in saved if store.step_of(path) >= step), saved[-1])
            since, rows = store.step_of(path), int(store.load_state(path)["run"]["rows"])
        first = rows + (step - 1 - since) * self.rows_per_step
        return range(first, first + self.rows_per_step)


def open_subject(request: Request) -> Subject:
    """The run of run=, or the config of config=; UserError when there is no such run or it would be another.

    A run needs no checkpoint to be read.
    """
    if request.config is not None:
        _refuse(request.config)
        if request.config.origin is not None and request.config.origin.kind == "fork":
            raise UserError("this page is a fork's: give its run, as in run=runs/<name>")
        return Subject(request.config, None)
    where = _where(request.run or "")
    config = load_run_config(where, request.overrides)
    _refuse(config)
    folder = _folder(where, request.overrides)
    changed = [key for key in differences(load_run_config(folder / CONFIG), config) if not may_change(key)]
    if changed:
        raise UserError(
            f"{', '.join(changed[:3])}: with another value it would be another run", "leave it as it is"
        )
    return Subject(config, folder, int(read_status(folder)["step"]), _begin(config, folder))


def _refuse(config: RunConfig) -> None:
    """UserError where a step's rows are not the next of one source."""
    given = {
        f"data.kind={config.data.kind}": config.data.kind in ("mix", *TASKS),
        "data.seq_len_warmup": bool(lengths(config.data).stages),
        "trainer.global_batch_warmup": config.trainer.global_batch_warmup is not None,
    }
    for key, there in given.items():
        if there:
            raise UserError(
                f"{key}: the rows of a step cannot be shown yet",
                "with SSMTRAIN_LEDGER=1 the run's ledger.jsonl names the rows of every step",
            )


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


def _begin(config: RunConfig, folder: Path) -> tuple[int, int]:
    origin = config.origin
    if origin is None or origin.kind != "fork":
        return 0, 0
    found = store.checkpoints(folder / "checkpoints")
    if not found:
        raise UserError(f"{folder} is a fork that has saved nothing yet: where its rows begin is not known")
    run = store.load_state(found[-1])["run"]
    per_step = config.trainer.global_batch // config.data.seq_len
    return origin.step, int(run["rows"]) - (int(run["step"]) - origin.step) * per_step


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
