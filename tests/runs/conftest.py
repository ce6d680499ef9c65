"""Run folders as training leaves them, made without training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmtrain.config.load import load, to_yaml
from ssmtrain.train.attempts import Attempt, _line

MakeRun = Callable[..., Path]
TIME = {"start": 2.0, "data": 0.5, "step": 8.0, "save": 0.5, "val": 1.0, "sample": 0.0, "other": 0.0}


def train_record(step: int, **more: Any) -> dict[str, Any]:
    """A training record, as Metrics writes it; the loss falls as 5 / step ** 0.2."""
    loss = 5.0 / step**0.2
    return {
        "kind": "train",
        "step": step,
        "tokens": 2048 * step,
        "loss": loss,
        "bpb": loss / 0.69,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_s": 3000.0,
        "seconds": 2.0 + step,
        "time": TIME,
        **more,
    }


def val_record(step: int, loss: float) -> dict[str, Any]:
    """A validation record."""
    return {"kind": "val", "step": step, "tokens": 2048 * step, "loss": loss, "bpb": loss / 0.69, "labels": 9}


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """make_run(name, steps=, status=, end=, records=, words=) -> the folder, under tmp_path/runs."""
    monkeypatch.chdir(tmp_path)

    def make(
        name: str,
        steps: int = 10,
        status: str = "unfinished",
        end: str | None = "stopped: SIGTERM",
        records: list[dict[str, Any]] | None = None,
        words: tuple[str, ...] = (),
    ) -> Path:
        folder = tmp_path / "runs" / name
        (folder / "checkpoints").mkdir(parents=True)
        config = load(["config=quickstart", "trainer.max_steps=20", f"name={name}", *words])
        (folder / "config.yaml").write_text(to_yaml(config))
        if records is None:
            records = [train_record(step) for step in range(1, steps + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        state = {"status": status, "step": steps, "tokens": 2048 * steps}
        (folder / "status.json").write_text(json.dumps(state))
        start = Attempt(0, steps, TIME, since=1.7e9, end=end)
        (folder / "attempts.jsonl").write_text(_line(1, start))
        (folder / "lock").touch()
        return folder

    return make


@pytest.fixture(scope="session")
def dead_owner() -> str:
    """What the lock of a run holds whose process was killed."""
    code = (
        "import sys; from pathlib import Path; from ssmtrain.checkpoint import lock;"
        "import tempfile; p = Path(tempfile.mkdtemp()) / 'lock'; lock.acquire(p); print(p.read_text())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    return done.stdout.strip()
