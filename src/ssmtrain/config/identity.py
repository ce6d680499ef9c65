"""What makes two configs the same run: the hash behind the default name, and the differences."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmtrain.config.schema import RunConfig

FIXED_TRAINER = ("global_batch", "global_batch_warmup", "precision")
"""The trainer's keys that decide what is learned; all its others may change between starts."""

FREE = (
    "name",
    "recipe",
    "runs_dir",
    "resume",
    "data.cache_dir",
    "data.val_rows",
    "data.val_lengths",
    "checks",
    "trainer",
    "parallel",
    "launch",
    "logger",
    "show",
    "generate",
    "origin.run",
)
"""Keys, and whole groups, that may change between starts, FIXED_TRAINER excepted."""

LATER = ("origin", "ema", "data.seq_len_warmup", "data.carry_state", "trainer.global_batch_warmup")
"""Keys that count only where they are set: runs named before there were such keys keep their names."""


def may_change(key: str) -> bool:
    """Whether a run stays the same run when this key changes."""
    if key.startswith("trainer.") and key.removeprefix("trainer.") in FIXED_TRAINER:
        return False
    return any(key == group or key.startswith(f"{group}.") for group in FREE)


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) of nested mappings."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def config_hash(config: RunConfig) -> str:
    """Hex sha256 of what decides the run: the config without limits, devices, logger and output settings."""
    from ssmtrain.config.schema import dump

    decisive = {
        key: value
        for key, value in flat(dump(config))
        if not may_change(key) and not (key in LATER and value in (None, False))
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def default_name(config: RunConfig) -> str:
    """The recipe's name, as far as a folder may have it, and six hex digits of the hash."""
    recipe = re.sub(r"[^A-Za-z0-9._-]+", "-", config.recipe).lstrip("-._")[:90] or "run"
    return f"{recipe}-{config_hash(config)[:6]}"


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, as {"optim.lr": (old, new)}; None stands for an absent key."""
    from ssmtrain.config.schema import dump

    before, after = dict(flat(dump(old))), dict(flat(dump(new)))
    keys = [*before, *(key for key in after if key not in before)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
