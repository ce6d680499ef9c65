"""How many rows a device takes at a time, where it is to be found out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmtrain.checkpoint import faults
from ssmtrain.config.errors import OutOfMemory
from ssmtrain.train.module import LitLM
from train.conftest import ledger, records

Train = Callable[..., tuple[int, Path]]
AUTO = {"trainer__micro_batch": "auto"}


def memory_for(rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let passes over more rows run out of memory; the rows of those that did not."""
    real = LitLM.__dict__["run_passes"]
    taken: list[int] = []

    def run_passes(self: LitLM, batch: Any, *args: Any) -> Any:
        found = real(self, batch, *args)
        if len(batch.sample_ids) > rows:  # where most memory is held: when the passes are done
            raise torch.OutOfMemoryError("CUDA out of memory")
        taken.append(len(batch.sample_ids))
        return found

    monkeypatch.setattr(LitLM, "run_passes", run_passes)
    return taken


def test_what_fits_is_found_and_kept(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit as with the number given; resumed with more memory, it stays."""
    _, given = train(name="given", trainer__micro_batch=2)
    with monkeypatch.context() as patch:
        taken = memory_for(2, patch)
        faults.arm("step_end:5:TERM")
        code, folder = train(name="auto", **AUTO)
        assert code == 75 and taken[0] == 2
        faults.arm()
    taken = memory_for(100, monkeypatch)
    assert train(name="auto", **AUTO)[0] == 0 and set(taken) == {2}
    assert ledger(folder) == ledger(given)
    (record,) = records(folder, "micro_batch")
    assert (record["rows"], record["of"]) == (2, 4)


def test_all_rows_where_there_is_memory(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    _, given = train(name="given")
    taken = memory_for(4, monkeypatch)
    _, folder = train(name="auto", **AUTO)
    assert taken[:2] == [4, 4] and ledger(folder) == ledger(given)


def test_less_memory_than_before_is_said(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults.arm("step_end:4:TERM")
    _, folder = train(name="auto", **AUTO)
    faults.arm()
    taken = memory_for(1, monkeypatch)
    assert train(name="auto", **AUTO)[0] == 0 and set(taken) == {1}
    assert "memory is found for 1 rows at a time, not 4 as before: last bits differ" in caplog.text
    assert [line["step"] for line in ledger(folder)] == list(range(1, 9))


def test_no_memory_for_one_row(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_for(0, monkeypatch)
    with pytest.raises(OutOfMemory):
        train(**AUTO)
