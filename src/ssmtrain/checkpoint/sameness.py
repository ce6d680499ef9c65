"""Which changes of a config leave a run the same run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ssmtrain.config.schema import RunConfig, dump

FIXED_TRAINER = ("global_batch", "precision")
"""The trainer's keys that decide what is learned; all its others may change between starts."""

FREE = (
    "name",
    "recipe",
    "description",
    "runs_dir",
    "resume",
    "data.cache_dir",
    "trainer",
    "parallel",
    "logger",
    "show",
    "generate",
)
"""Keys, and whole groups, that may change between starts, FIXED_TRAINER excepted."""

ROUNDING = (
    "trainer.micro_batch",
    "trainer.kernels",
    "trainer.recompute",
    "trainer.compile",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.threads",
    "parallel",
)
"""Free keys that keep every token in its place but may change the last bits of the sums."""


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, as {"optim.lr": (old, new)}; None stands for an absent key."""
    before, after = dict(_flat("", dump(old))), dict(_flat("", dump(new)))
    keys = [*before, *(key for key in after if key not in before)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def may_change(key: str) -> bool:
    """Whether a run stays the same run when this key changes."""
    if key.startswith("trainer.") and key.removeprefix("trainer.") in FIXED_TRAINER:
        return False
    return _is_under(key, FREE)


def changes_rounding(key: str) -> bool:
    """Whether a change of this free key keeps the tokens but not every bit."""
    return _is_under(key, ROUNDING)


def _is_under(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}" if path else str(key), inner)
    else:
        yield path, value
