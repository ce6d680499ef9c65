"""The verb check resume: a recipe's run is killed at the worst moments and compared with an unbroken one.

Both go through the real command line, in processes of their own and in a folder that is removed afterwards.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssmtrain.check.compare import compare
from ssmtrain.check.starts import Start, refuse, start, tell, write_page
from ssmtrain.checkpoint.runs import Run, open_run
from ssmtrain.config.errors import BUG, FINISHED, UNFINISHED, UserError
from ssmtrain.config.growth import batches
from ssmtrain.config.request import Request
from ssmtrain.config.schema import RunConfig

STEPS = 12
LEAST = 4


@dataclass
class Proof:
    """What was done and what was found; `differences` empty means equal to the last bit."""

    steps: int
    save_every: int
    starts: list[Start] = field(default_factory=list)
    equal: dict[str, int] = field(default_factory=dict)
    """How many of what were compared and found equal."""
    differences: list[str] = field(default_factory=list)
    deterministic: bool | None = None
    """Whether two unbroken runs are equal; only asked when something differs."""


def command(request: Request) -> int:
    """`ssmtrain check resume config=…`: exit code 0 when the killed run equals the unbroken one, else 1."""
    assert request.config is not None
    steps, every = lengths(request.config, request.overrides)
    folder = Path(tempfile.mkdtemp(prefix="ssmtrain-check-"))
    keep = False
    try:
        proof = prove(request.config, folder, steps, every)
        keep = bool(proof.differences)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        json.dumps(as_dict(proof), indent=2) if request.as_json else "\n".join(table(request.config, proof))
    )
    if keep:
        print(f"the runs are kept in {folder}", file=sys.stderr)
    return BUG if keep else FINISHED


def lengths(config: RunConfig, overrides: list[str]) -> tuple[int, int]:
    """Steps of the proof and steps between its saves; UserError when four saves do not fit.

    The recipe's own length stays the schedule's; the proof stops both runs early, unless the line sets one.
    """
    given = {word.lstrip("+").partition("=")[0] for word in overrides}
    limit = config.trainer.max_steps
    tokens = config.trainer.max_tokens
    if tokens is not None:
        by_tokens = batches(config.trainer).steps_to(tokens)
        limit = by_tokens if limit is None else min(limit, by_tokens)
    assert limit is not None, "the command line refuses a config without an end"
    steps = limit if "trainer.max_steps" in given else min(STEPS, limit)
    if steps < LEAST:
        raise UserError(
            f"trainer.max_steps = {steps}: too few steps for the kills; expected at least {LEAST}"
        )
    every = config.trainer.save_every if "trainer.save_every" in given else (steps - 1) // 3
    if 3 * every >= steps:
        raise UserError(f"trainer.save_every = {every}: no room for three saves before step {steps}")
    return steps, every


def faults(every: int) -> list[str]:
    """Where the broken run is killed, start by start; each is passed wherever the one before ended."""
    return [
        "mid_file:1",  # in the first save: nothing is saved yet
        f"after_optimizer:{every + max(1, every // 2)}",  # between saves
        "before_rename:1",  # the second save is whole but not published
        "mid_prune:1",  # the third is published, an old one half deleted
    ]


def prove(config: RunConfig, folder: Path, steps: int, every: int) -> Proof:
    """Run the recipe unbroken and broken below `folder` and compare; UserError when a start cannot run."""
    proof = Proof(steps, every)
    plan = faults(every)
    tell(f"unbroken: {steps} steps", 1, len(plan) + 2)
    unbroken = _finish(proof, config, folder, "unbroken")
    for number, fault in enumerate(plan, 2):
        tell(f"killed with SIGKILL at {fault.partition(':')[0]}", number, len(plan) + 2)
        done = start(write_page(config, folder, "broken", every), folder / "broken", fault)
        proof.starts.append(done)
        if done.code != -9:
            if done.code not in (FINISHED, UNFINISHED):
                refuse(done)
            proof.differences.append(f"{fault} was not passed: the start ended with code {done.code}")
            return proof
    tell(f"continued to step {steps}", len(plan) + 2, len(plan) + 2)
    broken = _finish(proof, config, folder, "broken")
    proof.equal, proof.differences = compare(unbroken, broken, steps)
    if proof.differences:
        tell("they differ: is an unbroken run equal to another?", 1, 1)
        again = _finish(proof, config, folder, "again")
        proof.deterministic = not compare(unbroken, again, steps)[1]
    return proof


def _finish(proof: Proof, config: RunConfig, folder: Path, name: str) -> Run:
    """Start the run `name` and stop it, planned, after the proof's last step."""
    run = folder / name
    begin = open_run(str(run)).step if (run / "config.yaml").is_file() else 0
    # A signal at the beginning of a step is obeyed at its end.
    fault = f"step_start:{proof.steps - begin}:TERM"
    done = start(write_page(config, folder, name, proof.save_every), run, fault)
    proof.starts.append(done)
    if done.code not in (FINISHED, UNFINISHED):
        refuse(done)
    return open_run(str(run))


def as_dict(proof: Proof) -> dict[str, Any]:
    """The proof as plain data."""
    return {
        "ok": not proof.differences,
        "steps": proof.steps,
        "save_every": proof.save_every,
        "kills": sum(done.code == -9 for done in proof.starts),
        "starts": [
            {"run": done.run, "fault": done.fault, "code": done.code, "from": done.begin, "to": done.end}
            for done in proof.starts
        ],
        "equal": proof.equal,
        "differences": proof.differences,
        "deterministic": proof.deterministic,
    }


def table(config: RunConfig, proof: Proof) -> list[str]:
    """The proof for a reader."""
    lines = [f"{config.recipe}: {proof.steps} steps, a save every {proof.save_every}", ""]
    lines.append(f"{'run':<10}{'from step':>10}{'to':>6}  ended by")
    for done in proof.starts:
        point = done.fault.partition(":")[0]
        ended = f"SIGKILL at {point}" if done.code == -9 else "stopped, saved"
        lines.append(f"{done.run:<10}{done.begin:>10}{done.end:>6}  {ended}")
    lines.append("")
    lines += [f"equal      {count} {what}" for what, count in proof.equal.items()]
    lines += [f"differs    {line}" for line in proof.differences[:10]]
    if proof.deterministic is False:
        lines.append("two unbroken runs differ as well: this recipe is not deterministic on this machine")
    lines.append(
        "FAILED" if proof.differences else "OK: the killed run equals the unbroken one to the last bit"
    )
    return lines
