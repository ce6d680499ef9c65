"""A model cut over ranks: what each holds, and what is saved, summed and run of it as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from faults.ranks import together
from parallel.shard_ranks import hold_as_one

HOW = {
    "cut": (2, {"unit": 1}),
    "in groups of ranks, two blocks at a time, kept": (4, {"unit": 2, "replicas": 2, "reshard": False}),
    "in bf16 and on the host": (2, {"unit": 2, "gather": "bf16", "reduce": "bf16", "offload": True}),
}


@pytest.mark.parametrize("world, how", HOW.values(), ids=HOW)
def test_ranks_hold_a_model_as_one(world: int, how: dict[str, Any], tmp_path: Path) -> None:
    assert together(hold_as_one, world, tmp_path, tmp_path, how).count("as one") == world
