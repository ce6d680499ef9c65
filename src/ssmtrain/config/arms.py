"""The arms of a multirun: every combination of a line's choices, each a config and a name of its own."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ssmtrain.config.errors import UserError
from ssmtrain.config.load import config_hash, load
from ssmtrain.config.words import MAX_ARMS, Word, parse

if TYPE_CHECKING:
    from ssmtrain.config.schema import RunConfig


@dataclass(frozen=True)
class Arm:
    """One combination: its name under the multirun's, what sets it apart, its line and its run folder."""

    name: str
    choices: tuple[str, ...]
    line: tuple[str, ...]
    folder: Path
    config: RunConfig
    """As the line is, its name whole."""


def plan(texts: Sequence[str]) -> list[Arm]:
    """Every combination, each config loaded and checked before the first is started."""
    page = [text for text in texts if text.lstrip("+").startswith("config=")]
    words = parse([text for text in texts if text not in page], sweep=True)
    axes = [word for word in words if word.choices]
    _refuse(axes)
    fixed = [word.text for word in words if not word.choices and word.key != "name"]
    given = next((str(word.value) for word in words if word.key == "name"), None)
    picks = [[text for text, _ in pick] for pick in itertools.product(*(axis.choices for axis in axes))]
    names = arm_names([axis.key for axis in axes], picks)
    chosen = [tuple(f"{axis.key}={text}" for axis, text in zip(axes, pick)) for pick in picks]
    configs = []
    for name, choices in zip(names, chosen):
        configs.append(load([*page, *fixed, *choices, f"name={given or 'multirun'}/{name}"], training=True))
    together = hashlib.sha256("".join(map(config_hash, configs)).encode()).hexdigest()
    above = given or f"{configs[0].recipe}-{together[:6]}"
    return [
        Arm(
            f"{above}/{name}",
            choices,
            (*page, *fixed, *choices, f"name={above}/{name}"),
            Path(config.runs_dir) / above / name,
            config.model_copy(update={"name": f"{above}/{name}"}),
        )
        for name, choices, config in zip(names, chosen, configs)
    ]


def _refuse(axes: Sequence[Word]) -> None:
    if not axes:
        raise UserError("--multirun: nothing to combine; give a key several values, as in optim.lr=1e-3,2e-3")
    total = math.prod(len(axis.choices) for axis in axes)
    if total > MAX_ARMS:
        raise UserError(f"--multirun: {total} combinations; at most {MAX_ARMS} are run")
    for axis in axes:
        if axis.key in ("name", "runs_dir", "resume"):
            raise UserError(
                f"{axis.text}: {axis.key} is the same for all arms; they are named after their values"
            )


def arm_names(keys: Sequence[str], picks: Sequence[Sequence[str]]) -> list[str]:
    """A folder name per combination: last part of each key and its value; numbered if not unique."""
    plain = []
    for pick in picks:
        parts = (f"{key.rpartition('.')[2]}-{value}" for key, value in zip(keys, pick))
        plain.append("_".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-") for part in parts))
    if len({name.lower() for name in plain}) == len(plain) and max(map(len, plain)) <= 100:
        return plain
    width = len(str(len(plain) - 1))
    return [f"{number:0{width}}-{name}"[:100] for number, name in enumerate(plain)]
