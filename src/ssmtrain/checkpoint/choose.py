"""Which checkpoint of a run a line means: the newest good one, a step's, or the best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ssmtrain.checkpoint import best, store
from ssmtrain.checkpoint.records import CONFIG
from ssmtrain.config.errors import UserError
from ssmtrain.config.reference import Reference

NEAR = 3
"""Steps that are named in place of one that does not exist."""


def choose(folder: Path, named: Reference, word: str, report: Callable[[str], None]) -> Path:
    """The checkpoint of the run in `folder`, verified; what was passed over goes to `report`.

    UserError names the nearest steps when the run has no checkpoint of that one.
    """
    checkpoints = folder / "checkpoints"
    if named.best:
        path = best.linked(folder)
        if path is None:
            raise UserError(
                f"{word}={named.where}@best: no checkpoint of this run is of a step that was validated",
                f"{word}={named.where} takes the newest; trainer.val_every and save_every that meet make one",
            )
    elif named.step is not None:
        path = checkpoints / store.step_name(named.step)
        if not path.is_dir():
            raise UserError(
                f"{word}={named.where}@step-{named.step}: there is no such checkpoint", nearest(folder, named)
            )
    else:
        problems: list[str] = []
        newest = store.newest_good(checkpoints, problems.append)
        for line in problems:
            report(line)
        if newest is None:
            advice = f"train it first: ssmtrain fit config={folder / CONFIG}"
            raise UserError(f"{word}={named.where}: it has no good checkpoint yet", *problems[:3], advice)
        return newest
    problems = store.verify(path)
    if problems:
        raise UserError(f"{path} is damaged:", *problems[:3], f"the newest good one: {word}={named.where}")
    return path


def nearest(folder: Path, named: Reference) -> str:
    """The steps nearest to one that is not there, in words."""
    steps = [store.step_of(path) for path in store.checkpoints(folder / "checkpoints")]
    if not steps:
        return f"{folder} has no checkpoints yet"
    wanted = named.step or 0
    near = sorted(sorted(steps, key=lambda step: (abs(step - wanted), step))[:NEAR])
    more = f"; it has {len(steps)}, {min(steps)} to {max(steps)}" if len(steps) > NEAR else ""
    return f"the nearest: {', '.join(f'{named.where}@step-{step}' for step in near)}{more}"
