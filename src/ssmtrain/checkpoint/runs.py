"""Run folders: who may write in one, from where it continues, and which checkpoint a reader gets.

`runs/<name>/` (or `runs/<name>/<arm>/`) holds config.yaml, status.json, lock, checkpoints/, metrics.jsonl.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ssmtrain.checkpoint import lock, store
from ssmtrain.checkpoint.choose import choose
from ssmtrain.checkpoint.durable import make_folder, sync_folder
from ssmtrain.checkpoint.exported import files, is_export, open_export
from ssmtrain.checkpoint.origins import config_of, open_origin
from ssmtrain.checkpoint.paths import real, refuse_links, why_none
from ssmtrain.checkpoint.records import (
    CONFIG,
    cut_jsonl,
    read_config,
    read_status,
    sweep,
    write_config,
    write_status,
)
from ssmtrain.config import launched
from ssmtrain.config.errors import UserError
from ssmtrain.config.identity import default_name, differences, may_change
from ssmtrain.config.mixing import past, phases
from ssmtrain.config.reference import BEST, parse
from ssmtrain.config.schema import RunConfig

DECISION = "SSMTRAIN_RUN"
"""Environment variable by which rank 0 hands its decision to the ranks that it starts."""

ROUNDING = (
    "trainer.micro_batch",
    "trainer.kernels",
    "trainer.recompute",
    "trainer.compile",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.threads",
    "parallel.",
)
"""Free keys that keep every token in its place but may change the last bits of the sums."""

PHASES = "data.phases"
"""A key that may change for rows that the run has not come to."""

LOGS = ("metrics.jsonl", "ledger.jsonl")

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED = {"checkpoints", "lock", "launch", CONFIG, "status.json", *LOGS}


@dataclass
class Run:
    """A run folder and what was decided about it; `checkpoint` is where to continue (None: the start)."""

    name: str
    folder: Path
    config: RunConfig
    checkpoint: Path | None = None
    finished: bool = False
    """The run had reached its end before; there is nothing to do."""
    origin: Path | None = None
    """The checkpoint of another run to begin from, where this one has none of its own yet."""
    notices: list[str] = field(default_factory=list)
    """Lines for the user, rank 0 only."""
    held: lock.Lock | None = None

    @property
    def step(self) -> int:
        """The step of `checkpoint`; 0 without one."""
        return store.step_of(self.checkpoint) if self.checkpoint else 0

    @property
    def begins_at(self) -> int:
        """The step that the next one follows: `step`, or the fork's before it has a checkpoint of its own."""
        forked = self.origin is not None and self.config.origin and self.config.origin.kind == "fork"
        return self.config.origin.step if forked and self.config.origin else self.step

    @property
    def page(self) -> Path:
        """Its config, a page for config=."""
        return files(self.folder).page

    @property
    def checkpoints(self) -> Path:
        """The folder for store.save."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON line per logged step; already cut back to `step`."""
        return self.folder / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """One JSON line per step, written when SSMTRAIN_LEDGER=1; already cut back to `step`."""
        return self.folder / "ledger.jsonl"

    def mark(self, status: str, step: int, tokens: int) -> None:
        """Write status.json ("unfinished" or "finished"); OSError when the disk refuses."""
        write_status(self.folder, status, step, tokens)

    def close(self) -> None:
        """Release the lock."""
        if self.held:
            self.held.release()
            self.held = None


def resolve(config: RunConfig) -> Run:
    """The run that `config` asks for: locked, with the checkpoint to continue from; prints nothing.

    Rank 0 makes the folder, decides, and cuts the logs back; other ranks follow it. UserError (exit 2) for
    an unsafe name, another process in the folder, a different config, or a damaged named checkpoint.
    """
    name, folder = locate(config)
    if launched.rank() > 0:
        return _follow(config, name, folder)
    exists = (folder / CONFIG).is_file()
    if exists and config.resume == "never":
        raise UserError(
            f"run {name} exists in {folder} and resume=never",
            "continue it with resume=auto, or start another with name=…",
        )
    if not exists:
        _refuse_foreign(folder)
    refuse_links(folder)
    run = Run(name, folder, config)
    try:
        make_folder(run.checkpoints)
        run.held = lock.acquire(folder / "lock")
        if run.held.taken_over:
            run.notices.append(f"took over from {run.held.taken_over}, which is gone")
        _decide(run)
    except lock.Held as owner:
        raise UserError(
            f"run {name} is in use by {owner}",
            f"wait for it, stop it, or start another run with name=… (the lock is {folder / 'lock'})",
        ) from None
    except OSError as error:
        run.close()
        raise UserError(f"cannot write in {folder}: {error.strerror or error}", "set runs_dir=…") from error
    except BaseException:
        run.close()
        raise
    chosen = {"checkpoint": run.checkpoint, "origin": run.origin}
    paths = {key: str(path) if path else None for key, path in chosen.items()}
    os.environ[DECISION] = json.dumps({"folder": str(folder), **paths})
    return run


def open_run(where: str, runs_dir: str = "runs", word: str = "run") -> Run:
    """A run (name or folder, perhaps with @step-<number> or @best) or a checkpoint to read from, no lock.

    Without @ it is the newest good checkpoint; `word` is what the line calls it, for errors.
    """
    named = parse(where, word)
    where, given = named.where, Path(named.where)
    if store.is_name(given.name) and given.is_dir():
        checkpoint = real(given, "run")
        problems = store.verify(checkpoint)
        if problems:
            raise UserError(
                f"{given} is damaged:", *problems[:3], f"the newest good one: run={checkpoint.parent.parent}"
            )
        folder = checkpoint.parent.parent
        return Run(folder.name, folder, read_config(folder), checkpoint)
    if is_export(given):
        export = open_export(given, word)
        return Run(given.name, given, config_of(export.page), export.file)
    candidates = [given, Path(runs_dir) / where]
    folder = next((path for path in candidates if (path / CONFIG).is_file()), Path())
    if folder == Path():
        known = sorted(path.parent.name for path in Path(runs_dir).glob(f"*/{CONFIG}"))
        near = difflib.get_close_matches(where, known, 3, 0.4) or known[-3:]
        hint = f"runs in {runs_dir}: {', '.join(near)}" if near else f"there are no runs in {runs_dir}"
        raise UserError(f"{word}={where}: {why_none(given, 'there is no such run')}", hint)
    run = Run(folder.resolve().name, folder, read_config(folder))
    run.checkpoint = choose(folder, named, word, run.notices.append)
    return run


def locate(config: RunConfig) -> tuple[str, Path]:
    """Name and folder of the config's run, inside runs_dir; nothing is made. UserError for an unsafe name."""
    name = default_name(config) if config.name is None else config.name
    parts = name.split("/")
    bad = [part for part in parts if not _PART.fullmatch(part) or part in _RESERVED]
    bad += [part for part in parts[1:] if part == BEST]
    if bad or len(parts) > 2:
        raise UserError(
            f"name: {name[:100]!r} cannot be a folder of its own under runs_dir",
            "expected letters, digits, '.', '_' and '-', as in name=mine or name=mine/arm",
        )
    base = Path(config.runs_dir)
    folder = base.joinpath(*parts)
    if not real(folder, "name").is_relative_to(real(base, "runs_dir")):
        raise UserError(f"name: {name} leads out of {base} through a link")
    return name, folder


def _decide(run: Run) -> None:
    """Everything rank 0 settles under the lock: same config? finished? from which checkpoint?"""
    store.clean(run.checkpoints)
    sweep(run.folder)
    named = run.config.resume not in ("auto", "never")
    existing = (run.folder / CONFIG).is_file()
    if existing:
        _compare(run)
        if not named and _is_finished(run):
            return
    if named:
        run.checkpoint = _named_checkpoint(run)
    elif existing:
        run.checkpoint = _newest(run)
    if run.checkpoint is None and run.config.origin is not None:
        run.origin = open_origin(run.config)
    for log in LOGS:
        cut_jsonl(run.folder / log, run.step if run.checkpoint else -1)
    write_config(run.folder, run.config)
    run.mark("unfinished", run.step, _tokens(run.checkpoint) if run.checkpoint else 0)


def _tokens(checkpoint: Path) -> int:
    """The tokens that a checkpoint was trained on; Damaged when its state does not say."""
    tokens = store.load_state(checkpoint).get("tokens")
    if type(tokens) is not int or tokens < 0:
        raise store.Damaged(checkpoint, [f"state.json: its tokens are {str(tokens)[:40]!r}"])
    return tokens


def _compare(run: Run) -> None:
    """Refuse a config that would make it another run; say which free keys changed."""
    before = read_config(run.folder)
    changed = differences(before, run.config)
    wrong = {key: pair for key, pair in changed.items() if not may_change(key)}
    if wrong.keys() == {PHASES} and _still_to_come(run, before):
        wrong = {}
        run.notices.append("data.phases still to come have changed")
    if wrong and store.checkpoints(run.checkpoints):
        shown = [f"  {key}: {old!r} in the run, {new!r} now" for key, (old, new) in list(wrong.items())[:2]]
        more = f" (and {len(wrong) - 2} more)" if len(wrong) > 2 else ""
        raise UserError(
            f"run {run.name} was started with another config; it differs in{more}:",
            *shown,
            "may change: trainer (not global_batch, precision), parallel, launch, logger, show, generate, "
            f"runs_dir, {PHASES} still to come",
            f"start another run with name=…, or continue this one with config={run.folder / CONFIG}",
        )
    if wrong:
        run.notices.append("the run had saved nothing under its former config: starting over with this one")
        return
    told = [key for key in changed if key.startswith(("trainer.", "parallel."))]
    run.notices.extend(f"{key} changes from {changed[key][0]} to {changed[key][1]}" for key in told)
    if any(key.startswith(ROUNDING) for key in told):
        run.notices.append("the same tokens follow in the same order; the last bits of the loss may differ")


def _still_to_come(run: Run, before: RunConfig) -> bool:
    """Whether two mixtures are the same for every row that the run's newest checkpoint has seen."""
    path: Path | None = Path(run.config.resume)
    if run.config.resume in ("auto", "never"):
        path = store.newest_good(run.checkpoints, lambda line: None)
    if path is None or not path.is_dir():
        return True  # said by those who look for it
    rows = (store.load_state(path).get("run") or {}).get("rows")
    if type(rows) is not int:
        raise store.Damaged(path, [f"state.json: its rows are {str(rows)[:40]!r}"])
    return past(phases(before), rows) == past(phases(run.config), rows)


def _is_finished(run: Run) -> bool:
    """Whether the run's last checkpoint is there and has reached the (possibly new) limits."""
    status = read_status(run.folder)
    found = store.checkpoints(run.checkpoints)
    if status["status"] != "finished" or not found:
        return False
    if store.step_of(found[-1]) != status["step"] or store.verify(found[-1], hashes=False):
        return False
    limits = run.config.trainer
    reached = [
        limits.max_steps is not None and status["step"] >= limits.max_steps,
        limits.max_tokens is not None and status["tokens"] >= limits.max_tokens,
    ]
    if not any(reached):
        return False
    run.finished = True
    run.checkpoint = found[-1]
    run.notices.append(f"run {run.name} is finished at step {status['step']:,} ({run.folder})")
    run.notices.append("train longer with trainer.max_steps=…, or again with another name=… or seed=…")
    return True


def _newest(run: Run) -> Path | None:
    """The newest good checkpoint; UserError when there are some and none is good."""
    problems: list[str] = []
    newest = store.newest_good(run.checkpoints, problems.append)
    if newest is None and problems:
        raise UserError(
            f"run {run.name} has no good checkpoint:",
            *problems[:3],
            f"restore {run.checkpoints} from a copy, or start another run with name=…",
        )
    run.notices.extend(problems)
    if newest is None:
        run.notices.append(f"run {run.name} has no checkpoint yet: starting from the beginning")
    else:
        run.notices.append(f"continuing run {run.name} from step {store.step_of(newest):,}")
    return newest


def _named_checkpoint(run: Run) -> Path:
    """The checkpoint of `resume=<folder>`, good and of the same config; no other is tried in its place."""
    path = real(Path(run.config.resume), "resume")
    if not store.is_name(path.name) or not path.is_dir():
        raise UserError(
            f"resume: {run.config.resume} is not a checkpoint folder: {why_none(path, 'no such folder')}",
            "expected auto, never, or a folder such as runs/<name>/checkpoints/step-00000100",
        )
    problems = store.verify(path)
    if problems:
        raise UserError(f"resume: {path} is damaged:", *problems[:3], "resume=auto uses the newest good one")
    own = run.checkpoints.resolve()
    if path.parent != own:
        if store.checkpoints(own):
            raise UserError(
                f"run {run.name} has checkpoints of its own, resume names one of another run",
                "continue the run with resume=auto, or start another from that checkpoint with name=…",
            )
        source = read_config(path.parent.parent)
        wrong = [key for key in differences(source, run.config) if not may_change(key)]
        if wrong:
            raise UserError(f"resume: {path} was made with another config: {', '.join(wrong[:5])}")
    _set_aside(run, lambda other: other.name > path.name)
    run.notices.append(f"continuing run {run.name} from {path}")
    return path


def _set_aside(run: Run, later: Callable[[Path], bool]) -> None:
    """Move the checkpoints of a branch that is being left out of discovery's sight, without deleting them."""
    left = [path for path in store.checkpoints(run.checkpoints) if later(path)]
    if left:
        aside = run.checkpoints / f"aside-{uuid.uuid4().hex[:8]}"
        make_folder(aside)
        for path in reversed(left):
            os.replace(path, aside / path.name)
        sync_folder(aside)
        sync_folder(run.checkpoints)
        run.notices.append(f"{len(left)} later checkpoints are set aside in {aside}")


def _refuse_foreign(folder: Path) -> None:
    """A folder without a config may only hold what a start that died early leaves behind."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is in the way of the run: it is not a folder", "choose another name=…")
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in found if name not in _RESERVED and not name.startswith(".")]
    if foreign:
        raise UserError(
            f"{folder} exists and is not a run: it holds {', '.join(foreign[:3])}", "choose another name=…"
        )


def _follow(config: RunConfig, name: str, folder: Path) -> Run:
    """A rank above 0: rank 0's decision when it started this process, else the same decision, read only."""
    decision = json.loads(os.environ.get(DECISION, "{}"))
    if decision.get("folder") == str(folder):
        own, other = (Path(path) if path else None for path in (decision["checkpoint"], decision["origin"]))
        return Run(name, folder, config, own, origin=other)
    run = Run(name, folder, config)
    if config.resume not in ("auto", "never"):
        run.checkpoint = real(Path(config.resume), "resume")
    elif (folder / CONFIG).is_file() and not _is_finished(run):
        run.checkpoint = store.newest_good(run.checkpoints, lambda line: None)
    if run.checkpoint is None and config.origin is not None:
        run.origin = open_origin(config)
    run.notices.clear()
    return run
