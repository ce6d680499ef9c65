"""A run over several files, trained once; to read only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssmtrain.checkpoint.runs import resolve
from ssmtrain.train.fit import fit
from train.conftest import page

BAD = "\x1b[31mzqxj zqxj\u202e\x07 " * 30
"""What the others are not: letters they do not have, and what a terminal would obey."""


def files(folder: Path) -> Path:
    """Six files, the fourth of them another kind of text."""
    texts = folder / "texts"
    texts.mkdir()
    for i in range(6):
        (texts / f"{i}.txt").write_text(
            BAD if i == 3 else f"file {i} is as good as the others are. " * (3 + 4 * i)
        )
    return texts


def config_of(folder: Path, **changes: Any) -> Any:
    """The tiny recipe on the files."""
    texts = folder / "texts"
    return page(folder, name="spiky", data__train=str(texts if texts.exists() else files(folder)), **changes)


@pytest.fixture(scope="session")
def spiky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four steps with a record every third and a checkpoint every fourth."""
    folder = tmp_path_factory.mktemp("spiky")
    every = {"trainer__log_every": 3, "trainer__val_every": 0, "trainer__keep_last": 9}
    return trained(config_of(folder, trainer__max_steps=24, **every))


def trained(config: Any, ledger: bool = False) -> Path:
    """The folder of a finished run, with a ledger of its steps if wanted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSMTRAIN_LEDGER", raising=False)
        patch.delenv("SSMTRAIN_RUN", raising=False)
        if ledger:
            patch.setenv("SSMTRAIN_LEDGER", "1")
        run = resolve(config)
        try:
            assert fit(config, run) == 0
        finally:
            run.close()
    return run.folder
