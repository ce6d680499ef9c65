"""Starts of the real command line, which may be made to end themselves at a named point."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmtrain.checkpoint.faults import VARIABLE
from ssmtrain.checkpoint.runs import DECISION
from ssmtrain.checkpoint.store import checkpoints, step_of
from ssmtrain.config import launched
from ssmtrain.config.errors import UserError
from ssmtrain.config.load import to_yaml
from ssmtrain.config.logger import NoLogger
from ssmtrain.config.schema import RunConfig

INHERITED = (DECISION, "SSMTRAIN_PARENT", *launched.NAMES)
"""What would make the started process believe that it is a rank of this one."""


@dataclass
class Start:
    """How one start went: steps at its beginning and end, exit code (-9: SIGKILL), everything it printed."""

    run: str
    fault: str
    code: int
    begin: int
    end: int
    output: str


def start(page: Path, run: Path, fault: str) -> Start:
    """`ssmtrain fit config=<page>` with a fault planned, to its end; `run` is the folder it works in.

    Whatever the process leaves of its own ranks is ended with it.
    """
    environment = {key: value for key, value in os.environ.items() if key not in INHERITED}
    environment |= {VARIABLE: fault, "SSMTRAIN_LEDGER": "1", "PYTHONUNBUFFERED": "1"}
    begin = _saved(run)
    process = subprocess.Popen(
        [sys.executable, "-m", "ssmtrain", "fit", f"config={page}"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Start(run.name, fault, process.returncode, begin, _trained(run), output)


def write_page(config: RunConfig, folder: Path, name: str, every: int) -> Path:
    """The recipe as a page below `folder`: same model, data and schedule, other saving and printing."""
    trainer = {"save_every": every, "keep_last": 2, "log_every": 1, "sample_every": 0, "max_seconds": None}
    trainer |= {"val_every": every, "val_tokens": config.trainer.global_batch}
    changes: dict[str, Any] = {
        "name": name,
        "runs_dir": str(folder),
        "resume": "auto",
        "logger": NoLogger(),
        "trainer": config.trainer.model_copy(update=trainer),
    }
    page = folder / f"{name}.yaml"
    page.write_text(to_yaml(config.model_copy(update=changes)))
    return page


def refuse(done: Start) -> None:
    """End with what the started process said, when it could not run at all."""
    said = [line for line in done.output.splitlines() if line.strip()][-4:]
    raise UserError(f"the run ended with code {done.code}:", *said)


def tell(what: str, number: int, total: int) -> None:
    """Say which start of how many it is."""
    print(f"[{number}/{total}] {what}", file=sys.stderr, flush=True)


def _saved(run: Path) -> int:
    found = checkpoints(run / "checkpoints")
    return step_of(found[-1]) if found else 0


def _trained(run: Path) -> int:
    """The last step in the ledger."""
    try:
        lines = (run / "ledger.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0
