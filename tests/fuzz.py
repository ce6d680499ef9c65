"""What the fuzz tests share: how much they try, values at random, trees with one thing replaced, a bound.

`FUZZ=20000 pytest tests/config/test_config_fuzz.py` tries so many inputs, others each time, in place of the
few that every run of the tests has.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ssmtrain.config.errors import UserError

ROOM = 2**29
"""Bytes that reading one bad input may take."""
SECONDS = 20.0
"""Seconds that one may take, on a machine with other work."""


def values(likely: list[Any]) -> st.SearchStrategy[Any]:
    """JSON at random, often one of the values that are likely to hurt."""
    plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    return st.recursive(
        plain | st.sampled_from(likely),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=5,
    )


HURTFUL: list[Any] = [
    *(0, 1, -1, 2, 2**31, 2**63, 10**30),
    *("../x", "/etc/passwd", "/dev/zero", "F32", "BF16", "I64", "x\0y"),
]
JSON = values(HURTFUL)


def tries(examples: int) -> settings:
    """So many inputs, the same ones each time; or as many as FUZZ says, and others each time."""
    more = os.environ.get("FUZZ")
    return settings(
        max_examples=int(more or examples),
        derandomize=more is None,
        deadline=SECONDS * 1000,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def bounded(room: int = ROOM) -> Iterator[None]:
    """Memory beyond the bound is a MemoryError here, not a machine that stands still."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def told(error: UserError) -> str:
    """The error's text, once it is seen to be one: exit code 2 and lines that say something."""
    assert error.lines and error.code == 2
    for line in error.lines:
        assert line.strip(), error.lines
    return "\n".join(error.lines)


def replaced(tree: Any, draw: Any, values: st.SearchStrategy[Any] = JSON) -> Any:
    """A JSON value with one thing in it, at any depth, replaced, removed, or put beside it."""
    inside = isinstance(tree, (dict, list)) and tree and draw.draw(st.integers(0, 3))
    if not inside:
        return draw.draw(values)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = draw.draw(st.sampled_from(keys))
    copied: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    deed = draw.draw(st.sampled_from(["inside", "inside", "remove", "add"]))
    if deed == "remove":
        del copied[key]
    elif deed == "add" and isinstance(copied, dict):
        name = draw.draw(st.text(max_size=12) | st.sampled_from(["../a.json", "evil.json", *keys]))
        copied[name] = draw.draw(values)
    else:
        copied[key] = replaced(tree[key], draw, values)
    return copied
