"""Records to Weights & Biases, which is imported here only; a run never waits for it nor dies with it."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from ssmtrain.checkpoint.durable import replace_file
from ssmtrain.config.logger import WandbLogger
from ssmtrain.config.redact import redact, redacted
from ssmtrain.config.schema import RunConfig, dump
from ssmtrain.train.journal import Record, finite

log = logging.getLogger(__name__)

INIT_TIMEOUT = 20.0
"""Seconds for the first contact, after which the run goes on with metrics.jsonl alone."""


class WandbSink:
    """Sends figures as `kind/name` over an axis of their own, so that a resumed run may repeat steps."""

    def __init__(self, run: Any) -> None:
        self.run = run
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Queue one record."""
        self.run.log({"step": record["step"], **flat(record)})

    def close(self) -> None:
        """Hand over what is queued."""
        self.run.finish()


def open_wandb(page: WandbLogger, config: RunConfig, name: str, folder: Path) -> WandbSink | None:
    """Start or continue the run's page; None, with a warning, when the service does not answer."""
    run_id = _run_id(folder, name)
    try:
        import wandb

        run = wandb.init(
            project=page.project,
            entity=page.entity,
            mode=page.mode,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=redacted(dump(config)),
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT,
                console="off",
                silent=True,
                # The address of a git remote can hold a token, and a diff anything at all.
                disable_git=True,
                disable_code=True,
            ),
        )
    except Exception as error:  # a missing key, no network, a service that answers nonsense
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        said = redact(reason)
        log.warning("Weights & Biases is not available (%s): metrics.jsonl has everything", said)
        return None
    return WandbSink(run)


def flat(record: Record) -> dict[str, float | str]:
    """The record's figures as `kind/a/b` -> number or text."""
    found: dict[str, float | str] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}/{key}", inner)
        elif isinstance(value, (int, float, str)):
            found[path] = value

    for key, value in finite(record).items():
        if key not in ("kind", "step"):
            walk(f"{record['kind']}/{key}", value)
    return found


def _run_id(folder: Path, name: str) -> str:
    """The id under which the run was first logged, kept in the folder, so that a resume continues it."""
    import secrets

    path = folder / ".wandb_id"
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    run_id = secrets.token_hex(8)
    with contextlib.suppress(OSError):
        replace_file(path, run_id.encode())
    return run_id
