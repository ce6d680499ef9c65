"""Lightning without what nothing here uses."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from ssmtrain.train.imports import UNUSED, import_lightning
import_lightning()
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.imports import RequirementCache
print(sorted(UNUSED & sys.modules.keys()), bool(RequirementCache("matplotlib")))
"""


def test_lightning_brings_nothing_that_is_not_used() -> None:
    """Its own requirements are asked for as ever, before and after."""
    pytest.importorskip("matplotlib")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[] True\n", done.stderr


def test_packages_are_absent_to_whoever_asks_meanwhile() -> None:
    from lightning_utilities.core.imports import RequirementCache

    from ssmtrain.train.imports import without

    with without(frozenset({"numpy"})):
        inside = [RequirementCache("numpy>=1.0"), RequirementCache(module="numpy.linalg")]
        other = RequirementCache("torch")
    assert not any(inside) and "nothing here uses it" in str(inside[0])
    assert other and RequirementCache("numpy>=1.0")
