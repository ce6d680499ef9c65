"""The layer kinds, found by discovery: every module here that defines a config with a `kind`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TypeVar

from ssmtrain.layers.base import FfnConfig, LayerConfig, MixerConfig

T = TypeVar("T", bound=LayerConfig)


@cache
def _modules() -> tuple[str, ...]:
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    for name in names:
        importlib.import_module(f"{__name__}.{name}")
    return tuple(names)


def _kinds(base: type[T]) -> dict[str, type[T]]:
    _modules()
    found: dict[str, type[T]] = {}
    todo = list(base.__subclasses__())
    while todo:
        config = todo.pop()
        todo += config.__subclasses__()
        # Only kinds of this package: a test's own toy kind must not enter the program's union.
        if "kind" in config.model_fields and config.__module__.startswith(f"{__name__}."):
            found[config.model_fields["kind"].default] = config
    return dict(sorted(found.items()))


@cache
def mixer_kinds() -> dict[str, type[MixerConfig]]:
    """Every mixer kind's config class by its name."""
    return _kinds(MixerConfig)


@cache
def ffn_kinds() -> dict[str, type[FfnConfig]]:
    """Every ffn kind's config class by its name."""
    return _kinds(FfnConfig)
