"""Records to Weights & Biases, which is imported here only; a run never waits for it nor dies with it."""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
import sys
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
FINISH_TIMEOUT = 60.0
"""Seconds at the end for what is still to be sent, after which the run ends and says how to send it."""


class WandbSink:
    """Sends figures as `kind/name` over an axis of their own, so that a resumed run may repeat steps."""

    def __init__(self, run: Any, folder: Path) -> None:
        self.run, self.folder = run, folder
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Queue one record."""
        self.run.log({"step": record["step"], **flat(record)})

    def close(self) -> str | None:
        """Hand over what is queued; returns how to send what was kept on this machine."""
        try:
            self.run.finish()
        except TimeoutError:
            where = shlex.quote(self.run.settings.sync_dir)
            return (
                f"Weights & Biases did not take everything in time; send it with: {_program()} sync {where}"
            )
        kept = unsent(self.folder, self.run.id)
        if not kept:
            return None
        paths = " ".join(shlex.quote(str(path)) for path in kept)
        return f"Weights & Biases was offline; send the run with: {_program()} sync {paths}"


def unsent(folder: Path, run_id: str) -> list[Path]:
    """The folders of a run's offline starts, oldest first, that have not been sent yet."""
    found = sorted((folder / "wandb").glob(f"offline-run-*-{run_id}"))
    return [path for path in found if not list(path.glob("*.synced"))]


def _program() -> str:
    """How wandb is called from here."""
    beside = Path(sys.executable).parent / "wandb"
    return "wandb" if shutil.which("wandb") or not beside.exists() else shlex.quote(str(beside))


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
            group=name.rpartition("/")[0] or None,  # the arms of a sweep are runs of its folder
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=redacted(dump(config)),
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT,
                **_at_the_end(wandb.Settings),
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
    return WandbSink(run, folder)


def _at_the_end(settings: Any) -> dict[str, Any]:
    """The limit on the last hand-over, where this version of wandb has one."""
    if "finish_timeout" not in settings.model_fields:
        return {}
    return {"finish_timeout": FINISH_TIMEOUT, "finish_timeout_raises": True}


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
