"""`<run>@step-50000` and `<run>@best`: how a line names one checkpoint of a run."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from ssmtrain.config.errors import UserError

BEST = "best"

_STEP = re.compile(r"step-(\d{1,8})")


@dataclass(frozen=True)
class Reference:
    """A run (name or folder) and which of its checkpoints."""

    where: str
    step: int | None = None
    """This step's; absent: the newest good one, or the best."""
    best: bool = False
    """The one with the lowest validation loss."""


def parse(text: str, word: str = "run") -> Reference:
    """What a word's text names; UserError for an @ that is followed by anything but step-<number> or best.

    A folder that exists under the whole text is meant as it stands.
    """
    where, at, pick = text.rpartition("@")
    if not at or os.path.exists(os.path.expanduser(text)):
        return Reference(text)
    step = _STEP.fullmatch(pick)
    if pick != BEST and step is None:
        raise UserError(
            f"{word}={text}: @{pick} is no checkpoint",
            f"expected @step-<number> or @best, as in {word}={where or '<run>'}@step-1000",
        )
    return Reference(where, int(step[1]) if step else None, step is None)
